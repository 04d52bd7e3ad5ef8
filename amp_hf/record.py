"""What a Trainer knows about a run once it is over: the facts of the model card."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.modelcard import (
    TrainingSummary,
    extract_hyperparameters_from_trainer,
    parse_log_history,
)

from .config import AMP_CONFIG_NAME, AMPConfig
from .progress import Progress

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]  # by split ("test"), by metric ("accuracy")


@dataclass(frozen=True)
class TrainingRecord:
    """One training run and the model that it led to.

    Args:
        name: the model's.
        task: the Hub's name for what the model does; `None` where its class does not tell.
        source: the Hub repository, or else the folder, that the model is loaded from.
        revision: the branch of that repository; `None` is the main one.
        has_code: whether loading the model runs code that lies beside its weights.
        arguments: the `TrainingArguments` that shape the result, by name.
        steps: optimizer steps taken.
        ascent_steps: those that computed a perturbation.
        perturbed_steps: those that computed a perturbation or reused one.
        best_step: the step whose model was loaded at the end; `None` if it is the last step's.
        is_perturbed: whether any step of this run that led to the model was perturbed, by a Δ other
            than 0.
        delta_norm: the mean of the logged `amp/delta_norm`; `None` where none was logged.
        seconds: how long the training took; `None` where it was resumed, and so timed only in part.
        results: what was measured last on each split.
        history: the evaluations in the course of the training, in order.
    """

    name: str
    task: str | None
    source: str
    revision: str | None
    has_code: bool
    amp_config: AMPConfig
    arguments: dict[str, Any]
    steps: int
    ascent_steps: int
    perturbed_steps: int
    best_step: int | None
    is_perturbed: bool
    delta_norm: float | None
    seconds: float | None
    results: Results
    history: list[dict[str, Any]]

    @property
    def is_amp(self) -> bool:
        """Whether AMP was asked for; a schedule may have ended at ε = 0."""
        return self.is_perturbed or self.amp_config.epsilon != 0

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        config: AMPConfig,
        model_name: str | None = None,
        tasks: str | list[str] | None = None,
    ) -> TrainingRecord:
        """What `trainer` knows now; `model_name` and `tasks` as `create_model_card` takes them."""
        args, state = trainer.args, trainer.state
        name = model_name or Path(str(args.output_dir)).absolute().name
        # With a base model, the summary would ask the Hub for its license.
        tasks = TrainingSummary.from_trainer(trainer, finetuned_from="", tasks=tasks).tasks
        best = _best_step(trainer)
        progress, norms = Progress.of(state), _delta_norms(state)
        first = progress.first
        return cls(
            name=name,
            task=next(iter(tasks), None) if isinstance(tasks, list) else tasks,
            source=trainer.hub_model_id or str(args.output_dir),
            revision=args.hub_revision if trainer.hub_model_id else None,
            has_code=getattr(trainer.model, "_auto_class", None) is not None,
            amp_config=config,
            arguments=_arguments(trainer),
            steps=state.global_step,
            ascent_steps=progress.ascent_steps,
            perturbed_steps=progress.perturbed_steps,
            best_step=best,
            is_perturbed=first is not None
            and (best is None or first < best)
            and (any(norms) or not norms),
            delta_norm=sum(norms) / len(norms) if norms else None,
            seconds=_seconds(trainer),
            results=results_of(trainer),
            history=_history(state),
        )


def _history(state: TrainerState) -> list[dict[str, Any]]:
    logs = [dict(log) for log in state.log_history]
    for log in logs:
        if not _ends_training(log):  # where the parser would stop
            log.pop("train_runtime", None)
    return parse_log_history(logs)[1] or []


def _arguments(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    arguments = extract_hyperparameters_from_trainer(trainer)
    arguments.pop("mixed_precision_training", None)  # it says "Native AMP", of all names
    for name in ("train_batch_size", "total_train_batch_size"):
        if name in arguments:
            arguments[name] = arguments[name] * batch_size(trainer) // args.train_batch_size
    arguments |= _optimizer(trainer) | {"max_grad_norm": args.max_grad_norm}
    return arguments | {name: True for name in ("bf16", "fp16") if getattr(args, name)}


def batch_size(trainer: Any) -> int:
    """That of a device in the last training: `auto_find_batch_size` may have halved it."""
    return trainer._train_batch_size


def _optimizer(trainer: Any) -> dict[str, Any]:
    """Of its first group: `TrainingArguments` knows nothing of one that the script has made."""
    made = trainer.optimizer
    while hasattr(made, "optimizer"):  # in wrappers of Accelerate and DeepSpeed
        made = made.optimizer
    if made is None:
        return {}
    first = made.param_groups[0]
    found = {"learning_rate": first.get("initial_lr", first["lr"])}  # before the scheduler
    if "weight_decay" in first:
        found["weight_decay"] = first["weight_decay"]
    others = first.keys() - {"params", "param_names", "lr", "initial_lr", "weight_decay"}
    plain = [name for name in sorted(others) if isinstance(first[name], str | int | float | tuple)]
    shown = ", ".join(f"{name}={first[name]}" for name in plain if first[name])
    name = type(made).__name__
    return found | {"optimizer": f"{name}({shown})" if shown else name}


def _seconds(trainer: Any) -> float | None:
    times = [log["train_runtime"] for log in trainer.state.log_history if _ends_training(log)]
    return times[-1] if times and not trainer.resumed else None


def _delta_norms(state: TrainerState) -> list[float]:
    """Every logged ‖Δ‖₂, each the mean over the ascents since the log before."""
    return [log["amp/delta_norm"] for log in state.log_history if "amp/delta_norm" in log]


def _best_step(trainer: Trainer) -> int | None:
    """The optimizer step whose model `load_best_model_at_end` loaded; `None` if it loaded none."""
    state = trainer.state
    ended = any(map(_ends_training, state.log_history))
    loads = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    return state.best_global_step if ended and loads else None


def results_of(trainer: Trainer) -> Results:
    """The last evaluation of the model as it is now, for each prefix that `evaluate` was given."""
    results: Results = {}
    best = _best_step(trainer)
    ended = False
    for entry in trainer.state.log_history:
        ended = ended or _ends_training(entry)
        is_of_another = best is not None and not ended and entry.get("step") != best
        # The training's own logs may have a `train_runtime`, too.
        if is_of_another or _ends_training(entry) or "loss" in entry:
            continue
        for split in (key.removesuffix("_runtime") for key in entry if key.endswith("_runtime")):
            speed = {f"{split}_{name}" for name in _SPEED}
            results[split] = {
                key.removeprefix(f"{split}_"): value
                for key, value in entry.items()
                if key.startswith(f"{split}_")
                and key not in speed
                and isinstance(value, int | float)
            }
    return results


def _ends_training(log: dict[str, Any]) -> bool:
    """An evaluation of the training set may have a `train_runtime` as well."""
    return "total_flos" in log


_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def warn_if_never_perturbed(config: AMPConfig, state: TrainerState, took_steps: bool) -> None:
    """Says so where a run that should have been perturbed was not.

    Args:
        took_steps: whether AMP took the steps of this run, plain or perturbed.
    """
    if config.epsilon == 0 or state.global_step == 0 or Progress.of(state).first is not None:
        return
    steps = range(state.global_step)
    if not any(config.perturbs_at(step, state.max_steps) for step in steps):
        logger.warning(
            f"Training ended at step {state.global_step} of {state.max_steps}, before the first "
            f"perturbed one: AMPConfig.ascent_start={config.ascent_start:g}. Where it may end "
            "early, use a smaller one."
        )
    elif config.epsilon is not None or not took_steps:
        logger.warning(
            "No step was perturbed: those that AMPConfig chooses were taken before this run was "
            "resumed, or a subclass overrides training_step and does not call "
            "super().training_step."
        )
    else:
        logger.warning(
            "No step was perturbed, so this run equals the stock Trainer's: AMPConfig() perturbs "
            "only after 20 % of the steps and once the loss has fallen far enough (the fewer the "
            "epochs, the further). AMPConfig(epsilon=…) perturbs in any case."
        )


def warn_of_changes(config: AMPConfig, checkpoint: str) -> None:
    """Warns where `checkpoint` was trained with another config."""
    path = os.path.join(checkpoint, AMP_CONFIG_NAME)
    if os.path.isfile(path) and (changes := config.changes_since(path)):
        logger.warning(
            f"Resuming {checkpoint} with another AMPConfig than at its last step: "
            f"{'; '.join(changes)}."
        )
