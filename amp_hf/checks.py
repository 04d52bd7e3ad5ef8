"""Which trainers, engines and optimizers are refused: those with which a step would be wrong."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from accelerate import Accelerator, DistributedType
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .compat import splits_tensors_or_sequences
from .config import AMPConfig
from .engine import engine_for
from .parameters import check_perturbable

# Of TRL. Each pass of theirs draws or generates a batch of its own, so that Δ would come from
# another batch than the update; PPOTrainer has a loop of its own, which perturbs nothing.
_GENERATING = frozenset(
    """
    A2POTrainer AsyncDistillationTrainer AsyncGRPOTrainer DistillationTrainer GKDTrainer GOLDTrainer
    GRPOTrainer IWOPDTrainer OnlineDPOTrainer PPOTrainer RLOOTrainer SDFTTrainer SDPOTrainer
    """.split()  # noqa: SIM905
)


def check_trainer(trainer: Any, config: AMPConfig) -> None:
    """Raises `ValueError` for all that AMP would be wrong with, except hooks (`check_no_hooks`)."""
    check_parent(type(trainer))
    model = trainer.model
    check_engine(config, trainer.accelerator, trainer.args, model)
    if trainer.train_dataset is None:
        return  # it only evaluates; a first step is checked again
    # FSDP2 casts and moves the parameters when the training begins.
    is_final = not trainer.is_fsdp_enabled or isinstance(model, FSDPModule)
    check_perturbable(model, config.perturb, is_final)


def check_parent(trainer: type) -> None:
    """Raises `ValueError` for a trainer whose passes do not share their batch."""
    for parent in trainer.__mro__:
        if parent.__module__.startswith("trl.") and parent.__name__ in _GENERATING:
            raise ValueError(
                f"AMPTrainerMixin does not support {parent.__name__}: each of its passes draws or "
                "generates a batch of its own, and a perturbed step needs two on the same one. Use "
                "AMPConfig(epsilon=0)."
            )


def check_engine(
    config: AMPConfig, accelerator: Accelerator, args: TrainingArguments, model: nn.Module
) -> None:
    """Raises `ValueError` for an engine, an optimizer or a scope that AMP would be wrong with."""
    if args.n_gpu > 1:
        raise ValueError(
            "AMPTrainer does not support nn.DataParallel: start one process a GPU with "
            "`accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )
    optimizer = OptimizerNames(args.optim).value
    if optimizer.endswith(("lomo", "layerwise")):
        raise ValueError(
            f"AMPTrainer cannot use optim={optimizer!r}: it steps inside the backward pass, of "
            "which AMP runs two. Choose an optimizer that steps afterwards."
        )
    plan = accelerator.parallelism_config
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise _unsupported("a model that `from_pretrained` has split over several ranks")
    if plan and splits_tensors_or_sequences(plan):
        raise _unsupported("tp_size, cp_size or sp_size > 1 in parallelism_config")
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise _unsupported(kind.value)
    if kind == DistributedType.FSDP and not (accelerator.is_fsdp2 or isinstance(model, FSDPModule)):
        raise _unsupported("FSDP version 1")
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)
    scopes = engine_for(config, accelerator, model).scopes
    if config.scope not in (None, *scopes):
        raise ValueError(
            f"AMPConfig.scope={config.scope!r} is not possible here: FSDP and ZeRO-3 reduce the "
            "gradient over all ranks, and they share one perturbation. Use "
            f"{scopes[0]!r}, or None, which chooses it."
        )


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"AMPTrainer does not support {what}: use one process, DDP, FSDP version 2 or DeepSpeed's "
        "ZeRO-1 to 3, or AMPConfig(epsilon=0) for the stock Trainer."
    )


def _check_deepspeed(plugin: Any) -> None:
    if Version(importlib.metadata.version("deepspeed")) < Version("0.19.1"):
        raise ValueError("AMPTrainer needs DeepSpeed 0.19.1 or newer: pip install -U deepspeed.")
    config = plugin.deepspeed_config
    for section in ("bf16", "fp16"):
        if str((config.get(section) or {}).get("enabled")).lower() == "true":
            raise ValueError(
                f"DeepSpeed's {section} keeps the parameters in half precision, in which a "
                f"perturbation would round away: without {section}, pass a DeepSpeed file with "
                '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} as TrainingArguments\' '
                "deepspeed."
            )
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled") and "bf" not in str(autocast.get("dtype", "bf16")):
        raise ValueError(
            "AMPTrainer does not know the loss scale of DeepSpeed's torch_autocast in "
            f"{autocast['dtype']}: set its dtype to bfloat16."
        )
    zero = config.get("zero_optimization") or {}
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ValueError(
            "AMPTrainer cannot perturb parameters that are offloaded to nvme: set offload_param's "
            "device to cpu in the DeepSpeed config."
        )
    if plugin.zero_stage == 0:
        raise _unsupported("DeepSpeed without ZeRO (zero_optimization.stage is 0)")
    experts = config.get("expert_parallel") or {}
    asked_for = {
        "tensor_parallel.autotp_size": _size(config.get("tensor_parallel"), "autotp_size") > 1,
        "expert_parallel.autoep_size": experts.get("enabled") and _size(experts, "autoep_size") > 1,
        # It reduces into memory of its own.
        "compile.deepcompile": (config.get("compile") or {}).get("deepcompile"),
        # Both step inside the backward pass.
        "zero_optimization.zenflow": zero.get("zenflow") is not None,
        "zero_optimization.offload_optimizer.super_offload": (
            zero.get("offload_optimizer") or {}
        ).get("super_offload"),
        # To 8 bits, in which a perturbation would round away.
        "zero_optimization.zero_quantized_weights": zero.get("zero_quantized_weights"),
    }
    for option, is_on in asked_for.items():
        if is_on:
            raise ValueError(
                f"AMPTrainer does not support DeepSpeed's {option}: take it out of the DeepSpeed "
                "config, or use AMPConfig(epsilon=0) for the stock Trainer."
            )


def _size(section: dict[str, Any] | None, name: str) -> int:
    return int((section or {}).get(name) or 1)
