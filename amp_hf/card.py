"""The model card: what AMP did to this model, with valid Hub metadata.

Plain data in, text out: `amp_hf.record` has what the Trainer knows, `CardDetails` the rest.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.modelcard import make_markdown_table
from transformers.pipelines import SUPPORTED_TASKS

from .flatness import Flatness
from .record import Results, TrainingRecord


@dataclass
class CardDetails:
    """What a card can show beyond what the Trainer knows: fill in `trainer.card_details`.

    Args:
        dataset: Hub id of the training set, or the name of what is not on the Hub.
        base_model: Hub id of the weights that training began with; `None` for none.
        license: one of the Hub's identifiers.
        baseline: results of the ERM baseline: the same training without perturbation.
        baseline_seconds: how long that training took.
        flatness: by model, "AMP" and "ERM", on the training set.
        pictures: file names in the output folder, by caption.
    """

    dataset: str | None = None
    base_model: str | None = None
    license: str | None = None
    baseline: Results | None = None
    baseline_seconds: float | None = None
    flatness: dict[str, Flatness] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


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

# Metrics by name: what the table calls them, and in what it shows them.
_METRICS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "nll": ("negative log-likelihood, nats", "{:.4f}"),
    "ece": ("expected calibration error, 15 bins", "{:.4f}"),
}


def write(path: Path, record: TrainingRecord, details: CardDetails) -> None:
    """Completes the card at `path`, which the Trainer or a subclass of it has written.

    Its metadata stay where nothing better is known, and so does its text, unless it is the stock
    Trainer's draft ("More information needed").
    """
    card = ModelCard.load(path)
    _describe(card.data, record, details)
    title = f"# {record.name}\n\n"
    own = "\n\n".join(_sections(card.data, record, details))
    text = title if "More information needed" in card.text else f"{card.text.strip()}\n\n"
    card.text = f"\n{text}{own}\n"
    card.save(path)


def _describe(data: Any, record: TrainingRecord, details: CardDetails) -> None:
    data.license = details.license or data.license or "unknown"
    if data.license not in LICENSES:
        data.license_name = re.sub(r"[^\w.-]+", "-", data.license.lower())
        data.license = "other"
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = record.task or data.pipeline_tag
    data.base_model = details.base_model or data.base_model
    if details.dataset and _is_hub_id(details.dataset):
        data.datasets = [details.dataset]
    tags = ["amp_hf"]
    if record.is_perturbed:
        tags.append("adversarial-model-perturbation")
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    name = details.dataset or ", ".join(_listed(data.datasets)) or "unknown"
    data.model_name = record.name
    data.eval_results = [
        EvalResult(
            task_type=record.task or "other",
            dataset_type=name if _is_hub_id(name) else "other",
            dataset_name=name,
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


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _sections(data: Any, record: TrainingRecord, details: CardDetails) -> list[str]:
    return [
        _introduction(data, record, details),
        *_results(record, details),
        *_pictures(details),
        *_how_to_use(record),
        _procedure(record),
        _cost(record, details),
        _versions(),
        _CITATION,
    ]


def _introduction(data: Any, record: TrainingRecord, details: CardDetails) -> str:
    base = _links(_listed(data.base_model), "")
    datasets = [details.dataset] if details.dataset else _listed(data.datasets)
    what = f"This model is {base}, fine-tuned" if base else "This model was trained"
    if datasets:
        what += f" on {_links(datasets, 'datasets/')}"
    if base or datasets:
        what += ","
    if record.amp_config.epsilon == 0:
        return f"{what} without any perturbation (`epsilon=0`)."
    if not record.is_perturbed:
        return (
            f"{what} without any perturbation: the settings below are those of Adversarial Model "
            "Perturbation, but no step that led to this model was perturbed."
        )
    return (
        f"{what} with Adversarial Model Perturbation (AMP; nothing to do with mixed precision)."
        "\n\nAMP takes the gradient of a step not at the weights, but where the loss is worst in a "
        "small ball around them. So training avoids sharp minima, in favour of flat ones, which "
        "tend to generalize better and to be better calibrated."
    )


def _links(names: list[str], where: str) -> str:
    return ", ".join(
        f"[{name}](https://huggingface.co/{where}{name})" if name.count("/") == 1 else f"`{name}`"
        for name in names
    )


def _results(record: TrainingRecord, details: CardDetails) -> list[str]:
    names = ["AMP", "ERM"] if record.amp_config.epsilon > 0 else ["ERM"]
    results = [record.results, details.baseline or {}]
    rows: list[list[str]] = []
    for split, metrics in record.results.items():
        for metric in _shown(metrics):
            label, form = _METRICS.get(metric, (metric, "{:.4f}"))
            values = [column.get(split, {}).get(metric) for column in results]
            cells = ["" if value is None else form.format(value) for value in values]
            rows.append([f"{split}: {label}", *cells[: 2 if details.baseline else 1]])
    found = [details.flatness[name] for name in names if name in details.flatness]
    for of_models in zip(*map(_flatness_cells, found)):
        rows.append([of_models[0][0], *(value for _, value in of_models)])
    if not rows:
        return []
    width = max(map(len, rows))
    lines = [["", *names[: width - 1]], ["---"] * width, *rows]
    table = "\n".join(f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines)
    text = "## Results\n\n" + table
    if details.baseline:
        text += (
            "\n\nERM (empirical risk minimization) is the same training with `epsilon=0`, from the "
            "same seed."
        )
    if found:
        text += (
            f"\n\nFlatness: of the loss on {found[0].samples:,} training samples, in evaluation "
            "mode; lower is flatter."
        )
    return [text]


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """In order, and without the loss where there is the likelihood: they differ in name only."""
    names = [name for name in [*_METRICS, *metrics] if name in metrics]
    return {name: metrics[name] for name in names if name != "loss" or "nll" not in metrics}


def _flatness_cells(flatness: Flatness) -> list[tuple[str, str]]:
    top, trace, rise = flatness.top_eigenvalue, flatness.trace, flatness.random_rise
    converged = "" if top.converged else f" (not converged: ± {top.residual:.2g})"
    return [
        (
            f"rise of the loss, worst found within {flatness.radius:g} of the weights",
            f"{flatness.worst_case_rise:.4f}",
        ),
        (
            f"rise of the loss {flatness.scale:g} filter norms away, mean ± standard deviation of "
            f"{len(rise.values)} random directions",
            f"{rise.mean:.4f} ± {rise.std:.4f}",
        ),
        ("largest eigenvalue of the Hessian", f"{top.value:.4g}{converged}"),
        (
            "trace of the Hessian, ± standard error",
            f"{trace.mean:.4g} ± {trace.standard_error:.2g}",
        ),
    ]


def _pictures(details: CardDetails) -> list[str]:
    return [f"![{caption}]({name})\n\n*{caption}*" for caption, name in details.pictures.items()]


def _how_to_use(record: TrainingRecord) -> list[str]:
    if record.task not in SUPPORTED_TASKS:
        return []
    task: Any = SUPPORTED_TASKS[record.task]
    model = task["pt"][0].__name__
    kinds = {"image": "AutoImageProcessor", "text": "AutoTokenizer"}
    processor = kinds.get(task["type"], "AutoProcessor")
    source = f'"{record.source}"'
    if record.revision:
        source += f', revision="{record.revision}"'
    model_source = source
    code = ""
    if record.has_code:
        model_source += ", trust_remote_code=True"
        code = ", by the code that lies beside it"
    return [
        f"""## How to use

