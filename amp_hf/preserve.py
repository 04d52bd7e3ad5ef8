"""State that a further pass must leave as it was: generators, buffers, gradients, attributes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .compat import foreach_clone

# The buffers of every BatchNorm (torch.nn.modules.batchnorm) and of those modelled on it.
_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


Buffer = tuple[nn.Module, str]  # a module, and the name of one of its buffers


def all_buffers(model: nn.Module) -> list[Buffer]:
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
    ]


def norm_buffers(model: nn.Module) -> list[Buffer]:
    """The running statistics of the model's normalization layers."""
    return [(module, name) for module, name in all_buffers(model) if name in _NORM_BUFFERS]


@contextlib.contextmanager
def preserved_buffers(buffers: list[Buffer]) -> Iterator[None]:
    """`buffers` are afterwards what they were before, whatever the body did to them.

    Copies, rather than switching the layers' tracking off: a compiled model is not compiled again.
    """
    before = [getattr(module, name) for module, name in buffers]
    # One kernel per kind: to launch one for each buffer costs a GPU more than the copies.
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for buffer in before:
        if buffer.is_contiguous() or not _is_expanded(buffer):
            kinds.setdefault((buffer.device, buffer.dtype), []).append(buffer)
    kept = [foreach_clone(kind) for kind in kinds.values()]
    try:
        yield
    finally:
        for (module, name), buffer in zip(buffers, before):
            if getattr(module, name) is not buffer:  # assigned anew, not changed in place
                setattr(module, name, buffer)
        with torch.no_grad():  # there are buffers that have a gradient
            for kind, copies in zip(kinds.values(), kept):
                torch._foreach_copy_(kind, copies)


def _is_expanded(buffer: Tensor) -> bool:
    """Whether `expand` made it, so that nothing can write into it."""
    return any(step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape))


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's, torch's and `device`'s generators go on as if the body had not run.

    A pass that follows therefore draws the same numbers as the body: the same dropout masks.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def gradients_set_aside(params: list[nn.Parameter]) -> Iterator[None]:
    """The accumulated gradients are afterwards what they were; inside, there are none at first."""
    accumulated = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, gradient in zip(params, accumulated):
            param.grad = gradient


@contextlib.contextmanager
def temporarily(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` inside. `AttributeError` where there is no such attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
