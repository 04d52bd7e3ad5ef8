"""The model card: what the Trainer knows of it, and when it is written."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerState
from transformers.modelcard import (
    TrainingSummary,
    extract_hyperparameters_from_trainer,
    parse_log_history,
)
from transformers.training_args import OptimizerNames

from .card import Evidence, Results, Training, write
from .config import AMPConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class HubMixin(_Parent):
    """The part of `AMPTrainerMixin` that writes the model card."""

    amp_config: AMPConfig
    evidence: Evidence  # for the card
    _timed: bool  # whether the Trainer's time is that of the whole training

    # The Trainer's own.
    hub_model_id: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.evidence = Evidence()
        self._timed = True
        super().__init__(*args, **kwargs)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._timed = not resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder: the parent's card, completed by `card.write`.

        Results are those that `evaluate` logged last for each prefix, for example `test` after
        `trainer.evaluate(dataset, metric_key_prefix="test")`; the rest is in `evidence`.
        """
        if not hasattr(self.model, "config"):  # where the parent looks for a base model
            kwargs.setdefault("finetuned_from", "")
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            known = {name: kwargs.get(name) for name in ("model_name", "tasks")}
            evidence = self.evidence
            if evidence.dataset is None and isinstance(dataset := kwargs.get("dataset"), str):
                evidence = replace(evidence, dataset=dataset)
            write(path, self._training(**known), evidence)

    def _training(self, **known: Any) -> Training:
        state, config = self.state, self.amp_config
        steps = range(state.global_step)
        # With a base model, it would ask the Hub for its license, which the parent's card has.
        summary = TrainingSummary.from_trainer(self, finetuned_from="", **known)
        task = summary.tasks[0] if isinstance(summary.tasks, list) else summary.tasks
        arguments = extract_hyperparameters_from_trainer(self)
        arguments.pop("mixed_precision_training", None)  # "Native AMP", of all names
        optimizer = OptimizerNames(self.args.optim).value
        arguments["optimizer"] = f"{optimizer} {self.args.optim_args or ''}".strip()
        names = ["weight_decay", "max_grad_norm"]
        if "adam" in optimizer:
            names += ["adam_beta1", "adam_beta2", "adam_epsilon"]
        arguments |= {name: getattr(self.args, name) for name in names}
        arguments |= {name: True for name in ("bf16", "fp16") if getattr(self.args, name)}
        seconds = [log["train_runtime"] for log in state.log_history if "train_runtime" in log]
        norms = delta_norms(state)
        best = best_step(self)
        leading = steps if best is None else range(best)
        perturbed = any(config.perturbs_at(step, state.max_steps) for step in leading)
        return Training(
            source=self.hub_model_id or str(self.args.output_dir),
            revision=self.args.hub_revision if self.hub_model_id else None,
            brings_code=getattr(self.model, "_auto_class", None) is not None,
            name=summary.model_name,
            task=task,
            amp_config=config,
            arguments=arguments,
            steps=len(steps),
            ascending=sum(config.ascends_at(step, state.max_steps) for step in steps),
            perturbed=sum(config.perturbs_at(step, state.max_steps) for step in steps),
            best_step=best,
            is_perturbed=perturbed and (any(norms) or not norms),
            delta_norm=sum(norms) / len(norms) if norms else None,
            seconds=seconds[-1] if seconds and self._timed else None,
            results=results_of(self),
            history=parse_log_history(state.log_history)[1] or [],
        )


def delta_norms(state: TrainerState) -> list[float]:
    """‖Δ‖₂, one value a log that has it: the mean over the ascents since the last."""
    return [log["amp/delta_norm"] for log in state.log_history if "amp/delta_norm" in log]


def best_step(trainer: Trainer) -> int | None:
    """The optimizer step whose model `load_best_model_at_end` has loaded, if it has."""
    state = trainer.state
    ended = any("train_runtime" in log for log in state.log_history)
    loads = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if ended and loads else None


def results_of(trainer: Trainer) -> Results:
    """What `evaluate` logged last of the model as it is, by the prefix of its metrics."""
    results: Results = {}
    best = best_step(trainer)
    ended = False
    for entry in trainer.state.log_history:
        ended = ended or "train_runtime" in entry
        if best is not None and not ended and entry.get("step") != best:
            continue
        for split in (key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")):
            if split != "train":
                speed = {f"{split}_{name}" for name in _SPEED}
                results[split] = {
                    key.removeprefix(f"{split}_"): value
                    for key, value in entry.items()
                    if key.startswith(f"{split}_")
                    and key not in speed
                    and isinstance(value, int | float)
                }
    return results


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
