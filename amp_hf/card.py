"""The model card: what AMP did to this model, with valid Hub metadata.

Plain data in, text out: `amp_hf.record` has what the Trainer knows, `CardDetails` the rest, and
card_template.md is the text.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from transformers.pipelines import SUPPORTED_TASKS

from . import markdown
from .record import Results, TrainingRecord

if TYPE_CHECKING:
    from .flatness import Flatness


@dataclass
class CardDetails:
    """What only the script knows: fill in `trainer.card_details`.

    Args:
        dataset: Hub id of the training set, or its name if it is not on the Hub; or several.
        dataset_config: which of its configurations, if it has several.
        base_model: Hub id of the weights that training began with; `None` for none.
        license: one of the Hub's identifiers.
        baseline: results of the ERM baseline: the same training without perturbation.
        baseline_seconds: how long that training took.
        flatness: by model, "AMP" and "ERM", on the training set.
        temperature_scaled: by model, results once a temperature has been fitted.
        pictures: file names in the output folder, by caption.
        how_to_load: Python that loads the model, where transformers alone cannot, given the first
            arguments of `from_pretrained` as Python writes them.
    """

    dataset: str | list[str] | None = None
    dataset_config: str | None = None
    base_model: str | None = None
    license: str | None = None
    baseline: Results | None = None
    baseline_seconds: float | None = None
    flatness: dict[str, Flatness] = field(default_factory=dict)
    temperature_scaled: dict[str, Results] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    how_to_load: Callable[[str], str] | None = None


# What the Hub takes as `license`: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """.split()  # noqa: SIM905
)


def write(path: Path, record: TrainingRecord, details: CardDetails) -> None:
    """Completes the card at `path`, which the Trainer or a subclass of it has written.

    Its metadata stay where nothing better is known, and so does its text, unless it is the stock
    Trainer's draft ("More information needed").
    """
    card = ModelCard.load(path)
    _drop_local_bases(card.data)
    base_models = _listed(details.base_model or card.data.base_model)
    datasets = _listed(details.dataset or card.data.datasets)
    _complete(card.data, record, details)
    is_draft = "More information needed" in card.text
    source = _source(record)
    text = _environment.get_template("card_template.md").render(
        own_text=None if is_draft else Markup(card.text.strip()),
        record=record,
        details=details,
        base_models=base_models,
        datasets=datasets,
        results=_results(record, details),
        classes=_classes(record.task),
        source=source,
        loading=details.how_to_load and Markup(details.how_to_load(source)),
        versions=_versions(),
    )
    card.text = f"\n{text}\n"
    card.save(path)


def _source(record: TrainingRecord) -> Markup:
    """The first arguments of `from_pretrained`, in Python."""
    source = markdown.literal(record.source)
    if record.revision:
        source += Markup(", revision=") + markdown.literal(record.revision)
    return source


def _drop_local_bases(data: Any) -> None:
    """A path is of no use to others. PEFT writes it into a tag as well."""
    data.base_model = [name for name in _listed(data.base_model) if not os.path.exists(name)]
    data.tags = [
        tag
        for tag in data.tags or []
        if not os.path.exists(tag.partition("base_model:adapter:")[2])
    ]


def _complete(data: Any, record: TrainingRecord, details: CardDetails) -> None:
    """Completes the metadata."""
    data.license = (details.license or data.license or "unknown").lower()
    if data.license not in LICENSES:
        data.license_name = re.sub(r"[^\w.-]+", "-", data.license)
        data.license = "other"
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = record.task or data.pipeline_tag
    bases = _hub_ids(details.base_model or data.base_model)
    data.base_model = (bases[0] if len(bases) == 1 else bases) or None
    data.datasets = _hub_ids(details.dataset) or _hub_ids(data.datasets) or None
    tags = ["amp_hf"]
    if record.is_perturbed:
        tags.append("adversarial-model-perturbation")
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    name = ", ".join(_listed(details.dataset or data.datasets)) or "unknown"
    data.model_name = record.name
    data.eval_results = [
        EvalResult(
            task_type=record.task or "other",
            dataset_type=name if markdown.is_hub_id(name) else "other",
            dataset_name=name,
            dataset_config=details.dataset_config,
            dataset_split=split,
            metric_type=metric,
            metric_name=_METRICS.get(metric, (metric, ""))[0],
            metric_value=value,
        )
        for split, metrics in record.results.items()
        for metric, value in _shown(metrics).items()
        if math.isfinite(value)
    ]
    data.metrics = sorted({result.metric_type for result in data.eval_results}) or None


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _hub_ids(names: Any) -> list[str]:
    """Without the names that make the Hub refuse a card: folders, for example."""
    return [name for name in _listed(names) if markdown.is_hub_id(name)]


