"""`AMPTrainer`: the one place that knows the Trainer's step.

The Trainer calls `get_batch_samples` once an optimizer step, with all its micro-batches, and
`training_step` for each of them; clipping, the scaler, the optimizer and the scheduler follow.
AMP happens within `training_step`: every forward and backward pass goes through the parent's own,
and when it returns the parameters are θ to the bit and the gradient at θ + Δ has been accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .checks import check_engine
from .config import AMPConfig
from .configured import ConfiguredMixin
from .hub import HubMixin
from .parameters import check_no_hooks, check_perturbable
from .passes import ParentPasses
from .step import PerturbedStep


class AMPTrainerMixin(ConfiguredMixin, HubMixin):
    """Trains with Adversarial Model Perturbation. Mix it into any subclass of `Trainer`, in front:

        class AMPSFTTrainer(AMPTrainerMixin, SFTTrainer): ...

    Args:
        amp_config: the perturbation; `None` is `AMPConfig()`. With `epsilon=0` the trainer is its
            parent, bit for bit. `trainer.amp_config` may be replaced between two steps, by a
            callback that follows a schedule, say; `scope` and `perturb` stay for the whole run.

    Every other argument is the parent's. The logged `loss` is the clean one, at θ. Beside it stand
    `amp/loss` (at θ + Δ), `amp/sharpness` (their difference) and `amp/delta_norm` (‖Δ‖₂), each the
    mean over the steps with an ascent since the last log. Where `ascent_reuse` perturbs a step that
    has none, there is no pass at θ: its part of `loss` and of BatchNorm's statistics is from θ + Δ.

    `create_model_card`, and so every push, writes down what was done and what came of it; what only
    the script knows goes into `evidence` (`amp_hf.card.Evidence`).

    Raises:
        ValueError: an engine, optimizer, parameter type or `perturb` that AMP would be wrong with.
    """

    model: Any  # the Trainer's own

    def __init__(self, *args: Any, amp_config: AMPConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(amp_config, AMPConfig | None):
            raise ValueError(f"amp_config must be an AMPConfig or None, got {amp_config!r}.")
        self.amp_config = amp_config or AMPConfig()
        parent = ParentPasses(self, super().training_step, super().get_batch_samples)
        self._step = PerturbedStep(self, parent)
        super().__init__(*args, **kwargs)
        if self.amp_config.epsilon > 0:
            check_engine(self.amp_config, self.accelerator, self.args, self.model)
            check_perturbable(self.model, self.amp_config.perturb)
            check_no_hooks(self.model)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._step.end_run()

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        window, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step.begin_window(window)
        return window, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """One micro-batch: accumulates its gradient at θ + Δ; the parameters end as θ.

        Returns:
            The parent's loss at θ, 0-dimensional.
        """
        return self._step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The training's own log, which alone has a `start_time`, comes on all ranks together.
        if "loss" in logs and start_time is not None and self._step.run.state is self.state:
            means = self._step.means.take()
            if means is not None:
                means = self.accelerator.reduce(means, reduction="mean")
                logs |= zip(("amp/loss", "amp/sharpness", "amp/delta_norm"), means.tolist())
        super().log(logs, start_time)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The parent's. Saves θ, also where a signal handler calls it in the middle of a step."""
        with self._step.at_theta():
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Δ is in no checkpoint: the next step ascends anew, as the first one after resuming does.
        self._step.run.reusable = None
        super()._save_checkpoint(*args, **kwargs)


class AMPTrainer(AMPTrainerMixin, Trainer):
    """`transformers.Trainer` with Adversarial Model Perturbation: see `AMPTrainerMixin`."""