It loads without amp_hf{code}:

```python
from transformers import pipeline

predict = pipeline("{record.task}", model={model_source})
```

or, with its parts in hand:

```python
from transformers import {", ".join(sorted([processor, model]))}

processor = {processor}.from_pretrained({source})
model = {model}.from_pretrained({model_source})
```"""
    ]


def _procedure(record: TrainingRecord) -> str:
    config = record.amp_config.to_dict() if record.amp_config.epsilon > 0 else {"epsilon": 0.0}
    text = "## Training\n\n| AMPConfig | |\n|---|---|\n" + _pairs(config)
    text += "\n\n| TrainingArguments | |\n|---|---|\n" + _pairs(record.arguments)
    if record.history:
        text += "\n\n" + make_markdown_table(record.history).strip()
    return text


def _pairs(values: dict[str, Any]) -> str:
    cells = ((name, str(value).replace("|", "\\|")) for name, value in values.items())
    return "\n".join(f"| `{name}` | `{value}` |" for name, value in cells)


def _cost(record: TrainingRecord, details: CardDetails) -> str:
    config = record.amp_config
    text = f"## Cost\n\n{record.ascent_steps:,} of {record.steps:,} steps had an ascent"
    if record.ascent_steps:
        count = f"{config.inner_steps} forward and backward passes"
        text += f", {'a further forward and backward pass' if config.inner_steps == 1 else count}"
        text += f" on {config.ascent_fraction:.0%} of the batch" * (config.ascent_fraction < 1)
    if record.perturbed_steps > record.ascent_steps:
        reused = record.perturbed_steps - record.ascent_steps
        text += (
            f"; {reused:,} more reused the last perturbation, but "
            "for the first after each checkpoint, which ascended anew"
        )
    text += "."
    if record.best_step is not None:
        text += f" The model is that of step {record.best_step:,}, the best that was evaluated."
    if record.delta_norm is not None:
        text += f" ‖Δ‖₂ was {record.delta_norm:.3g} on average."
    if record.seconds is not None:
        text += f" Training took {_duration(record.seconds)}"
        if details.baseline_seconds:
            ratio = record.seconds / details.baseline_seconds
            text += (
                f", {ratio:.2f} times what ERM took on the same machine "
                f"({_duration(details.baseline_seconds)})"
            )
        text += "."
    return text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds:.0f} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _versions() -> str:
    found = []
    for name in ("amp-hf", "torch", "transformers", "accelerate", "timm", "datasets", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return "## Versions\n\n" + ", ".join(found)


_CITATION = """## Citation

```bibtex
@inproceedings{zheng2021regularizing,
  title = {Regularizing Neural Networks via Adversarial Model Perturbation},
  author = {Zheng, Yaowei and Zhang, Richong and Mao, Yongyi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021},
  url = {https://arxiv.org/abs/2010.04925}
}
```"""
