"""The mathematics of Adversarial Model Perturbation, on lists of tensors.

Algorithm 1 of Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation"
(CVPR 2021, arXiv 2010.04925), with θ `params`, Δ `delta`, ζ folded into `rate`, and ε `epsilon`:

    Δ ← Δ + ζ·∇L(θ + Δ)
    Δ ← Δ · min(1, ε / ‖Δ‖₂)

Everything runs in place and without waiting for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .config import Ball

Norms = Callable[[list[Tensor]], Tensor]


def local_norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each, in one tensor."""
    return torch.stack(torch._foreach_norm(tensors))


@torch.no_grad()
def project(
    delta: list[Tensor],
    params: Sequence[Tensor],
    epsilon: float,
    ball: Ball,
    rate: float | Tensor = 1.0,
    norms_of: Norms = local_norms,
) -> Tensor:
    """Δ ← project(rate · Δ), in place: what lies outside of the ball is scaled down onto it.

    Args:
        delta: Δ, one tensor a parameter, of the parameter's shape.
        params: θ, from which the radii of `ball="relative"` come.
        epsilon: radius ε in parameter units; for `"relative"` a fraction of each tensor's norm.
        ball: `"global"` (the paper), `"tensor"` (the authors' released code) or `"relative"`.
        rate: a float or a 0-dimensional tensor, > 0.
        norms_of: the norms of whole tensors, for `delta` and `params` that are shards of them.

    Returns:
        ‖Δ‖₂ after the projection, over all tensors together, 0-dimensional.

    A Δ that holds an infinity or a NaN anywhere becomes zero everywhere: there is no direction to
    ascend in, and the step is then taken at θ.
    """
    norms = rate * norms_of(delta)
    if ball == "global":
        norms = torch.linalg.vector_norm(norms)
    radii = epsilon * (norms_of(list(params)) if ball == "relative" else 1.0)
    shrink = torch.where(norms > radii, radii / norms, 1.0)

    finite = norms.isfinite().all()
    if not (finite.is_cpu and finite):  # elsewhere, looking at it would wait for the device
        for tensor in delta:
            tensor.nan_to_num_(0.0, 0.0, 0.0)  # 0 * inf would be NaN
    scale = torch.where(finite, rate * shrink, 0.0)
    torch._foreach_mul_(delta, scale if ball == "global" else list(scale.unbind()))
    return torch.where(finite, torch.linalg.vector_norm(norms * shrink), 0.0)


def joint_empty_like(params: Sequence[Tensor]) -> list[Tensor]:
    """`torch.empty_like` of each, side by side in one block of memory."""
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for param in params:
        sizes[param.device, param.dtype] += param.numel()
    blocks = {kind: torch.empty(n, device=kind[0], dtype=kind[1]) for kind, n in sizes.items()}
    tensors = []
    for param in params:
        kind = param.device, param.dtype
        tensor, blocks[kind] = blocks[kind].tensor_split([param.numel()])
        # Dense strides: those of a parameter that is a slice of something would overlap.
        stride = torch.empty_like(param, device="meta").stride()
        tensors.append(tensor.as_strided(param.shape, stride))
    return tensors


class Perturbation:
    """The parameters at θ + Δ, and the way back to θ.

    The tensors that bring the ascent direction in keep θ while the parameters are displaced, so an
    ascent takes the memory of one copy of the parameters, and of the largest of them while the two
    change places; a further one takes another copy until it has replaced the first. θ is copied,
    never recomputed, so `restore` is exact to the bit; it may be called at any moment, also after
    an interrupt in the middle of any method here.

    Args:
        norms: where `params` are shards: the norms of the whole tensors.
        moved: called whenever the parameters have been changed.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        epsilon: float,
        ball: Ball,
        norms: Norms = local_norms,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.params = params
        self.epsilon = epsilon
        self.ball = ball
        self._norms = norms
        self._moved = moved
        # Groups of (parameters, the tensors that hold their θ) and (parameters, their θ + Δ).
        self._originals: list[tuple[list[Tensor], list[Tensor]]] = []
        self._displaced: list[tuple[list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def ascend(self, gradient: list[Tensor], rate: float | Tensor) -> Tensor:
        """Δ ← project(Δ + rate · gradient), and the parameters go to θ + Δ.

        Args:
            gradient: ∇L at the parameters as they are now, one tensor a parameter. Overwritten.
            rate: ζ over the scale of the loss; a float or a 0-dimensional tensor.

        Returns:
            ‖Δ‖₂, 0-dimensional.
        """
        if self._originals:
            torch._foreach_mul_(gradient, rate)
            rate = 1.0
            # Δ is what rounding left of it in θ + Δ: where the gradient was really taken.
            for (params, originals), ascent in zip(self._originals, self._groups(gradient)):
                torch._foreach_add_(ascent, torch._foreach_sub(params, originals))
            self.restore()
        norm = project(gradient, self.params, self.epsilon, self.ball, rate, self._norms)
        for params, delta in zip(self._groups(self.params), self._groups(gradient)):
            self._displace(params, delta, torch._foreach_add_)
        self._moved()
        return norm

    @torch.no_grad()
    def leave(self) -> None:
        """Puts θ back and keeps θ + Δ for `enter`."""
        while self._originals:
            params, originals = self._originals[-1]
            displaced = torch._foreach_clone(params)
            torch._foreach_copy_(params, originals)
            self._originals.pop()
            torch._foreach_copy_(originals, displaced)
            self._displaced.append((params, originals))
            del displaced  # before the next group's copy is made
        self._moved()

    @torch.no_grad()
    def enter(self) -> None:
        """Takes the parameters to the θ + Δ that `leave` kept."""
        while self._displaced:
            self._displace(*self._displaced.pop(), torch._foreach_copy_)
        self._moved()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts θ back and forgets Δ. Where the parameters are θ already, it does nothing."""
        if self._originals:
            for params, originals in self._originals:
                torch._foreach_copy_(params, originals)
            self._originals.clear()
            self._moved()

    def _displace(
        self,
        params: list[Tensor],
        other: list[Tensor],
        write: Callable[[list[Tensor], list[Tensor]], object],
    ) -> None:
        """`write(params, other)`, then θ into `other`; θ is on record at every moment."""
        originals = list(torch._foreach_clone(params))
        self._originals.append((params, originals))
        write(params, other)
        torch._foreach_copy_(other, originals)
        self._originals[-1] = (params, other)

    def _groups(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """`tensors` (aligned with the parameters) in runs no larger than the largest parameter."""
        largest = max(param.numel() for param in self.params)
        group: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if size + tensor.numel() > largest:
                yield group
                group, size = [], 0
            group.append(tensor)
            size += tensor.numel()
        yield group
