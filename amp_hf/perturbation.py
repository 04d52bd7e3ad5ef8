"""The mathematics of Adversarial Model Perturbation, on lists of tensors.

Algorithm 1 of Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation"
(CVPR 2021, arXiv 2010.04925), with θ `params`, Δ `delta`, ζ folded into `rate`, and ε `epsilon`:

    Δ ← Δ + ζ·∇L(θ + Δ)
    Δ ← Δ · min(1, ε / ‖Δ‖₂)

With an elementwise ball, the same for θ, Δ and the gradient in units of T = |θ| + 0.01, as ASAM has
it (Kwon et al., ICML 2021, arXiv 2102.11600): Δ/T ← project(Δ/T + ζ·T·∇L(θ + Δ)).

Everything runs in place and without waiting for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .blocks import JointTensors, groups_of
from .compat import foreach_clone
from .config import Ball

_LEAST_UNIT = 0.01  # of an elementwise ball: so that a weight of 0 is perturbed, too

Norms = Callable[[list[Tensor]], Tensor]


def local_norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each, in one tensor."""
    return torch.stack(torch._foreach_norm(tensors))


@torch.no_grad()
def shrinkage(
    delta: JointTensors,
    epsilon: float,
    ball: Ball,
    rate: float | Tensor = 1.0,
    norms_of: Norms = local_norms,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor]:
    """The factor that takes `delta` to the projection of rate · Δ onto the ball.

    What lies outside of the ball is scaled down onto it; what lies inside is only multiplied by
    `rate`. If Δ holds an infinity or a NaN anywhere, the factor is 0 and such entries are zeroed:
    there is no direction to ascend in, and the step is then taken at θ.

    Args:
        delta: Δ, one tensor for each parameter, of the parameter's shape.
        epsilon: radius ε in parameter units, or in units of T.
        ball: `"global"` (the paper), `"tensor"` (the authors' released code) or `"elementwise"`,
            which is a global one for a `delta` in units of T.
        rate: a float or a 0-dimensional tensor, > 0.
        norms_of: the norms of whole tensors, where `delta` holds shards of them.

    Returns:
        The factor, or one for each tensor if the ball is `"tensor"`; the norm of rate · Δ after
        the projection, over all tensors together; and the slope: to first order, a loss whose
        gradient is rate · Δ rises by at most ε times this within the ball. All are 0-dimensional.
    """
    norms = rate * norms_of(delta.tensors)
    if ball != "tensor":
        norms = torch.linalg.vector_norm(norms)
    shrink = torch.where(norms > epsilon, epsilon / norms, 1.0)

    finite = norms.isfinite().all()
    if not (finite.is_cpu and finite):  # elsewhere, looking at it would wait for the device
        for block in delta.blocks:
            block.nan_to_num_(0.0, 0.0, 0.0)  # 0 * inf would be NaN
    scale = torch.where(finite, rate * shrink, 0.0)
    norm = torch.where(finite, torch.linalg.vector_norm(norms * shrink), 0.0)
    slope = torch.where(finite, norms.sum(), 0.0)
    return (scale.unbind() if ball == "tensor" else scale), norm, slope


def _nothing_more() -> None:
    pass  # no lambda, so that a trainer can be pickled


