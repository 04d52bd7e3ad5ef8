"""How flat is this minimum: the loss around a model's parameters, measured.

    surface = LossSurface(model, dataloader)
    surface.worst_case_rise(0.1)
    measure(surface)                          # all of it, with a progress bar

Four measures, none of which stands for the others:

    worst-case rise   max of L(θ + Δ) − L(θ) over ‖Δ‖₂ ≤ r, by the ascents of Algorithm 1 of Zheng
                      et al., CVPR 2021 (arXiv 2010.04925)
    random rise       mean of L(θ + s·d) − L(θ) over random directions d that are as long as θ is,
                      filter by filter: Li et al., NeurIPS 2018 (arXiv 1712.09913), section 4
    top eigenvalue    of the Hessian of L, by power iteration on Hessian-vector products
                      (Pearlmutter 1994)
    trace             of the Hessian of L, by Hutchinson's estimator (1990)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import JointTensors
from .compat import foreach_clone
from .loss_function import GRADIENT_COST, HESSIAN_PRODUCT_COST, LossFunction, Vector
from .perturbation import Perturbation


@dataclass(frozen=True)
class Rise:
    """L(θ + s·d) − L(θ) over random directions d, in the unit of the loss; `std`: its deviation."""

    mean: float
    std: float
    values: list[float]


@dataclass(frozen=True)
class Eigenvalue:
    """`value` is λ. Some eigenvalue of the Hessian H lies within `residual` of it.

    That is ‖Hv − λv‖₂, where v is the unit vector that was found. The unit is that of the loss per
    squared parameter unit.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """The mean of `values`, one for each probe, and its standard error."""

    mean: float
    standard_error: float
    values: list[float]


@dataclass(frozen=True)
class Flatness:
    """What `measure` found. Losses and their rises are in the unit of the loss.

    Attributes:
        samples: how many the loss is the mean of.
        seed: of all random directions and probes.
        loss: L(θ).
        radius: of `worst_case_rise`, in parameter units.
        scale: s of `random_rise`, in lengths of θ: each filter of d has the norm of θ's.
    """

    samples: int
    seed: int
    loss: float
    radius: float
    worst_case_rise: float
    scale: float
    random_rise: Rise
    top_eigenvalue: Eigenvalue
    trace: Trace

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class LossSurface(LossFunction):
    """How the loss behaves around θ: the measures of this module, on a `LossFunction`.

    Every random measure starts from the same seed.
    """

    def worst_case_rise(self, radius: float, steps: int = 10) -> float:
        """The largest L(θ + Δ) − L(θ) that `worst_case` finds."""
        return self.worst_case(radius, steps)[0]

    @torch.no_grad()
    def worst_case(self, radius: float, steps: int = 10) -> tuple[float, list[Tensor]]:
        """The largest L(θ + Δ) − L(θ) that `steps` ascents find within ‖Δ‖₂ ≤ `radius`, and its Δ.

        Δ ← project(Δ + ζ·∇L(θ + Δ)), with ascents as long as the radius: ζ = r / ‖∇L‖₂. The rise is
        a lower bound of the maximum, >= 0, and a NaN as soon as a loss is one. Where ∇L(θ) is zero,
        the first ascent goes in a random direction.

        Args:
            radius: > 0, in parameter units, over all trainable parameters together.
            steps: >= 1.
        """
        _check_positive(radius=radius)
        _check_at_least(1, steps=steps)
        theta = foreach_clone(self.params)
        perturbation = Perturbation(self.params, radius, "global")
        clean, gradient = self.loss_and_gradient()
        loss, worst, delta = clean, clean, [torch.zeros_like(param) for param in theta]
        try:
            for step in range(1, steps + 1):
                length = norm(gradient)
                if math.isnan(loss) or math.isnan(length):
                    return math.nan, delta
                if not length:
                    gradient = self.gaussian(self.generator())
                    length = norm(gradient)
                perturbation.ascend(JointTensors.copy_of(gradient), radius / length)
                if step < steps:
                    loss, gradient = self.loss_and_gradient()
                else:
                    loss = self.loss()
                if not loss <= worst:
                    worst, delta = loss, list(torch._foreach_sub(list(self.params), theta))
        finally:
            perturbation.restore()
        return worst - clean, delta

    def random_rise(self, scale: float, directions: int = 10) -> Rise:
        """L(θ + s·d) − L(θ) over filter-normalized random directions d, and its spread.

        Args:
            scale: s, the distance in lengths of θ: 0.1 moves every filter by a tenth of its norm.
            directions: how many, >= 2.
        """
        _check_at_least(2, directions=directions)
        generator = self.generator()
        clean = self.loss()
        values = [
            self.along(self.random_direction(generator), [scale])[0] - clean
            for _ in range(directions)
        ]
        return Rise(*_mean_and_std(values), values)

    def top_eigenvalue(self, max_iterations: int = 50, tolerance: float = 0.01) -> Eigenvalue:
        """The largest eigenvalue λ of the Hessian, until ‖Hv − λv‖₂ <= `tolerance`·|λ|.

        Power iteration finds the eigenvalue of largest magnitude. If that one is negative, a second
        iteration runs on H − λI, whose largest eigenvalue has the eigenvector of H's largest.
        """
        _check_at_least(1, max_iterations=max_iterations)
        generator = self.generator()
        vector = _unit(self.gaussian(generator))
        shift, value, residual, converged = 0.0, 0.0, 0.0, False
        iterations = 0
        while iterations < max_iterations:
            iterations += 1
            product = self.hessian_product(vector)
            value = _dot(vector, product)
            residual = norm(torch._foreach_sub(product, torch._foreach_mul(vector, value)))
            converged = residual <= tolerance * abs(value)
            if converged and (value >= 0 or shift):
                break
            if converged:
                shift, vector, converged = value, _unit(self.gaussian(generator)), False
            else:
                torch._foreach_sub_(product, torch._foreach_mul(vector, shift))
                vector = _unit(product)
        return Eigenvalue(value, residual, iterations, converged)

    def trace(self, probes: int = 20) -> Trace:
        """The Hessian's trace: the mean of vᵀHv over vectors v of random signs.

        Args:
            probes: how many, >= 2.
        """
        _check_at_least(2, probes=probes)
        generator = self.generator()
        values = []
        for _ in range(probes):
            coins = self.random(lambda shape: torch.randint(2, shape, generator=generator))
            signs = [2 * coin - 1 for coin in coins]
            values.append(_dot(signs, self.hessian_product(signs)))
        mean, std = _mean_and_std(values)
        return Trace(mean, std / probes**0.5, values)


