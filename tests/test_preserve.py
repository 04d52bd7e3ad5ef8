import random

import numpy as np
import pytest
import torch
from support import rng_states
from torch import nn

from amp_hf.preserve import all_buffers, norm_buffers, preserved_buffers, preserved_rng


class Model(nn.Module):
    """Every kind of tracked statistics, and buffers that are none."""

    def __init__(self):
        super().__init__()
        self.flat = nn.BatchNorm1d(3)
        self.deep = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.SyncBatchNorm(3)))
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.layer = nn.LayerNorm(3)
        self.register_buffer("positions", torch.arange(3))
        self.register_buffer("my_running_mean", torch.zeros(3))


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_norm_buffers_are_the_running_statistics_of_every_layer_and_nothing_else():
    model = Model()
    names = {module: name for name, module in model.named_modules()}
    layers = ("flat", "deep.0", "deep.1.0", "instance")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = [f"{layer}.{name}" for layer in layers for name in statistics]
    assert [f"{names[module]}.{name}" for module, name in norm_buffers(model)] == expected


def test_buffers_that_are_expanded_or_have_a_gradient_are_preserved_as_well():
    module = nn.Module()
    module.register_buffer("mask", torch.ones(1, 3).expand(4, -1))
    module.register_buffer("scale", torch.ones(3, requires_grad=True))
    mask = module.mask
    with preserved_buffers(all_buffers(module)):
        module.mask = module.mask * 2
        with torch.no_grad():
            module.scale += 1
    assert module.mask is mask and torch.equal(module.scale, torch.ones(3))


def test_a_model_without_running_statistics_has_nothing_to_preserve():
    assert norm_buffers(nn.LayerNorm(3)) == []


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_preserved_buffers_are_in_place_what_they_were_also_after_an_error(error):
    layer = nn.BatchNorm1d(4)
    layer(torch.randn(8, 4))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    try:
        with preserved_buffers(norm_buffers(layer)):
            layer(torch.randn(8, 4))
            assert layer.num_batches_tracked == 2
            assert not torch.equal(layer.running_mean, before["running_mean"])
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert [buffer.data_ptr() for buffer in layer.buffers()] == places


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_preserved_generators_go_on_as_if_nothing_had_been_drawn_also_after_an_error(error):
    before = rng_states()
    try:
        with preserved_rng(torch.device("cpu")):
            assert rng_states() == before  # the body draws what follows it will draw
            inside = draw()
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error
    assert rng_states() == before
    assert draw() == inside
    assert rng_states() != before


@pytest.mark.gpu
def test_the_generator_of_the_device_is_preserved_too():
    device = torch.device("cuda", 0)
    with preserved_rng(device):
        inside = torch.rand(4, device=device)
    assert torch.equal(torch.rand(4, device=device), inside)


def test_statistics_that_a_layer_assigns_anew_are_kept_too():
    class Reassigning(nn.BatchNorm1d):
        def forward(self, x):
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0)
            return x - self.running_mean

    layer = Reassigning(4)
    mean, before = layer.running_mean, layer.running_mean.clone()
    with preserved_buffers(norm_buffers(layer)):
        layer(torch.randn(8, 4))
        assert layer.running_mean is not mean
    assert layer.running_mean is mean  # where a compiled graph, say, looks for it
    assert torch.equal(mean, before)
