import pytest
import torch
from support import ConvNet, differing, digits, make, weights
from torch import nn

from amp_hf.flatness import sharpness


class Quadratic(nn.Module):
    """L(θ) = ½ Σ hᵢ θᵢ²."""

    def __init__(self, curvature, theta):
        super().__init__()
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self):
        return {"loss": (self.curvature * self.theta**2).sum() / 2}


def test_sharpness_of_a_bowl_is_the_closed_form():
    # Along the only direction with curvature: ½h((θ + r)² - θ²).
    model = Quadratic([4.0, 0.0], [0.5, 3.0])
    expected = 2.0 * ((0.5 + 0.1) ** 2 - 0.5**2)
    assert sharpness(model, {}, 0.1) == pytest.approx(expected, abs=1e-12)


def test_more_ascents_find_a_point_at_least_as_bad():
    model = Quadratic([10.0, 1.0], [0.01, 1.0])
    one, five, many = (sharpness(model, {}, 0.5, inner_steps=n) for n in (1, 5, 50))
    # The worst of all points of the sphere, by search.
    angle = torch.linspace(0, 2 * torch.pi, 100_001, dtype=torch.float64)
    x, y = 0.01 + 0.5 * angle.cos(), 1.0 + 0.5 * angle.sin()
    worst = ((10 * x**2 + y**2) / 2).max() - (10 * 0.01**2 + 1) / 2
    assert one < five < many <= worst + 1e-9
    assert many == pytest.approx(worst.item(), rel=0.01)


def test_measuring_leaves_weights_buffers_mode_and_gradients_as_they_were():
    model = make(ConvNet).train()
    samples = digits()[:64]
    batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
    before = weights(model)
    assert sharpness(model, batch, 0.5) > 0
    assert differing(before, weights(model)) == []
    assert model.training
    assert all(param.grad is None for param in model.parameters())
