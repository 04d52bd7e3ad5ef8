"""Which parameters are perturbed, and what else of a model a perturbed step touches."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .perturbation import joint_blocks, joint_empty_like
from .statistics import norm_buffers


def perturbed_parameters(model: nn.Module, perturb: str) -> list[nn.Parameter]:
    """The parameters that `AMPConfig.perturb` names, tied ones once, frozen ones too.

    Args:
        perturb: `"all"`, `"norm"` (those directly in a module whose class is called a norm:
            BatchNorm2d, LayerNorm, LlamaRMSNorm, timm's BatchNormAct2d, …) or a regular expression
            that is searched for in the parameters' names.

    Raises:
        ValueError: none of them is trainable, or one that is could not be perturbed exactly.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if perturb == "all":
        chosen = named
    elif perturb == "norm":
        chosen = {
            f"{prefix}.{name}": param
            for prefix, module in model.named_modules(remove_duplicate=False)
            if "norm" in type(module).__name__.lower()
            for name, param in module.named_parameters(recurse=False)
        }
    else:
        chosen = {name: param for name, param in named.items() if re.search(perturb, name)}

    trainable = {name: param for name, param in chosen.items() if param.requires_grad}
    if not trainable:
        raise ValueError(
            f"AMPConfig.perturb={perturb!r} matches no trainable parameter of "
            f"{type(model).__name__}, whose parameters are named like "
            f"{', '.join(list(named)[:3])}: use 'all', 'norm' or an expression that matches."
        )
    for name, param in trainable.items():
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Parameter {name} is {param.dtype}, in which a perturbation would round away: "
                "load the model with dtype=torch.float32 and set bf16=True or fp16=True in "
                "TrainingArguments, which computes in half precision over float32 parameters."
            )
    devices = {str(param.device): name for name, param in trainable.items()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"The perturbed parameters lie on several devices ({where}): load the model without a "
            "device_map that splits it."
        )
    sparse = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    for param in trainable.values():
        if id(param) in sparse:
            raise ValueError(
                f"Module {sparse[id(param)]} has sparse gradients, which cannot be perturbed: "
                "build it with sparse=False, or leave it out by AMPConfig.perturb."
            )
    return list({id(param): param for param in chosen.values()}.values())


class ModelTensors:
    """What a perturbed step touches of `model`: parameters, gradients and running statistics.

    Callbacks may freeze parameters and unfreeze them during training.
    """

    def __init__(
        self,
        model: nn.Module,
        perturb: str,
        optimizer: torch.optim.Optimizer | None,
        shard: Callable[[Tensor], Tensor],
    ) -> None:
        self.model = model
        self.norm_buffers = norm_buffers(model)
        self._perturb = perturb
        self._shard = shard
        self._perturbed = perturbed_parameters(model, perturb)
        # A loss function may have some that are not the model's.
        optimized = (
            [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        )
        self._all = list(dict.fromkeys([*model.parameters(), *optimized]))
        self._memory: dict[nn.Parameter, Tensor] = {}  # of a gradient, then of Δ, then of θ

    def trainable(self) -> list[nn.Parameter]:
        """All that a backward pass gives a gradient."""
        return [param for param in self._all if param.requires_grad]

    def perturbed(self) -> list[nn.Parameter]:
        """Those of them that are displaced. `ValueError` if there is none left."""
        params = [param for param in self._perturbed if param.requires_grad]
        return params or perturbed_parameters(self.model, self._perturb)

    @torch.no_grad()
    def zeros(self, params: list[nn.Parameter], fresh: bool) -> list[Tensor]:
        """Zeros shaped like the shards of `params`, in memory that is kept unless `fresh`.

        A CPU would otherwise map it in again, page by page, in every step.
        """
        if fresh or any(param not in self._memory for param in params):
            self._memory = dict(zip(params, joint_empty_like(list(map(self._shard, params)))))
        zeros = [self._memory[param] for param in params]
        for block in joint_blocks(zeros):
            block.zero_()
        return zeros
