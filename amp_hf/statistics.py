"""State that a further pass must not disturb: generators, norm buffers, accumulated gradients."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

# The buffers of every BatchNorm (torch.nn.modules.batchnorm) and of those modelled on it.
_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def norm_buffers(model: nn.Module) -> list[Tensor]:
    """The running statistics of the model's normalization layers."""
    return [b for name, b in model.named_buffers() if name.rpartition(".")[2] in _NORM_BUFFERS]


@contextlib.contextmanager
def preserved_buffers(buffers: list[Tensor]) -> Iterator[None]:
    """`buffers` are afterwards what they were before, whatever the body did to them in place.

    Copies, rather than switching the layers' tracking off: a compiled model is not compiled again.
    """
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        if buffers:
            torch._foreach_copy_(buffers, kept)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Python's, NumPy's, torch's and `device`'s generators go on as if the body had not run.

    A pass that follows so draws the numbers that the body drew: the same dropout masks.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
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
