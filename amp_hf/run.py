"""What a perturbed step leaves for the next: the state of a training run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from .engine import Engine
from .feedback import Feedback
from .parameters import StepTensors
from .passes import LossKind
from .perturbation import Perturbation
from .progress import Progress, kept


@dataclass
class Run:
    """What is found out once per training run, and what one step leaves for the next."""

    state: TrainerState | None = None  # the Trainer's, and so this run's identity
    progress: Progress = field(default_factory=Progress)
    feedback: Feedback | None = None  # to the rule that sets epsilon
    current_step: int | None = None  # plain or perturbed
    progress_before: dict[str, Any] = field(default_factory=dict)  # as it was when that began
    engine: Engine | None = None
    tensors: StepTensors | None = None
    checked: bool = False  # that AMP is right with the trainer, once epsilon is not 0
    loss_kind: LossKind | None = None  # see `ParentPasses.find_loss_kind`
    last_perturbed: int | None = None  # the last step with a Δ
    last_ascent: int | None = None  # the last one whose Δ was computed anew
    reusable: Perturbation | None = None  # its Δ, where steps to come may be displaced by it

    @classmethod
    def of(cls, state: TrainerState, accelerator: Accelerator, before: Feedback | None) -> Run:
        """The state of a training that begins, or that goes on from a checkpoint.

        Args:
            before: of the same training, where the Trainer begins it anew with a smaller batch. The
                weights stay trained, so that only `before` knows what the loss began with.
        """
        feedback = Feedback(accelerator, kept(state).get("feedback"))
        if before is not None and feedback.radius.first_loss is None:
            feedback.radius.first_loss = before.radius.first_loss
            feedback.radius.loss = before.radius.loss
        return cls(state, Progress.of(state), feedback)

    @property
    def epochs(self) -> int:
        """How often the training sees its data: once where they are streamed, without an end."""
        assert self.state is not None
        return 1 if self.state.num_train_epochs == sys.maxsize else self.state.num_train_epochs


@dataclass
class Window:
    """The micro-batches of one optimizer step, and the Δ that they see."""

    batches: list = field(default_factory=list)
    perturbation: Perturbation = field(default_factory=lambda: Perturbation([], 0.0, "global"))
    delta_norm: Tensor | None = None
    linear_rise: Tensor | None = None  # of the loss from θ to θ + Δ, were it linear
    # At θ, of the micro-batches that Δ was computed on and whose outer pass is to come.
    clean_losses: list[Tensor] = field(default_factory=list)
    # The sums that `Feedback.add` takes, over the micro-batches so far.
    measured: Tensor | None = None

    @property
    def size(self) -> int:
        """Micro-batches of the step; 1 where `get_batch_samples` handed none over."""
        return max(1, len(self.batches))


def stacked(loss: Tensor, *values: Tensor) -> Tensor:
    """All of them in one tensor, on the device of `loss` and at least in float32."""
    dtype = torch.promote_types(loss.dtype, torch.float32)
    return torch.stack([value.to(loss.device, dtype) for value in (loss, *values)])


@dataclass
class LogMeans:
    """Means of the loss at θ + Δ, of its rise over the one at θ, and of ‖Δ‖₂.

    They are over the steps with an ascent since the means were last taken.
    """

    steps: float = 0.0
    sums: Tensor | None = None

    def add(self, loss: Tensor, clean_loss: Tensor, delta_norm: Tensor, share: float) -> None:
        """Adds one micro-batch, which is `share` of a step."""
        sums = stacked(loss, loss - clean_loss, delta_norm * share)
        self.sums = sums if self.sums is None else self.sums + sums
        self.steps += share

    def take(self) -> Tensor | None:
        """The three means, if there was a step, and starts anew."""
        means = None if self.sums is None else self.sums / self.steps
        self.steps, self.sums = 0.0, None
        return means