def measure(
    surface: LossSurface,
    radius: float = 0.1,
    scale: float = 0.2,
    steps: int = 10,
    directions: int = 10,
    max_iterations: int = 50,
    probes: int = 20,
) -> Flatness:
    """All measures of `surface`; what they cost at most is said before they start.

    Args:
        radius, steps: of `LossSurface.worst_case_rise`.
        scale, directions: of `LossSurface.random_rise`.
        max_iterations: of `LossSurface.top_eigenvalue`.
        probes: of `LossSurface.trace`.

    Raises:
        ValueError: a radius or a count that is too small, before anything is measured.
    """
    _check_positive(radius=radius)
    _check_at_least(1, steps=steps, max_iterations=max_iterations)
    _check_at_least(2, directions=directions, probes=probes)
    cost = (
        2 + worst_case_cost(steps) + directions + (max_iterations + probes) * HESSIAN_PRODUCT_COST
    )
    with surface.announced("Flatness", cost):
        return Flatness(
            samples=surface.samples,
            seed=surface.seed,
            loss=surface.loss(),
            radius=radius,
            worst_case_rise=surface.worst_case_rise(radius, steps),
            scale=scale,
            random_rise=surface.random_rise(scale, directions),
            top_eigenvalue=surface.top_eigenvalue(max_iterations),
            trace=surface.trace(probes),
        )


def worst_case_cost(steps: int) -> int:
    """Of `LossSurface.worst_case`, in forward passes."""
    return steps * GRADIENT_COST + 1


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")


def _check_at_least(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count!r}.")


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item()


def _dot(a: Vector, b: Vector) -> float:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum().item()


def norm(vector: Vector) -> float:
    return torch.nn.utils.get_total_norm(list(vector)).item()


def _unit(vector: Vector) -> list[Tensor]:
    return list(torch._foreach_div(list(vector), norm(vector)))