class Perturbation:
    """The parameters at θ + Δ, and the way back to θ.

    While the parameters are displaced, θ lies in the tensors that held the gradient. So an ascent
    takes the memory of one copy of the parameters, and of one group of them while the two change
    places; a further ascent takes another copy until it has replaced the first. θ is copied, never
    recomputed, so `restore` is exact to the bit. It may be called at any moment, also after an
    interrupt in the middle of any method here.

    Args:
        params: θ, displaced in place; shards where the engine shards.
        epsilon: radius ε in parameter units, or in units of T where the ball is elementwise.
        ball: as `shrinkage` takes it.
        norms: where `params` are shards: the norms of the whole tensors.
        moved: called whenever the parameters have been changed.

    Attributes:
        slope: `slope_of` the first ascent's gradient, times its rate; 0-dimensional.
    """

    slope: Tensor

    def __init__(
        self,
        params: Sequence[Tensor],
        epsilon: float,
        ball: Ball,
        norms: Norms = local_norms,
        moved: Callable[[], None] = _nothing_more,
    ) -> None:
        self.params = params
        self._groups = groups_of(params)
        self.epsilon = epsilon
        self.ball = ball
        self._norms = norms
        self._moved = moved
        # (parameters, the tensors that hold their θ), group by group in the order of displacement,
        # and (parameters, the tensors that hold what `suspend` kept of them).
        self._originals: list[tuple[list[Tensor], list[Tensor]]] = []
        self._kept: list[tuple[list[Tensor], list[Tensor]]] = []
        self._theta_moves = False

    @property
    def is_displaced(self) -> bool:
        return bool(self._originals)

    @torch.no_grad()
    def slope_of(self, gradient: JointTensors) -> Tensor:
        """How far the longest Δ in a ball of radius 1 raises the loss, were it linear."""
        self._change_units(gradient, torch._foreach_mul_)
        norms = self._norms(gradient.tensors)
        self._change_units(gradient, torch._foreach_div_)  # but for rounding, what it was
        return norms.sum() if self.ball == "tensor" else torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def ascend(self, gradient: JointTensors, rate: float | Tensor) -> Tensor:
        """Δ ← project(Δ + rate · gradient), and the parameters go to θ + Δ.

        Args:
            gradient: ∇L at the parameters as they are now, one tensor for each. Overwritten.
            rate: ζ over the scale of the loss; a float or a 0-dimensional tensor.

        Returns:
            ‖Δ‖₂, or ‖Δ/T‖₂ where the ball is elementwise; 0-dimensional.
        """
        if isinstance(rate, Tensor):  # the scaler's may be elsewhere than offloaded parameters
            rate = rate.to(self.params[0].device)
        is_first = not self._originals
        if is_first:
            self._change_units(gradient, torch._foreach_mul_)
        else:
            self._add_delta(gradient, rate)
            rate = 1.0
        factor, norm, slope = shrinkage(gradient, self.epsilon, self.ball, rate, self._norms)
        if is_first:
            self.slope = slope
        for group in self._groups:
            delta, params = group.of(gradient), group.of(self.params)
            if self.ball == "elementwise":  # from Δ/T to Δ
                torch._foreach_mul_(delta, _units(params))
            torch._foreach_mul_(
                delta, factor if isinstance(factor, Tensor) else group.factors(factor)
            )
            self._displace(params, delta, torch._foreach_add_)
        self._moved()
        return norm

    def _add_delta(self, gradient: JointTensors, rate: float | Tensor) -> None:
        """gradient ← Δ + rate · gradient, in units of the ball, and the parameters go back to θ.

        Δ is what rounding left of it in θ + Δ: where the gradient was really taken.
        """
        for group, (params, originals) in zip(self._groups, self._originals):
            ascent = group.of(gradient)
            torch._foreach_mul_(ascent, rate)
            if self.ball == "elementwise":
                units = _units(originals)
                torch._foreach_mul_(ascent, units)
                torch._foreach_addcdiv_(ascent, torch._foreach_sub(params, originals), units)
            else:
                torch._foreach_add_(ascent, torch._foreach_sub(params, originals))
        self.restore()

    def _change_units(
        self, tensors: JointTensors, change: Callable[[list[Tensor], list[Tensor]], object]
    ) -> None:
        """`change(tensors, T)`, if the ball has units; T is that of the parameters' present θ."""
        if self.ball == "elementwise":
            for group in self._groups:
                change(group.of(tensors), _units(group.of(self.params)))

    @torch.no_grad()
    def suspend(self, theta_moves: bool = False) -> None:
        """Puts θ back and keeps θ + Δ for `resume`, or Δ where θ will have moved by then."""
        if not self._originals:
            return
        self._theta_moves = theta_moves
        while self._originals:
            params, originals = self._originals[-1]
            kept = foreach_clone(params)
            torch._foreach_copy_(params, originals)
            self._originals.pop()
            if theta_moves:
                torch._foreach_sub_(kept, params)
            torch._foreach_copy_(originals, kept)
            self._kept.append((params, originals))
            del kept  # before the next group's copy is made
        self._moved()

    @torch.no_grad()
    def resume(self) -> None:
        """Takes the parameters to the θ + Δ that `suspend` kept, or by the Δ that it kept."""
        write = torch._foreach_add_ if self._theta_moves else torch._foreach_copy_
        while self._kept:
            self._displace(*self._kept.pop(), write)
        self._moved()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts θ back and forgets Δ. Where the parameters are θ already, it does nothing."""
        if self._originals:
            # Newest first: where two parameters share memory, the older one's original is θ.
            for params, originals in reversed(self._originals):
                torch._foreach_copy_(params, originals)
            self._moved()
            self._originals.clear()

    @contextlib.contextmanager
    def at_theta(self) -> Iterator[None]:
        """The parameters are θ inside and afterwards what they were, whatever was interrupted."""
        # `data`, so that autograd does not see the change: an interrupted pass may still have to
        # go backward through these parameters.
        records = [
            ([param.data for param in params], originals) for params, originals in self._originals
        ]
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        try:
            for params, originals in reversed(records):
                kept.append((params, foreach_clone(params)))
                torch._foreach_copy_(params, originals)
            yield
        finally:
            for params, displaced in reversed(kept):
                torch._foreach_copy_(params, displaced)

    def _displace(
        self,
        params: list[Tensor],
        other: list[Tensor],
        write: Callable[[list[Tensor], list[Tensor]], object],
    ) -> None:
        """`write(params, other)`, then θ into `other`; θ is on record at every moment."""
        originals = foreach_clone(params)
        self._originals.append((params, originals))
        write(params, other)
        torch._foreach_copy_(other, originals)
        self._originals[-1] = (params, other)


def _units(theta: list[Tensor]) -> list[Tensor]:
    """T of an elementwise ball."""
    units = torch._foreach_abs(theta)
    torch._foreach_add_(units, _LEAST_UNIT)
    return list(units)
