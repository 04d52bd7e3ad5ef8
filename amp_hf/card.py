"""The model card: what AMP did to this model, with valid Hub metadata.

Plain data in, text out; `amp_hf.hub` collects the data from a trainer.
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

from .config import AMPConfig
from .flatness import Flatness

Results = dict[str, dict[str, float]]  # by split ("test"), by metric ("accuracy")


@dataclass
class Evidence:
    """What a card can show beyond what the Trainer knows: fill in `trainer.evidence`.

    Args:
        dataset: Hub id of the training set, or the name of what is not on the Hub.
        base_model: Hub id of the weights that training began with; `None` for none.
        license: one of the Hub's identifiers.
        twin: results of the same training without perturbation.
        twin_seconds: what that took.
        flatness: by model, "AMP" and "ERM", on the training set.
        pictures: file names in the output folder, by caption.
    """

    dataset: str | None = None
    base_model: str | None = None
    license: str | None = None
    twin: Results | None = None
    twin_seconds: float | None = None
    flatness: dict[str, Flatness] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """What the Trainer knows at the end of a training.

    Args:
        source: the Hub repository, or the folder, that the model is loaded from.
        revision: the repository's branch, if it is not the main one.
        brings_code: whether it is loaded by code that lies beside it.
        task: the Hub's name of it, `None` where the model is of no known one.
        steps: optimizer steps; `ascending` of them had ascents, `perturbed` an ascent or a Δ, not
            counting what checkpoints in between change.
        best_step: the optimizer step whose model was loaded in the end, if it was not the last's.
        is_perturbed: whether a step that led to this model was, by a Δ other than 0.
        delta_norm: ‖Δ‖₂, the mean of what was logged of it, if that was.
        seconds: what the steps took, if that was measured of all of them.
        history: what was evaluated in the course of the training, one mapping an evaluation.
    """

    source: str
    revision: str | None
    brings_code: bool
    name: str
    task: str | None
    amp_config: AMPConfig
    arguments: dict[str, Any]
    steps: int
    ascending: int
    perturbed: int
    best_step: int | None
    is_perturbed: bool
    delta_norm: float | None
    seconds: float | None
    results: Results
    history: list[dict[str, Any]]


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


def write(path: Path, training: Training, evidence: Evidence) -> None:
    """Completes the card at `path`, which the Trainer or a subclass of it has written.

    Its metadata stay where nothing better is known, and so does its text, unless it is the stock
    Trainer's draft ("More information needed").
    """
    card = ModelCard.load(path)
    _describe(card.data, training, evidence)
    title = f"# {training.name}\n\n"
    own = "\n\n".join(_sections(card.data, training, evidence))
    text = title if "More information needed" in card.text else f"{card.text.strip()}\n\n"
    card.text = f"\n{text}{own}\n"
    card.save(path)


def _describe(data: Any, training: Training, evidence: Evidence) -> None:
    data.license = evidence.license or data.license or "unknown"
    if data.license not in LICENSES:
        data.license_name = re.sub(r"[^\w.-]+", "-", data.license.lower())
        data.license = "other"
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = training.task or data.pipeline_tag
    data.base_model = evidence.base_model or data.base_model
    if evidence.dataset and _is_hub_id(evidence.dataset):
        data.datasets = [evidence.dataset]
    tags = ["amp_hf"]
    if training.is_perturbed:
        tags.append("adversarial-model-perturbation")
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    name = evidence.dataset or ", ".join(_listed(data.datasets)) or "unknown"
    data.model_name = training.name
    data.eval_results = [
        EvalResult(
            task_type=training.task or "other",
            dataset_type=name if _is_hub_id(name) else "other",
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_name=_METRICS.get(metric, (metric, ""))[0],
            metric_value=value,
        )
        for split, metrics in training.results.items()
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


def _sections(data: Any, training: Training, evidence: Evidence) -> list[str]:
    return [
        _introduction(data, training, evidence),
        *_results(training, evidence),
        *_pictures(evidence),
        *_how_to_use(training),
        _procedure(training),
        _cost(training, evidence),
        _versions(),
        _CITATION,
    ]


def _introduction(data: Any, training: Training, evidence: Evidence) -> str:
    base = _links(_listed(data.base_model), "")
    datasets = [evidence.dataset] if evidence.dataset else _listed(data.datasets)
    what = f"This model is {base}, fine-tuned" if base else "This model was trained"
    if datasets:
        what += f" on {_links(datasets, 'datasets/')}"
    if base or datasets:
        what += ","
    if training.amp_config.epsilon == 0:
        return f"{what} without any perturbation (`epsilon=0`)."
    if not training.is_perturbed:
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


def _results(training: Training, evidence: Evidence) -> list[str]:
    names = ["AMP", "ERM"] if training.amp_config.epsilon > 0 else ["ERM"]
    results = [training.results, evidence.twin or {}]
    rows: list[list[str]] = []
    for split, metrics in training.results.items():
        for metric in _shown(metrics):
            label, form = _METRICS.get(metric, (metric, "{:.4f}"))
            values = [column.get(split, {}).get(metric) for column in results]
            cells = ["" if value is None else form.format(value) for value in values]
            rows.append([f"{split}: {label}", *cells[: 2 if evidence.twin else 1]])
    found = [evidence.flatness[name] for name in names if name in evidence.flatness]
    for of_models in zip(*map(_flatness_cells, found)):
        rows.append([of_models[0][0], *(value for _, value in of_models)])
    if not rows:
        return []
    width = max(map(len, rows))
    lines = [["", *names[: width - 1]], ["---"] * width, *rows]
    table = "\n".join(f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines)
    text = "## Results\n\n" + table
    if evidence.twin:
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


def _pictures(evidence: Evidence) -> list[str]:
    return [f"![{caption}]({name})\n\n*{caption}*" for caption, name in evidence.pictures.items()]


def _how_to_use(training: Training) -> list[str]:
    if training.task not in SUPPORTED_TASKS:
        return []
    task: Any = SUPPORTED_TASKS[training.task]
    model = task["pt"][0].__name__
    kinds = {"image": "AutoImageProcessor", "text": "AutoTokenizer"}
    processor = kinds.get(task["type"], "AutoProcessor")
    source = f'"{training.source}"'
    if training.revision:
        source += f', revision="{training.revision}"'
    model_source = source
    code = ""
    if training.brings_code:
        model_source += ", trust_remote_code=True"
        code = ", by the code that lies beside it"
    return [
        f"""## How to use