# Metrics by name: what the table calls them, and how it shows them.
_METRICS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "nll": ("negative log-likelihood, nats", "{:.4f}"),
    "ece": ("expected calibration error, 15 bins", "{:.4f}"),
}


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """The known metrics first, and no loss beside `nll`: it is the same, or smoothed."""
    names = [name for name in [*_METRICS, *metrics] if name in metrics]
    return {name: metrics[name] for name in names if name != "loss" or "nll" not in metrics}


def _results(record: TrainingRecord, details: CardDetails) -> dict[str, Any] | None:
    """Head and rows of the table of results, which has a column for the model and one for ERM."""
    own = "AMP" if record.is_amp else "ERM"
    columns = {own: _cells(own, record.results, details)}
    if own == "AMP" and (details.baseline or "ERM" in details.flatness):
        columns["ERM"] = _cells("ERM", details.baseline or {}, details)
    if not columns[own]:
        return None
    return {
        "head": ["", *columns],
        "rows": [
            [row, *(cells.get(row, "") for cells in columns.values())] for row in columns[own]
        ],
        "flatness": details.flatness.get(own),
    }


def _cells(model: str, results: Results, details: CardDetails) -> dict[str, str]:
    """One column of the table, by the names of its rows."""
    cells = _metric_cells(results)
    scaled = _metric_cells(details.temperature_scaled.get(model, {}))
    cells |= {f"{row}, after temperature scaling": value for row, value in scaled.items()}
    flatness = details.flatness.get(model)
    if flatness is None:
        return cells
    top, trace, rise = flatness.top_eigenvalue, flatness.trace, flatness.random_rise
    converged = "" if top.converged else f" (not converged: ± {top.residual:.2g})"
    return cells | {
        f"rise of the loss, worst found within {flatness.radius:g} of the weights": (
            f"{flatness.worst_case_rise:.4f}"
        ),
        f"rise of the loss {flatness.scale:g} filter norms away, mean ± standard deviation of "
        f"{len(rise.values)} random directions": f"{rise.mean:.4f} ± {rise.std:.4f}",
        "largest eigenvalue of the Hessian": f"{top.value:.4g}{converged}",
        "trace of the Hessian, ± standard error": (
            f"{trace.mean:.4g} ± {trace.standard_error:.2g}"
        ),
    }


def _metric_cells(results: Results) -> dict[str, str]:
    cells = {}
    for split, metrics in results.items():
        for metric, value in _shown(metrics).items():
            label, form = _METRICS.get(metric, (metric, "{:.4g}"))
            cells[f"{split}: {label}"] = form.format(value)
    return cells


def _classes(task: str | None) -> dict[str, str] | None:
    """The classes of transformers that load a model of this task."""
    if task not in SUPPORTED_TASKS:
        return None
    supported: Any = SUPPORTED_TASKS[task]
    processors = {"image": "AutoImageProcessor", "text": "AutoTokenizer"}
    return {
        "processor": processors.get(supported["type"], "AutoProcessor"),
        "model": supported["pt"][0].__name__,
    }


def _versions() -> str:
    found = []
    for name in ("amp-hf", "torch", "transformers", "accelerate", "timm", "datasets", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _settings(title: str, values: dict[str, Any]) -> Markup:
    rows = ([markdown.code(name), markdown.code(value)] for name, value in values.items())
    return markdown.table([title, ""], rows)


def _history(evaluations: list[dict[str, Any]]) -> Markup:
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation)
    rows = ([_rounded(each.get(name, "")) for name in names] for each in evaluations)
    return markdown.table(names, rows)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _count(number: int) -> str:
    return f"{number:,}"


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # for Markdown, not for HTML: `finalize` escapes first
    finalize=markdown.escape,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_environment.globals |= {
    "count": _count,
    "duration": _duration,
    "history": _history,
    "links": markdown.links,
    "literal": markdown.literal,
    "settings": _settings,
    "table": markdown.table,
}
