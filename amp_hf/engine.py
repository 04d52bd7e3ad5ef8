"""What differs by engine: which ones are supported, the scope they allow, and the loss's scale."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .config import AMPConfig, Scope

_SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)


def resolve_scope(config: AMPConfig, accelerator: Accelerator, args: TrainingArguments) -> Scope:
    """The batch that Δ is computed on.

    Raises:
        ValueError: an engine, an optimizer or a scope on which the steps would not be exact.
    """
    kind = accelerator.distributed_type
    if kind not in _SUPPORTED:
        raise ValueError(
            f"AMPTrainer does not support {kind.value} yet: train on one process or with DDP, "
            "or set AMPConfig(epsilon=0) for the stock Trainer."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "AMPTrainer does not support nn.DataParallel: start one process a GPU with "
            "`accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )
    optimizer = OptimizerNames(args.optim).value
    if optimizer.endswith(("lomo", "layerwise")):
        raise ValueError(
            f"AMPTrainer cannot use optim={optimizer!r}: it steps inside of the backward "
            "pass, of which AMP runs two. Choose an optimizer that steps afterwards."
        )
    if config.scope == "batch" and accelerator.num_processes > 1:
        raise ValueError(
            "AMPConfig.scope='batch' is not supported on several processes yet: use 'micro_batch'."
        )
    return config.scope or "micro_batch"


def unsynchronized(
    accelerator: Accelerator, model: nn.Module
) -> contextlib.AbstractContextManager[None]:
    """Backward passes inside leave each rank its own gradient, without communication."""
    return accelerator.no_sync(model)


def loss_scale(accelerator: Accelerator) -> float | Tensor:
    """The factor that the backward pass puts on gradients: the fp16 GradScaler's, else 1."""
    if accelerator.scaler is None:
        return 1.0
    # `get_scale` would wait for the device.
    return accelerator.scaler.scale(torch.ones((), device=accelerator.device))
