"""The parent Trainer's forward and backward pass, and what the loss that it returns means."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import JointTensors
from .compat import loss_is_scaled_for_ga
from .config import Scope
from .engine import Engine
from .parameters import StepTensors
from .preserve import gradients_set_aside, preserved_buffers, preserved_rng, temporarily

Count = Tensor | int | None  # what the Trainer calls `num_items_in_batch`


@dataclass(frozen=True)
class LossScale:
    """How the loss of an inner pass relates to the plain mean over the batch that Δ is for.

    Δ has to come from that mean, whatever the Trainer divides a micro-batch's loss by. Say that
    there are w micro-batches in the window and r ranks, and that k is r where the Trainer
    multiplies the loss by the ranks whose items it counted, else 1. A loss *shrinks* if it is a
    micro-batch's share of the window's mean, which most are; its share is that of its items, or 1/w
    where none are counted.

    | Δ comes from              | the loss of its passes is       | gradient    | logged         |
    |---------------------------|---------------------------------|-------------|----------------|
    | the only batch there is   | its mean                        | 1           | 1              |
    | each micro-batch, shrinks | its own mean, by its own count  | 1           | 1 / (share·k)  |
    | each micro-batch, else    | its own mean                    | 1           | 1 / k          |
    | the whole window, shrinks | shares that add up to its mean  | 1           | 1              |
    | the whole window, else    | k times a micro-batch's mean    | 1 / (w·k)   | 1              |

    Attributes:
        num_items: what the passes are told.
        gradient: what their gradients are multiplied by to be those of the mean.
        logged: what a loss is divided by to be the one that the Trainer would have logged.
    """

    num_items: Count
    gradient: float = 1.0
    logged: Any = 1


class ParentPasses:
    """The parent's `training_step`, and its `get_batch_samples`, which counts as its losses do.

    Args:
        parent: `super()` of the trainer's mixin.
    """

    def __init__(self, trainer: Any, parent: Any) -> None:
        self._trainer = trainer
        self._parent = parent

    def __call__(self, model: nn.Module, batch: Any, num_items: Count) -> Tensor:
        """Forward and backward. Returns the loss."""
        return self._parent.training_step(model, batch, num_items)

    def without_side_effects(
        self, model: nn.Module, batch: Any, num_items: Count, tensors: StepTensors
    ) -> Tensor:
        with (
            preserved_rng(self._trainer.args.device),
            preserved_buffers(tensors.norm_buffers),
            gradients_set_aside(tensors.trainable),
        ):
            # A copy, because computing the loss may take the labels out.
            return self(model, copy.copy(batch), num_items)

    def count_items(self, batches: list) -> Tensor | None:
        """`num_items_in_batch` as the parent counts it, were `batches` the whole window; >= 1."""
        device = self._trainer.args.device
        count = self._parent.get_batch_samples(iter(batches), len(batches), device)[1]
        return None if count is None else torch.as_tensor(count).clamp(min=1)

    def loss_scale(
        self, scope: Scope, window: int, batches: list, num_items: Count, shrinks: bool
    ) -> LossScale:
        """Of the passes on `batches`, for a Δ of `scope`; the cases are those of `LossScale`."""
        if window * self._trainer.accelerator.num_processes == 1:
            return LossScale(num_items)
        if scope == "batch":
            return LossScale(num_items, gradient=self.mean_factor(window, num_items, shrinks))
        with self.as_a_step_of_its_own():
            own_items: Any = self.count_items(batches)
        inverse_share: Any = window if own_items is None else num_items / own_items
        factor = self._rank_factor(num_items)
        return LossScale(own_items, logged=(inverse_share if shrinks else 1) / factor)

    def mean_factor(self, window: int, num_items: Count, shrinks: bool) -> float:
        """What a window's losses, as logged, are multiplied by to add up to their mean."""
        return 1.0 if shrinks else 1 / (window * self._rank_factor(num_items))

    def _rank_factor(self, num_items: Count) -> int:
        """What the Trainer multiplies a loss by: k of `LossScale`."""
        averages = self._trainer.args.average_tokens_across_devices
        counted = num_items is not None and averages
        return self._trainer.accelerator.num_processes if counted else 1

    def loss_shrinks(
        self,
        model: nn.Module,
        batch: Any,
        num_items: Count,
        engine: Engine,
        tensors: StepTensors,
        last: bool,
    ) -> bool | None:
        """Whether a micro-batch's loss is its share of the window's: half of it in one of twice.

        Some models (BERT's for sequences, say) and loss functions are given `num_items_in_batch`
        and return the micro-batch's own mean all the same; the Trainer then adds up means. `None`
        where a loss of zero does not tell.

        Args:
            last: as `Engine.inner_passes` takes it.
        """
        trainer = self._trainer
        divides = trainer.compute_loss_func is None and not loss_is_scaled_for_ga(trainer)
        if num_items is None and divides:
            return True  # the Trainer does
        losses = []
        for size in (1, 2):
            count = None if num_items is None else num_items * size
            with (
                self._in_a_window_of(size),
                engine.inner_passes(model, [], JointTensors([]), last),
            ):
                losses.append(self.without_side_effects(model, batch, count, tensors))
        # One answer for all ranks: further passes of one alone would leave the others waiting.
        once, twice = trainer.accelerator.reduce(torch.stack(losses)).tolist()
        return twice / once < 0.75 if once and math.isfinite(once) else None

    @contextlib.contextmanager
    def as_a_step_of_its_own(self) -> Iterator[None]:
        """To the Trainer, a micro-batch inside is the whole window of a single process."""
        with (
            self._in_a_window_of(1),
            temporarily(self._trainer.args, "average_tokens_across_devices", False),
        ):
            yield

    @contextlib.contextmanager
    def _in_a_window_of(self, micro_batches: int) -> Iterator[None]:
        """What a loss is divided by: the Trainer reads the one, a `compute_loss` may the other."""
        with (
            temporarily(self._trainer, "current_gradient_accumulation_steps", micro_batches),
            temporarily(self._trainer.args, "gradient_accumulation_steps", micro_batches),
        ):
            yield
