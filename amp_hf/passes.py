"""The parent Trainer's forward and backward pass, and what the loss that it returns means."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import JointTensors
from .compat import loss_is_scaled_for_ga
from .config import Scope
from .engine import Engine
from .parameters import StepTensors
from .preserve import (
    all_buffers,
    gradients_set_aside,
    preserved_buffers,
    preserved_rng,
    temporarily,
)

Count = Tensor | int | None  # what the Trainer calls `num_items_in_batch`


@dataclass(frozen=True)
class LossKind:
    """How the parent's loss differs from the plain mean over its micro-batch.

    Attributes:
        divided_by: what makes it a share of the window's mean: `num_items_in_batch`, or the number
            of micro-batches. Some models (BERT's for sequences, say) and loss functions are given
            the former and return their own mean all the same; the Trainer then adds up means.
        times_ranks: it is multiplied by the number of ranks whose items are counted, as
            `Trainer.compute_loss` does; a subclass that overrides it may not.
    """

    divided_by: Literal["items", "micro_batches"] | None = "items"
    times_ranks: bool = True


@dataclass(frozen=True)
class LossScale:
    """How the loss of an inner pass relates to the plain mean over the batch that Δ is for.

    Δ has to come from that mean, whatever a micro-batch's loss is divided by. Say that there are w
    micro-batches in the window, that the items of c ranks are counted, and that k is c where the
    loss grows by it (`LossKind`), else 1. The logged loss is k · share · (the micro-batch's mean):

    | the loss is divided by | share                 | the window's mean, of what is logged |
    |------------------------|-----------------------|--------------------------------------|
    | items                  | its items / all items | c / k · sum                          |
    | micro-batches          | 1 / w                 | 1 / k · sum                          |
    | nothing                | 1                     | 1 / (w·k) · sum                      |

    Attributes:
        num_items: what the passes are told.
        gradient_factor: what their gradients are multiplied by to be those of the mean.
        loss_divisor: what a loss is divided by to be the one that the Trainer would have logged.
    """

    num_items: Count
    gradient_factor: float = 1.0
    loss_divisor: Any = 1


class ParentPasses:
    """The parent's `training_step`, and its `get_batch_samples`, which counts as its losses do.

    Args:
        mixin: the trainer's class whose parent is meant.
    """

    def __init__(self, trainer: Any, mixin: type) -> None:
        self._trainer = trainer
        self._mixin = mixin

    @property
    def _parent(self) -> Any:
        # Not stored: a super object can be neither copied nor pickled.
        return super(self._mixin, self._trainer)

    def __call__(self, model: nn.Module, batch: Any, num_items: Count) -> Tensor:
        """Forward and backward. Returns the loss."""
        return self._parent.training_step(model, batch, num_items)

    def without_side_effects(
        self, model: nn.Module, batch: Any, num_items: Count, tensors: StepTensors
    ) -> Tensor:
        with (
            preserved_rng(self._trainer.args.device),
            preserved_buffers(all_buffers(tensors.model)),
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
        self, scope: Scope, window: int, batches: list, num_items: Count, kind: LossKind
    ) -> LossScale:
        """For the inner passes on `batches`, where Δ has this `scope`."""
        if window * self._trainer.accelerator.num_processes == 1:
            return LossScale(num_items)
        if scope == "batch":
            return LossScale(num_items, self.mean_factor(window, num_items, kind))
        with self.as_a_step_of_its_own():
            own_items: Any = self.count_items(batches)
        divisor: Any = 1
        if kind.divided_by == "items" and own_items is not None:
            divisor = num_items / own_items
        elif kind.divided_by is not None:  # where nothing counts items, it is by micro-batches
            divisor = window
        return LossScale(own_items, loss_divisor=divisor / self._growth(num_items, kind))

    def mean_factor(self, window: int, num_items: Count, kind: LossKind) -> float:
        """What the sum of a window's losses, as logged, is multiplied by to be their mean."""
        factor: float = 1
        if kind.divided_by == "items":
            factor = self._counted_ranks(num_items)
        elif kind.divided_by is None:
            factor = 1 / window
        return factor / self._growth(num_items, kind)

    def _growth(self, num_items: Count, kind: LossKind) -> int:
        return self._counted_ranks(num_items) if kind.times_ranks else 1

    def _counted_ranks(self, num_items: Count) -> int:
        """Whose items `num_items` counts: c of `LossScale`."""
        averages = self._trainer.args.average_tokens_across_devices
        counted = num_items is not None and averages
        return self._trainer.accelerator.num_processes if counted else 1

    def find_loss_kind(
        self,
        model: nn.Module,
        batch: Any,
        num_items: Count,
        engine: Engine,
        tensors: StepTensors,
        last: bool,
    ) -> LossKind | None:
        """Found by passes on `batch`; `None` where its loss is 0 or not finite, and does not tell.

        Args:
            last: as `Engine.inner_passes` takes it.
        """
        trainer, args = self._trainer, self._trainer.args
        divides = trainer.compute_loss_func is None and not loss_is_scaled_for_ga(trainer)
        if num_items is None and divides:
            return LossKind("micro_batches")  # by the Trainer, which counts no ranks either
        averages = args.average_tokens_across_devices
        losses = []
        # As it is; with twice the items; in twice the window; with this rank's items alone.
        for items, window, counts_ranks in (
            (1, 1, averages),
            (2, 1, averages),
            (1, 2, averages),
            (1, 1, False),
        ):
            count = None if num_items is None else num_items * items
            with (
                self._in_a_window_of(window),
                temporarily(args, "average_tokens_across_devices", counts_ranks),
                engine.inner_passes(model, [], JointTensors([]), last),
            ):
                loss = self.without_side_effects(model, batch, count, tensors)
                losses.append(loss.clone())  # a CUDA graph writes the next one into its memory
        # One answer for all ranks: further passes of one alone would leave the others waiting.
        loss, *changed = trainer.accelerator.reduce(torch.stack(losses)).tolist()
        if not loss or not math.isfinite(loss):
            return None
        # Twice the divisor halves the loss, and half of the ranks or fewer do, too.
        by_items, by_window, by_ranks = (other / loss < 0.75 for other in changed)
        return LossKind("items" if by_items else "micro_batches" if by_window else None, by_ranks)

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
        """What a loss is divided by: the Trainer reads the one, some `compute_loss` the other."""
        with (
            temporarily(self._trainer, "current_gradient_accumulation_steps", micro_batches),
            temporarily(self._trainer.args, "gradient_accumulation_steps", micro_batches),
        ):
            yield
