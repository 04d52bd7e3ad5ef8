"""`AMPTrainer`: the Trainer's overrides, and nothing else. What a step does is in step.py.

The Trainer calls `get_batch_samples` once for each optimizer step, with all its micro-batches, and
`training_step` for each of them; clipping, the scaler, the optimizer and the scheduler follow.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from .card import CardDetails, write
from .checks import check_trainer
from .config import AMP_CONFIG_NAME, AMPConfig
from .parameters import check_no_hooks
from .passes import ParentPasses
from .record import TrainingRecord, warn_if_never_perturbed, warn_of_changes
from .step import PerturbedStep
from .trackers import ShowConfig

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class AMPTrainerMixin(_Parent):
    """Trains with Adversarial Model Perturbation. Mix it into any subclass of `Trainer`, in front:

        class AMPSFTTrainer(AMPTrainerMixin, SFTTrainer): ...

    Args:
        amp_config: the perturbation; `None` is `AMPConfig()`. With `epsilon=0` the trainer is its
            parent, bit for bit. `trainer.amp_config` may be replaced between two steps, by a
            callback that follows a schedule, say; a new `scope` or `perturb` holds from the next
            `train()` on.

    Every other argument is the parent's. The logged `loss` is the clean one, at θ. Beside it stand
    `amp/loss` (at θ + Δ), `amp/sharpness` (their difference) and `amp/delta_norm` (‖Δ‖₂), each the
    mean over the steps with an ascent since the last log. Where `ascent_reuse` perturbs a step that
    has none, there is no pass at θ: its part of `loss` and of BatchNorm's statistics is from θ + Δ.

    `create_model_card`, and so `push_to_hub`, writes down what was done and what came of it; what
    only the script knows goes into `card_details` (`amp_hf.card.CardDetails`).

    Raises:
        ValueError: an engine, optimizer, parameter type or `perturb` that AMP would be wrong with,
            or an `amp_config` that is not an `AMPConfig`.
        TypeError: the mixin stands behind its Trainer.
    """

    model: Any  # the Trainer's own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(AMPTrainerMixin):
            raise TypeError(
                f"{cls.__name__} names AMPTrainerMixin behind its Trainer, where it does nothing: "
                f"write class {cls.__name__}(AMPTrainerMixin, ...)."
            )

    def __init__(self, *args: Any, amp_config: AMPConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(self, Trainer):
            raise ValueError(
                f"AMPTrainerMixin goes in front of a transformers.Trainer, and "
                f"{type(self).__name__} is not one: mix it into the Trainer that it works with."
            )
        if not isinstance(amp_config, AMPConfig | None):
            raise ValueError(f"amp_config must be an AMPConfig or None, got {amp_config!r}.")
        self.amp_config = amp_config or AMPConfig()
        self.card_details = CardDetails()
        self.resumed = False  # if so, `train_runtime` covers a part only
        self._amp_step = PerturbedStep(self, ParentPasses(self, AMPTrainerMixin))
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, ShowConfig(self))
        if self.amp_config.epsilon != 0:
            check_trainer(self, self.amp_config)
            check_no_hooks(self.model)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        self.resumed = bool(resume_from_checkpoint)
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            warn_of_changes(self.amp_config, folder)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._amp_step.end_run()
            ShowConfig.end(self.args)
        took_steps = self._amp_step.run.state is self.state
        warn_if_never_perturbed(self.amp_config, self.state, took_steps)
        return result

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        window, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._amp_step.begin_window(window)
        return window, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch: accumulates its gradient at θ + Δ; the parameters end as θ.

        Returns:
            The parent's loss at θ, 0-dimensional; at θ + Δ where an earlier Δ is reused.
        """
        return self._amp_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The training's own log, which alone has a `start_time`, comes on all ranks together.
        if "loss" in logs and start_time is not None and self._amp_step.run.state is self.state:
            means = self._amp_step.means.take()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs |= zip(("amp/loss", "amp/sharpness", "amp/delta_norm"), means.tolist())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's. Saves θ, also where a signal handler calls it in the middle of a step.

        `amp_config.json` lies beside the weights, once they are written.
        """
        pushes = self.args.push_to_hub and not _internal_call
        with self._amp_step.at_theta():
            # Without the parent's push, which comes below, with the file.
            super().save_model(output_dir, _internal_call=_internal_call or pushes)
        if self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            os.makedirs(folder, exist_ok=True)
            self.amp_config.to_json_file(os.path.join(folder, AMP_CONFIG_NAME))
        if pushes:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._amp_step.before_checkpoint()
        super()._save_checkpoint(*args, **kwargs)

    def _tune_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._amp_step.before_checkpoint()
        super()._tune_save_checkpoint(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md into the output folder: the parent's card, completed by `card.write`.

        It is about the last `train()`. Results are those that `evaluate` logged last for each
        prefix, for example `test` after `trainer.evaluate(dataset, metric_key_prefix="test")`;
        `card_details` adds what only the script knows.
        """
        if not hasattr(self.model, "config"):  # where the parent looks for a base model
            kwargs.setdefault("finetuned_from", "")
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            known = {name: given.get(name) for name in ("model_name", "tasks")}
            record = TrainingRecord.of(self, self.amp_config, **known)
            details = self.card_details
            # Beside tags, which the parent's card has by now, `dataset` is a name to show only.
            if details.dataset is None and not given.get("dataset_tags"):
                details = dataclasses.replace(details, dataset=given.get("dataset"))
            write(path, record, details)

    def hyperparameter_search(
        self, hp_space: Callable[[Any], dict[str, Any]] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The parent's; with Optuna, what `hp_space` returns may hold fields of `AMPConfig`, too.

        A field that the trial does not choose is that of `amp_config`, which comes back in the end:
        `trainer.amp_config = dataclasses.replace(trainer.amp_config, epsilon=…)` keeps what was
        found.
        """
        before = self.amp_config
        names = before.to_dict().keys()

        def space(trial: Any) -> dict[str, Any]:
            assert hp_space is not None
            chosen = hp_space(trial)
            own = {name: value for name, value in chosen.items() if name in names}
            self.amp_config = dataclasses.replace(before, **own)
            return {name: value for name, value in chosen.items() if name not in own}

        try:
            return super().hyperparameter_search(hp_space and space, *args, **kwargs)
        finally:
            self.amp_config = before


class AMPTrainer(AMPTrainerMixin, Trainer):
    """`transformers.Trainer` with Adversarial Model Perturbation: see `AMPTrainerMixin`."""