It loads without amp_hf{code}:

```python
from transformers import pipeline

predict = pipeline("{training.task}", model={model_source})
```

or, with its parts in hand:

```python
from transformers import {", ".join(sorted([processor, model]))}

processor = {processor}.from_pretrained({source})
model = {model}.from_pretrained({model_source})
```"""
    ]


def _procedure(training: Training) -> str:
    config = training.amp_config.to_dict() if training.amp_config.epsilon > 0 else {"epsilon": 0.0}
    text = "## Training\n\n| AMPConfig | |\n|---|---|\n" + _pairs(config)
    text += "\n\n| TrainingArguments | |\n|---|---|\n" + _pairs(training.arguments)
    if training.history:
        text += "\n\n" + make_markdown_table(training.history).strip()
    return text


def _pairs(values: dict[str, Any]) -> str:
    cells = ((name, str(value).replace("|", "\\|")) for name, value in values.items())
    return "\n".join(f"| `{name}` | `{value}` |" for name, value in cells)


def _cost(training: Training, evidence: Evidence) -> str:
    config = training.amp_config
    text = f"## Cost\n\n{training.ascending:,} of {training.steps:,} steps had an ascent"
    if training.ascending:
        count = f"{config.inner_steps} forward and backward passes"
        text += f", {'a further forward and backward pass' if config.inner_steps == 1 else count}"
        text += f" on {config.ascent_fraction:.0%} of the batch" * (config.ascent_fraction < 1)
    if training.perturbed > training.ascending:
        text += (
            f"; {training.perturbed - training.ascending:,} more reused the last perturbation, but "
            "for the first after each checkpoint, which ascended anew"
        )
    text += "."
    if training.best_step is not None:
        text += f" The model is that of step {training.best_step:,}, the best that was evaluated."
    if training.delta_norm is not None:
        text += f" ‖Δ‖₂ was {training.delta_norm:.3g} on average."
    if training.seconds is not None:
        text += f" Training took {_duration(training.seconds)}"
        if evidence.twin_seconds:
            ratio = training.seconds / evidence.twin_seconds
            text += (
                f", {ratio:.2f} times what ERM took on the same machine "
                f"({_duration(evidence.twin_seconds)})"
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
