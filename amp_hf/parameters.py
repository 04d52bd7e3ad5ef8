"""Which parameters are perturbed, and what else of a model a perturbed step touches."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import nn

from .blocks import JointTensors
from .engine import Engine
from .preserve import Buffer, norm_buffers

_OF_WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_orig_mod)\.")


def perturbed_parameters(model: nn.Module, perturb: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that `AMPConfig.perturb` names, by name; tied ones once.

    Args:
        perturb: `"all"`, `"norm"` (those directly in a module whose class is called a norm:
            BatchNorm2d, LayerNorm, LlamaRMSNorm, timm's BatchNormAct2d, …) or a regular expression
            that is searched for in the parameters' names, without what FSDP2's activation
            checkpointing and compilation put into them.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if perturb == "all":
        chosen = named
    elif perturb == "norm":
        chosen = {
            f"{prefix}.{name}".lstrip("."): param
            for prefix, module in model.named_modules(remove_duplicate=False)
            if "norm" in type(module).__name__.lower()
            for name, param in module.named_parameters(recurse=False)
        }
    else:
        chosen = {
            name: param
            for name, param in named.items()
            if re.search(perturb, _OF_WRAPPERS.sub("", name))
        }
    names: dict[nn.Parameter, str] = {}
    for name, param in chosen.items():
        if param.requires_grad:
            names.setdefault(param, name)
    return {name: param for param, name in names.items()}


def check_perturbable(model: nn.Module, perturb: str, is_final: bool = True) -> None:
    """Raises `ValueError` if `perturb` names no trainable parameter, or one that would go wrong.

    Args:
        is_final: whether the parameters have the types and devices that they train with.
    """
    params = perturbed_parameters(model, perturb)
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError(
            f"AMPConfig.perturb={perturb!r} matches no trainable parameter of "
            f"{type(model).__name__}, all of which are frozen: unfreeze some (those of a PEFT "
            "adapter by is_trainable=True)."
        )
    if not params:
        names = ", ".join(name for name, _ in itertools.islice(model.named_parameters(), 3))
        raise ValueError(
            f"AMPConfig.perturb={perturb!r} matches no trainable parameter of "
            f"{type(model).__name__}, whose parameters are named like {names}: use 'all', 'norm' "
            "or an expression that matches."
        )
    for name, param in params.items():
        if param.is_complex():
            raise ValueError(
                f"Parameter {name} is {param.dtype}, for which no ball is defined here: keep its "
                "real and imaginary parts as a real parameter (torch.view_as_real), or leave it "
                "out by AMPConfig.perturb."
            )
        if is_final and param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Parameter {name} is {param.dtype}, in which a perturbation would round away: "
                "load the model with dtype=torch.float32 and set bf16=True or fp16=True in "
                "TrainingArguments, which computes in half precision over float32 parameters. "
                "(Evaluating with bf16_full_eval or fp16_full_eval has changed them for good.)"
            )
    devices = {str(param.device): name for name, param in params.items()}
    if is_final and len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"The perturbed parameters lie on several devices ({where}): load the model without a "
            "device_map that splits it."
        )
    for name, module in model.named_modules():
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and any(param is module.weight for param in params.values()):
            raise ValueError(
                f"Module {name} has sparse gradients, which cannot be perturbed: build it with "
                "sparse=False, or leave it out by AMPConfig.perturb."
            )


def check_no_hooks(model: nn.Module) -> None:
    """Raises `ValueError` where a backward pass would do more than compute gradients.

    An optimizer that is fused into it does (PyTorch's "How to save memory by fusing the optimizer
    step into the backward pass"), and so does one that takes the gradients away (torchao's
    offloading).
    """
    for name, param in model.named_parameters():
        # The dictionary that `register_post_accumulate_grad_hook` fills.
        if getattr(param, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"Parameter {name} has a hook of register_post_accumulate_grad_hook, which runs "
                "within the backward pass, of which AMP makes two: let the optimizer step after "
                "it, or use AMPConfig(epsilon=0)."
            )


class StepTensors:
    """The tensors of a model that a perturbed step touches.

    Args:
        optimizer: some of its parameters may not be the model's: a loss function may have some.
        engine: knows which part of a parameter this process keeps.

    Attributes:
        trainable: all parameters that a backward pass gives a gradient.
        perturbed: those of them that are displaced.
        norm_buffers: the running statistics of normalization layers.
    """

    def __init__(
        self,
        model: nn.Module,
        perturb: str,
        optimizer: torch.optim.Optimizer | None,
        engine: Engine,
    ) -> None:
        self.model = model
        self.trainable: list[nn.Parameter] = []
        self.perturbed: list[nn.Parameter] = []
        self.norm_buffers: list[Buffer] = []
        self._perturb = perturb
        self._optimizer = optimizer
        self._engine = engine
        # Parameters that share memory with a perturbed one, and that one.
        self._sharing: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._joint: JointTensors | None = None
        self.update()

    def update(self) -> bool:
        """Follows what callbacks add, freeze and unfreeze. Returns whether anything changed.

        Raises:
            ValueError: nothing is left to perturb, or what was added cannot be perturbed.
        """
        self._engine.reshard(self.model)
        groups = self._optimizer.param_groups if self._optimizer else []
        optimized = (param for group in groups for param in group["params"])
        everything = dict.fromkeys(itertools.chain(self.model.parameters(), optimized))
        trainable = [param for param in everything if param.requires_grad]
        if list(map(id, trainable)) == list(map(id, self.trainable)):
            return False
        check_perturbable(self.model, self._perturb)
        self.trainable = trainable
        self.norm_buffers = norm_buffers(self.model)
        self.perturbed, self._sharing, self._joint = [], [], None
        owners: dict[Any, nn.Parameter] = {}
        for param in perturbed_parameters(self.model, self._perturb).values():
            shard = self._engine.shard(param)
            memory: tuple = shard.data_ptr(), shard.numel()
            if torch.empty_like(shard, device="meta").stride() != shard.stride():  # with gaps
                memory += (shard.shape, shard.stride())
            owner = owners.setdefault(memory, param) if shard.numel() else param
            if owner is param:
                self.perturbed.append(param)
            else:  # `a.data = b.data`: two Parameters, and one θ to displace
                self._sharing.append((param, owner))
        return True

    def join_gradients(self) -> None:
        """Parameters over one memory accumulate into one gradient, as one Parameter would."""
        for param, owner in self._sharing:
            gradient = owner.grad
            assert gradient is not None  # zeros, by `Engine.inner_passes`
            if param.stride() != owner.stride():  # `a.data = b.data.t()`, and both without gaps
                offset = gradient.storage_offset()
                gradient = gradient.as_strided(param.shape, param.stride(), offset)
            param.grad = gradient

    @torch.no_grad()
    def zeros(self, fresh: bool) -> JointTensors:
        """Zeros shaped like the shards of `perturbed`, in memory that is kept unless `fresh`.

        A CPU would otherwise map it in again, page by page, in every step.
        """
        if fresh or self._joint is None:
            self._joint = JointTensors([self._engine.shard(param) for param in self.perturbed])
        self._joint.zero_()
        return self._joint
