"""What differs by engine: where parameters and gradients lie, and who reduces and steps when.

A step sees one interface, `Engine`. Only this module uses the private parts of engines;
CONTRIBUTING.md lists them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .blocks import JointTensors
from .compat import forget_gathered
from .config import AMPConfig, Ball, Scope
from .perturbation import Norms, Perturbation, local_norms
from .preserve import temporarily


class Engine:
    """One process, and DDP: each rank has all of every parameter, and a gradient of its own.

    Attributes:
        scopes: the values of `AMPConfig.scope` that are possible, the one that `None` means first.
    """

    scopes: tuple[Scope, ...] = ("micro_batch", "batch")

    def __init__(self, accelerator: Accelerator, scope: Scope | None) -> None:
        self.accelerator = accelerator
        self.scope = scope or self.scopes[0]

    def grad_scale(self) -> float | Tensor:
        """The factor that the backward pass puts on gradients: the fp16 GradScaler's, else 1."""
        if self.accelerator.scaler is None:
            return 1.0
        # `get_scale` would wait for the device.
        return self.accelerator.scaler.scale(torch.ones((), device=self.accelerator.device))

    def reshard(self, model: nn.Module) -> None:
        """Frees what a pass has gathered: the parameters are this rank's shards again."""

    def shard(self, param: Tensor) -> Tensor:
        """The part of `param` that this rank keeps: a view, through which it can be changed."""
        return param

    @contextlib.contextmanager
    def inner_passes(
        self, model: Any, params: list[nn.Parameter], gradient: JointTensors, last: bool
    ) -> Iterator[None]:
        """Around the passes of one ascent, which find no gradients accumulated and step nothing.

        Args:
            params: the perturbed parameters.
            gradient: zeros, shaped like their shards. When the body has ended it holds the sum of
                the gradients of its backward passes: under `scope="batch"` the mean over all ranks,
                else of this rank alone, without any communication of gradients.
            last: whether the Trainer's pass that follows is the last of its optimizer step.
        """
        with self._accumulating_in(params, gradient), self.accelerator.no_sync(model):
            yield
        if self.scope == "batch" and self.accelerator.num_processes > 1:
            for block in gradient.blocks:
                block.div_(self.accelerator.num_processes)
                distributed.all_reduce(block)

    @contextlib.contextmanager
    def _accumulating_in(
        self, params: list[nn.Parameter], gradient: JointTensors
    ) -> Iterator[None]:
        given = [self._whole_gradient(param, shard) for param, shard in zip(params, gradient)]
        for param, zeros in zip(params, given):
            param.grad = zeros
        yield
        for param, zeros, shard in zip(params, given, gradient):
            if param.grad is not None and param.grad is not zeros:  # a trainer wiped it
                shard.copy_(self.shard(param.grad))

    def perturbation(
        self, params: list[nn.Parameter], model: nn.Module, epsilon: float, ball: Ball
    ) -> Perturbation:
        """Δ = 0 for `params`."""
        with torch.no_grad():
            shards = [self.shard(param) for param in params]
        norms, moved = self._norms(params), functools.partial(self._moved, model)
        return Perturbation(shards, epsilon, ball, norms, moved)

    def outer_pass(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Around the Trainer's own pass, at θ + Δ."""
        return contextlib.nullcontext()

    def before_optimizer_step(
        self, model: Any, restore: Callable[[], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Calls `restore` before an optimizer steps within the body, where one does."""
        return contextlib.nullcontext()

    def at_theta(self, perturbation: Perturbation) -> contextlib.AbstractContextManager[None]:
        """Inside, the parameters can be saved, whatever was interrupted.

        Raises:
            RuntimeError: where they are sharded, in the middle of a step.
        """
        return perturbation.at_theta()

    def _whole_gradient(self, param: Tensor, shard: Tensor) -> Tensor:
        """A gradient for `param` of which `shard` is what this rank keeps."""
        return shard

    def _norms(self, params: list[nn.Parameter]) -> Norms:
        """Of tensors that lie as `params` do."""
        return local_norms

    def _moved(self, model: nn.Module) -> None:
        """After the shards were changed."""
        # Where a subclass computes around the whole step in autocast, its cache holds casts of θ.
        torch.clear_autocast_cache()


class _Sharded(Engine):
    """Each rank keeps a shard of every parameter, and all ranks gather the same θ + Δ."""

    scopes = ("batch",)

    def _norms(self, params: list[nn.Parameter]) -> Norms:
        roots = [math.sqrt(self._copies(param)) for param in params]

        def norms(shards: list[Tensor]) -> Tensor:
            """By one reduction for all of them, in which a shard counts as often as it is kept."""
            parts = torch._foreach_norm(shards)
            torch._foreach_div_(parts, roots)
            local = torch.stack(parts)
            squares = local.to(self.accelerator.device).square()
            distributed.all_reduce(squares)
            return squares.sqrt().to(local)

        return norms

    def at_theta(self, perturbation: Perturbation) -> contextlib.AbstractContextManager[None]:
        # The ranks would have to gather it together, and the pass that was interrupted may have.
        raise RuntimeError(
            "The model cannot be saved in the middle of a perturbed step, where its parameters are "
            "displaced: set `trainer.control.should_save`, which saves it after the step."
        )

    def _copies(self, param: Any) -> int:
        """How many ranks keep this rank's shard of `param`."""
        raise NotImplementedError


class _FSDP2(_Sharded):
    """torch.distributed.fsdp.fully_shard."""

    def shard(self, param: Tensor) -> Tensor:
        return param.to_local() if isinstance(param, DTensor) else param

    def _copies(self, param: Tensor) -> int:
        shards = 1
        if isinstance(param, DTensor):
            for size, placement in zip(param.device_mesh.shape, param.placements):
                shards *= 1 if placement.is_replicate() else size
        return self.accelerator.num_processes // shards

    @contextlib.contextmanager
    def inner_passes(
        self, model: Any, params: list[nn.Parameter], gradient: JointTensors, last: bool
    ) -> Iterator[None]:
        # Whether the pass that follows reduces its gradient, which torch keeps to itself.
        options = self.accelerator.gradient_state.plugin_kwargs
        synchronized = (
            last
            or options.get("sync_each_batch", False)
            or not self.accelerator.is_fsdp2  # the model was sharded by others
        )
        # Every pass is reduced: the shards accumulate, and no whole gradient is kept.
        model.set_requires_gradient_sync(True)
        try:
            with self._accumulating_in(params, gradient), self.outer_pass(model):
                yield
        finally:
            model.set_requires_gradient_sync(synchronized)

    @contextlib.contextmanager
    def outer_pass(self, model: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            forget_gathered(model)  # else what it gathered at θ + Δ would be computed with
            raise
        if next(model.parameters()).device.type != self.accelerator.device.type:
            # Offloaded. Copies may still be under way to the device: nothing waits for them where
            # the pass reduces no gradient, and θ is about to be written over what they copy.
            torch.accelerator.synchronize()

    def reshard(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _moved(self, model: nn.Module) -> None:
        super()._moved(model)
        self.reshard(model)

    def _whole_gradient(self, param: Tensor, shard: Tensor) -> Tensor:
        if not isinstance(param, DTensor):
            return shard
        return DTensor.from_local(
            shard,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )


class _DeepSpeed(Engine):
    """DeepSpeed's ZeRO-1 and 2: every rank has a replica of the parameters.

    The optimizer keeps a shard of its own and writes the replicas anew when it steps, which is
    within the backward pass of the last micro-batch (accelerate.utils.deepspeed).
    """

    @contextlib.contextmanager
    def inner_passes(
        self, model: Any, params: list[nn.Parameter], gradient: JointTensors, last: bool
    ) -> Iterator[None]:
        # What DeepSpeedEngine.coalesce_grad_reduction sets, without the reduction that it ends in:
        # gradients stay where autograd leaves them, and nothing is done to those accumulated.
        with (
            super().inner_passes(model, params, gradient, last),
            temporarily(self.accelerator, "sync_gradients", False),
            temporarily(model, "inside_no_sync_ctxt", True),
            temporarily(model.optimizer, "_coalesce_grad_reduction", True),
            temporarily(model.optimizer, "use_grad_accum_attribute", False),
        ):
            yield

    @contextlib.contextmanager
    def before_optimizer_step(self, model: Any, restore: Callable[[], None]) -> Iterator[None]:
        # Not by a hook on the optimizer within: partly offloaded ones are several.
        step = model.optimizer.step

        def step_at_theta(*args: Any, **kwargs: Any) -> Any:
            restore()
            return step(*args, **kwargs)

        with temporarily(model.optimizer, "step", step_at_theta):
            yield


class _DeepSpeed3(_Sharded, _DeepSpeed):
    """DeepSpeed's ZeRO-3: gradients are reduced onto the shards in every backward pass."""

    def shard(self, param: Any) -> Tensor:
        rank = distributed.get_rank(param.ds_process_group)
        size = param.ds_tensor.numel()
        padding = max(0, min(size, (rank + 1) * size - param.ds_numel))
        return param.ds_tensor[: size - padding]

    def _copies(self, param: Any) -> int:
        return self.accelerator.num_processes // distributed.get_world_size(param.ds_process_group)

    @contextlib.contextmanager
    def inner_passes(
        self, model: Any, params: list[nn.Parameter], gradient: JointTensors, last: bool
    ) -> Iterator[None]:
        optimizer = model.optimizer
        optimizer.clear_backward_seen_flag()  # brings the count up to date
        accumulated = optimizer.micro_step_id
        kept = optimizer.grad_partitions_flat_buffer
        aside = kept.clone() if accumulated else None
        # Otherwise, what an earlier pass left of a parameter that takes no part in this one stays.
        kept.zero_()
        optimizer.zero_grad()
        try:
            with temporarily(self.accelerator, "sync_gradients", False):
                yield
            sizes = {p: p.partition_numel() for group in optimizer.fp16_groups for p in group}
            reduced = dict(zip(sizes, kept.split(list(sizes.values()))))
            for param, shard in zip(params, gradient):
                shard.copy_(reduced[param][: shard.numel()])
        finally:
            optimizer.zero_grad()
            optimizer.micro_step_id = accumulated
            if aside is None:
                kept.zero_()
            else:
                kept.copy_(aside)

    def _moved(self, model: Any) -> None:
        from deepspeed.accelerator import get_accelerator

        super()._moved(model)
        model.optimizer.empty_partition_cache()
        model.optimizer.invalidate_secondary_tensor()  # ZeRO++ gathers from a second copy
        # DeepSpeed gathers on a stream that does not wait for this one; it does the same in `step`.
        get_accelerator().synchronize()


def engine_for(config: AMPConfig, accelerator: Accelerator, model: nn.Module) -> Engine:
    """The engine that `accelerator` drives, one that `check_engine` has let pass.

    Args:
        model: as `accelerator` prepared it, or not prepared yet.
    """
    kind = accelerator.distributed_type
    if isinstance(model, FSDPModule) or kind == DistributedType.FSDP:
        return _FSDP2(accelerator, config.scope)
    if kind == DistributedType.DEEPSPEED:
        zero3 = accelerator.state.deepspeed_plugin.zero_stage == 3
        return (_DeepSpeed3 if zero3 else _DeepSpeed)(accelerator, config.scope)
    return Engine(accelerator, config.scope)
