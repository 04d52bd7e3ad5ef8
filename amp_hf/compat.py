"""What the oldest versions that pyproject.toml allows do not have yet.

Each entry says from which version on it is superfluous: remove it when the lower bound gets there.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor


def foreach_clone(tensors: list[Tensor]) -> list[Tensor]:
    """`torch._foreach_clone`, which torch has from 2.11 on."""
    if hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return list(torch._foreach_mul(tensors, 1))  # the same bits, in one operation as well


def forget_gathered(model: Any) -> None:
    """FSDP2's `reset_iter_state`, which torch has from 2.11 on; before, an exception ends it."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


# From 5.19 on; an older Trainer divides a loss whatever a subclass of it says.
ASKS_WHO_DIVIDES = Version(importlib.metadata.version("transformers")) >= Version("5.19")


def loss_is_scaled_for_ga(trainer: Any) -> bool:
    """Whether the loss comes divided by the micro-batches, so that the Trainer does not."""
    return ASKS_WHO_DIVIDES and trainer.loss_is_scaled_for_ga
