"""What the older of the versions that pyproject.toml allows do not have yet.

An entry goes when the lower bound reaches the version that it names.
"""

from __future__ import annotations

from typing import Any

import torch

# From torch 2.11 on.
foreach_clone: Any = getattr(
    torch, "_foreach_clone", lambda tensors: [tensor.clone() for tensor in tensors]
)


def forget_gathered(model: Any) -> None:
    """After an exception, FSDP2 gathers anew. From torch 2.11 on."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


def loss_is_scaled_for_ga(trainer: Any) -> bool:
    """Whether the loss is divided by the micro-batches already. From transformers 5.19 on."""
    return getattr(trainer, "loss_is_scaled_for_ga", False)
