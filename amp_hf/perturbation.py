"""The mathematics of Adversarial Model Perturbation, on lists of tensors.

Algorithm 1 of Zheng et al., "Regularizing Neural Networks via Adversarial Model Perturbation"
(CVPR 2021, arXiv 2010.04925), with θ `params`, Δ `delta`, ζ folded into `rate`, and ε `epsilon`:

    Δ ← Δ + ζ·∇L(θ + Δ)
    Δ ← Δ · min(1, ε / ‖Δ‖₂)

Everything runs in place and without waiting for the device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import Ball

Norms = Callable[[list[Tensor]], Tensor]

_Piece = tuple[int, Any]  # a tensor, by its number, and which of its rows
_CACHED = 2**18  # elements that lie in a core's cache together with two copies


def local_norms(tensors: list[Tensor]) -> Tensor:
    """The L2 norm of each, in one tensor."""
    return torch.stack(torch._foreach_norm(tensors))


@torch.no_grad()
def shrinkage(
    delta: list[Tensor],
    params: Sequence[Tensor],
    epsilon: float | Tensor,
    ball: Ball,
    rate: float | Tensor = 1.0,
    norms_of: Norms = local_norms,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """The factor, one a tensor unless the ball is global, that `project` multiplies `delta` by.

    It changes nothing of `delta` but, where that is needed, entries that are not finite.

    Returns:
        The factor or factors, and ‖Δ‖₂ after the projection, all 0-dimensional.
    """
    norms = rate * norms_of(delta)
    if ball == "global":
        norms = torch.linalg.vector_norm(norms)
    radii = epsilon * (norms_of(list(params)) if ball == "relative" else 1.0)
    shrink = torch.where(norms > radii, radii / norms, 1.0)

    finite = norms.isfinite().all()
    if not (finite.is_cpu and finite):  # elsewhere, looking at it would wait for the device
        for block in joint_blocks(delta):
            block.nan_to_num_(0.0, 0.0, 0.0)  # 0 * inf would be NaN
    scale = torch.where(finite, rate * shrink, 0.0)
    norm = torch.where(finite, torch.linalg.vector_norm(norms * shrink), 0.0)
    return (scale if ball == "global" else scale.unbind()), norm


@torch.no_grad()
def project(
    delta: list[Tensor],
    params: Sequence[Tensor],
    epsilon: float | Tensor,
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
    factor, norm = shrinkage(delta, params, epsilon, ball, rate, norms_of)
    torch._foreach_mul_(delta, factor)
    return norm


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


def joint_blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The few blocks that `joint_empty_like` laid `tensors` out in; they, where it was not that."""
    bases = (tensor if tensor._base is None else tensor._base for tensor in tensors)
    blocks = list({id(base): base for base in bases}.values())
    whole = sum(block.numel() for block in blocks) == sum(tensor.numel() for tensor in tensors)
    return blocks if whole else list(tensors)


