"""What the oldest versions that pyproject.toml allows do not have yet, or libraries hide.

The former say from which version on they are superfluous: remove them when the lower bound gets
there.
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


def splits_tensors_or_sequences(plan: Any) -> bool:
    """Whether a `ParallelismConfig` does; accelerate has `sp_enabled` from 1.12 on."""
    return plan.tp_enabled or plan.cp_enabled or getattr(plan, "sp_enabled", False)


_transformers = Version(importlib.metadata.version("transformers"))


def sgd_with_arguments(args: Any) -> dict[str, Any]:
    """For a `Trainer`, where `optim="sgd"` comes with `optim_args`: it heeds them from 5.3 on."""
    if _transformers >= Version("5.3") or args.optim != "sgd" or not args.optim_args:
        return {}
    given = dict(pair.split("=") for pair in args.optim_args.replace(" ", "").split(","))
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    kwargs |= {name: float(given[name]) for name in ("momentum", "dampening") if name in given}
    kwargs["nesterov"] = given.get("nesterov", "").lower() in ("true", "1", "yes")
    return {"optimizer_cls_and_kwargs": (torch.optim.SGD, kwargs)}


# From 5.19 on; an older Trainer divides a loss whatever a subclass of it says.
HEEDS_LOSS_IS_SCALED = _transformers >= Version("5.19")


def loss_is_scaled_for_ga(trainer: Any) -> bool:
    """Whether the loss comes divided by the micro-batches, so that the Trainer does not."""
    return HEEDS_LOSS_IS_SCALED and trainer.loss_is_scaled_for_ga


def saved_under_its_own_names(model: Any) -> Any:
    """`model`, a `PreTrainedModel`, which would otherwise be saved under the names it was read by.

    Those may be older ones, such as `LayerNorm.gamma` in the first BERTs. `from_pretrained` takes
    them, but the Trainer's resuming and its best model leave out what has them.
    """
    model._weight_conversions = []
    return model


def computes_in_bf16() -> bool:
    """Whether the GPU, or else the CPU, multiplies in bf16 faster than in float32."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
