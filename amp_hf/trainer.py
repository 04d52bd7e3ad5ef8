"""`AMPTrainer`: the one place that knows the Trainer's step.

The Trainer calls `get_batch_samples` once an optimizer step, with all its micro-batches, and
`training_step` for each of them; clipping, the scaler, the optimizer and the scheduler follow.
AMP happens within `training_step`: every forward and backward pass goes through the parent's own,
and when it returns the parameters are θ to the bit and the gradient at θ + Δ has been accumulated.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_batch_size, recursively_apply
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from .config import AMPConfig
from .engine import loss_scale, resolve_scope, unsynchronized
from .parameters import perturbed_parameters
from .perturbation import Perturbation, joint_empty_like
from .statistics import norm_buffers, preserved_buffers, preserved_rng

logger = logging.getLogger(__name__)

AMP_CONFIG_NAME = "amp_config.json"

if TYPE_CHECKING:
    _Parent = Trainer
else:
    _Parent = object


class AMPTrainerMixin(_Parent):
    """Trains with Adversarial Model Perturbation. Mix it into any subclass of `Trainer`, in front:

        class AMPSFTTrainer(AMPTrainerMixin, SFTTrainer): ...

    Args:
        amp_config: the perturbation; `None` is `AMPConfig()`. With `epsilon=0` the trainer is its
            parent, bit for bit.

    Every other argument is the parent's. The logged `loss` is the clean one, at θ. Beside it stand
    `amp/loss` (at θ + Δ), `amp/sharpness` (their difference) and `amp/delta_norm` (‖Δ‖₂), each the
    mean over the perturbed steps since the last log.

    Raises:
        ValueError: an engine, optimizer, parameter type or `perturb` that AMP would be wrong with.
    """

    # The micro-batches of this optimizer step, and its Δ as far as it is computed.
    _window: list
    _perturbation: Perturbation
    _delta_norm: Tensor
    _clean_losses: list[Tensor]  # at θ, of the micro-batches that Δ holds for and that are to come

    # Sums over the perturbed steps of a run since its last log.
    _statistics_of: TrainerState
    _sums: Tensor | float
    _perturbed_steps: float

    # Of the model `_found_in`, frozen parameters included.
    _found_in: nn.Module | None
    _parameters: list[nn.Parameter]
    _perturbed: list[nn.Parameter]
    _norm_buffers: list[Tensor]
    _memory: dict[nn.Parameter, Tensor]  # the ascent's gradient, then Δ, then θ

    # The Trainer's own.
    model: Any
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, amp_config: AMPConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(amp_config, AMPConfig | None):
            raise ValueError(f"amp_config must be an AMPConfig or None, got {amp_config!r}.")
        self.amp_config = amp_config or AMPConfig()
        self._found_in = None
        self._start_window([])
        super().__init__(*args, **kwargs)
        self._start_statistics()
        if self.amp_config.epsilon > 0:
            resolve_scope(self.amp_config, self.accelerator, self.args)
            self._find_parameters()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint:
            self._compare_with_checkpoint(resume_from_checkpoint)
        self._found_in = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._perturbation.restore()  # where an interrupt hit the one in training_step
            self._start_window([])
            self._memory = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        window, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._start_window(window)
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
        if not self.amp_config.ascends_at(self.state.global_step, self.state.max_steps):
            return super().training_step(model, inputs, num_items_in_batch)
        try:
            if self._clean_losses:
                self._perturbation.enter()
            else:
                self._ascend(model, inputs, num_items_in_batch)
            with self._norm_stats_kept():
                loss = super().training_step(model, inputs, num_items_in_batch)
            clean_loss = self._clean_losses.pop(0)
            if self._clean_losses:
                self._perturbation.leave()
        finally:
            self._perturbation.restore()
        if self._statistics_of is not self.state:  # a new run, or a smaller batch size is tried
            self._start_statistics()
        share = 1 / max(1, len(self._window))
        self._perturbed_steps += share
        self._sums = self._sums + torch.stack(
            [loss, loss - clean_loss, (self._delta_norm * share).to(loss.dtype)]
        )
        return clean_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._perturbed_steps:
            means = self.accelerator.reduce(self._sums / self._perturbed_steps, reduction="mean")
            logs |= zip(("amp/loss", "amp/sharpness", "amp/delta_norm"), means.tolist())
            self._start_statistics()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        # Before the parent's part, which may push the folder to the Hub.
        if self.args.should_save:
            folder = str(output_dir or self.args.output_dir)
            os.makedirs(folder, exist_ok=True)
            self.amp_config.to_json_file(os.path.join(folder, AMP_CONFIG_NAME))
        super().save_model(output_dir, *args, **kwargs)

    def _ascend(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> None:
        """All ascents: Δ from `inputs` or the whole window, and the parameters to θ + Δ.

        Leaves in `_clean_losses` the losses at θ of the micro-batches that Δ was computed on.
        """
        config = self.amp_config
        scope = resolve_scope(config, self.accelerator, self.args)
        batches = self._window if scope == "batch" and self._window else [inputs]
        alone = len(batches) < len(self._window)

        # On its own, a micro-batch is a whole batch to the Trainer: Δ must not see the window.
        num_items: Any = num_items_in_batch
        scale: Any = 1
        if alone:
            num_items = self._count_items(batches)
            scale = len(self._window) if num_items is None else num_items_in_batch / num_items
        if config.ascent_fraction < 1:
            batches = [self._sub_batch(batch) for batch in batches]
            num_items = self._count_items(batches)

        if self._found_in is not self.model:
            self._find_parameters()
        trainable = _trainable(self._parameters)
        perturbed = _trainable(self._perturbed)
        self._perturbation = Perturbation(perturbed, config.epsilon, config.ball)
        clean_losses: list[Tensor] = []
        for ascent in range(config.inner_steps):
            with (
                preserved_rng(self.args.device),
                self._norm_stats_kept() if ascent else contextlib.nullcontext(),
                self._accumulating_alone() if alone else contextlib.nullcontext(),
                unsynchronized(self.accelerator, model),
                _gradients_set_aside(trainable),
            ):
                gradient = self._zero_gradient(perturbed, holds_theta=ascent > 0)
                for batch in batches:
                    # A copy, because computing the loss may take the labels out.
                    loss = super().training_step(model, copy.copy(batch), num_items)
                    if ascent == 0:
                        clean_losses.append(loss / scale)
            rate = config.inner_lr / loss_scale(self.accelerator)
            self._delta_norm = self._perturbation.ascend(gradient, rate)
        self._clean_losses = clean_losses

    def _find_parameters(self) -> None:
        self._perturbed = perturbed_parameters(self.model, self.amp_config.perturb)
        self._parameters = list(self.model.parameters())
        self._norm_buffers = norm_buffers(self.model)
        self._memory = {}
        self._found_in = self.model

    def _zero_gradient(self, params: list[nn.Parameter], holds_theta: bool) -> list[Tensor]:
        """Gives `params` zeros to accumulate an ascent's gradient in.

        They are kept from step to step: a CPU would map fresh memory page by page in every step.
        """
        if holds_theta or any(param not in self._memory for param in params):
            self._memory = dict(zip(params, joint_empty_like(params)))
        gradient = [self._memory[param] for param in params]
        torch._foreach_zero_(gradient)
        for param, zeros in zip(params, gradient):
            param.grad = zeros
        return gradient

    def _count_items(self, batches: list) -> Tensor | int | None:
        """`num_items_in_batch` as the parent counts it, were `batches` the whole window."""
        return super().get_batch_samples(iter(batches), len(batches), self.args.device)[1]

    def _sub_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The first `ascent_fraction` of the samples (which come shuffled), at least one."""
        size = find_batch_size(batch)
        share = max(1, round(size * self.amp_config.ascent_fraction))
        return recursively_apply(
            lambda tensor: tensor[:share] if tensor.ndim and len(tensor) == size else tensor, batch
        )

    def _norm_stats_kept(self) -> contextlib.AbstractContextManager[None]:
        """Around every pass that is not the clean one."""
        if self.amp_config.norm_stats == "both":
            return contextlib.nullcontext()
        return preserved_buffers(self._norm_buffers)

    @contextlib.contextmanager
    def _accumulating_alone(self) -> Iterator[None]:
        """The Trainer divides a loss by the number of micro-batches: inside, there is one."""
        steps = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = 1
        try:
            yield
        finally:
            self.current_gradient_accumulation_steps = steps

    def _start_window(self, window: list) -> None:
        """Forgets the optimizer step before, which a callback may have ended early."""
        self._window = window
        self._clean_losses = []
        self._perturbation = Perturbation([], 0.0, "global")

    def _start_statistics(self) -> None:
        self._statistics_of = self.state
        self._sums = 0.0
        self._perturbed_steps = 0.0

    def _compare_with_checkpoint(self, checkpoint: str | bool) -> None:
        """Warns where the checkpoint was trained with another `AMPConfig`."""
        folder = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        path = os.path.join(folder or "", AMP_CONFIG_NAME)
        if not os.path.isfile(path):
            return
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
        here = self.amp_config.to_dict()
        changes = [
            f"{name} was {saved.get(name)!r} and is {here.get(name)!r}"
            for name in sorted(saved | here)
            if saved.get(name) != here.get(name)
        ]
        if changes:
            logger.warning(
                f"Resuming {folder} with a different AMPConfig than it was trained with: "
                f"{'; '.join(changes)}."
            )


class AMPTrainer(AMPTrainerMixin, Trainer):
    """`transformers.Trainer` with Adversarial Model Perturbation: see `AMPTrainerMixin`."""


def _trainable(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [param for param in params if param.requires_grad]


@contextlib.contextmanager
def _gradients_set_aside(params: list[nn.Parameter]) -> Iterator[None]:
    """The accumulated gradients are afterwards what they were; inside, there are none at first."""
    accumulated = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, gradient in zip(params, accumulated):
            param.grad = gradient