class Perturbation:
    """The parameters at θ + Δ, and the way back to θ.

    The tensors that bring the ascent direction in keep θ while the parameters are displaced, so an
    ascent takes the memory of one copy of the parameters, and of a group of them while the two
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
        self._groups = _groups(params)
        self.epsilon: float | Tensor = epsilon
        self.ball = ball
        self._norms = norms
        self._moved = moved
        # Groups of (parameters, the tensors that hold their θ) and (parameters, what `leave` kept).
        self._originals: list[tuple[list[Tensor], list[Tensor]]] = []
        self._kept: list[tuple[list[Tensor], list[Tensor]]] = []
        self._theta_moves = False

    @torch.no_grad()
    def scale_radius(self, factor: Tensor) -> None:
        """ε ← factor · ε, for the ascents to come; a 0-dimensional tensor."""
        self.epsilon = self.epsilon * factor.to(self.params[0].device)

    @torch.no_grad()
    def ascend(self, gradient: list[Tensor], rate: float | Tensor) -> Tensor:
        """Δ ← project(Δ + rate · gradient), and the parameters go to θ + Δ.

        Args:
            gradient: ∇L at the parameters as they are now, one tensor a parameter. Overwritten.
            rate: ζ over the scale of the loss; a float or a 0-dimensional tensor.

        Returns:
            ‖Δ‖₂, 0-dimensional.
        """
        if isinstance(rate, Tensor):  # the scaler's may be elsewhere than offloaded parameters
            rate = rate.to(self.params[0].device)
        if self._originals:
            # Δ is what rounding left of it in θ + Δ: where the gradient was really taken.
            for group, (params, originals) in zip(self._groups, self._originals):
                ascent = _members(gradient, group)
                torch._foreach_mul_(ascent, rate)
                torch._foreach_add_(ascent, torch._foreach_sub(params, originals))
            rate = 1.0
            self.restore()
        factor, norm = shrinkage(gradient, self.params, self.epsilon, self.ball, rate, self._norms)
        for group in self._groups:
            delta = _members(gradient, group)
            factors = factor if self.ball == "global" else [factor[i] for i, _ in group]
            torch._foreach_mul_(delta, factors)
            self._displace(_members(self.params, group), delta, torch._foreach_add_)
        self._moved()
        return norm

    @torch.no_grad()
    def leave(self, theta_moves: bool = False) -> None:
        """Puts θ back and keeps θ + Δ for `enter`, or Δ where θ will have moved by then."""
        if not self._originals:
            return
        self._theta_moves = theta_moves
        while self._originals:
            params, originals = self._originals[-1]
            kept = torch._foreach_clone(params)
            torch._foreach_copy_(params, originals)
            self._originals.pop()
            if theta_moves:
                torch._foreach_sub_(kept, params)
            torch._foreach_copy_(originals, kept)
            self._kept.append((params, originals))
            del kept  # before the next group's copy is made
        self._moved()

    @torch.no_grad()
    def enter(self) -> None:
        """Takes the parameters to the θ + Δ that `leave` kept, or by the Δ that it kept."""
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

    @property
    def is_displaced(self) -> bool:
        return bool(self._originals)

    @contextlib.contextmanager
    def at_theta(self) -> Iterator[None]:
        """The parameters are θ inside, whichever method or pass was interrupted, and then go on."""
        # `data`: autograd is not to see that they change, as the backward pass may need them.
        records = [
            ([param.data for param in params], originals) for params, originals in self._originals
        ]
        kept: list[tuple[list[Tensor], list[Tensor]]] = []
        try:
            for params, originals in reversed(records):
                kept.append((params, list(torch._foreach_clone(params))))
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
        originals = list(torch._foreach_clone(params))
        self._originals.append((params, originals))
        write(params, other)
        torch._foreach_copy_(other, originals)
        self._originals[-1] = (params, other)


def _groups(tensors: Sequence[Tensor]) -> list[list[_Piece]]:
    """`tensors`, the large ones in pieces, in groups that change places one after the other.

    On a CPU a group stays in the cache while it does, so that memory is read once and written once;
    elsewhere the groups are few, because each costs some kernels.
    """
    sizes = [tensor.numel() for tensor in tensors]
    on_cpu = all(tensor.is_cpu for tensor in tensors)
    most = _CACHED if on_cpu else max(*sizes, sum(sizes) // 8)
    groups: list[list[_Piece]] = [[]]
    left = most
    for i, (tensor, size) in enumerate(zip(tensors, sizes)):
        pieces: list[tuple[Any, int]] = [(..., size)]
        if size > most:
            row = size // len(tensor)
            rows = max(1, most // row)
            starts = range(0, len(tensor), rows)
            pieces = [(slice(start, start + rows), rows * row) for start in starts]
        for piece, elements in pieces:
            if elements > left and groups[-1]:
                groups.append([])
                left = most
            groups[-1].append((i, piece))
            left -= elements
    return groups


def _members(tensors: Sequence[Tensor], group: list[_Piece]) -> list[Tensor]:
    return [tensors[i] if piece is ... else tensors[i][piece] for i, piece in group]
