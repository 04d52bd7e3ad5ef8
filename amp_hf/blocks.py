"""Where a perturbation's tensors lie: side by side in memory, and in groups that fit a cache."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CACHED = 2**18  # elements that lie in a core's cache together with two copies


class JointTensors(Sequence[Tensor]):
    """Tensors like those given, uninitialized, side by side in memory.

    Attributes:
        tensors: one for each of those given: the same shape, dtype and device, and dense.
        blocks: all of that memory, in one flat tensor for each device and dtype. What is done to
            every element is done faster to these.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
        for tensor in like:
            sizes[tensor.device, tensor.dtype] += tensor.numel()
        blocks = {kind: torch.empty(n, device=kind[0], dtype=kind[1]) for kind, n in sizes.items()}
        self.blocks = list(blocks.values())
        self.tensors: list[Tensor] = []
        for tensor in like:
            kind = tensor.device, tensor.dtype
            part, blocks[kind] = blocks[kind].tensor_split([tensor.numel()])
            # Dense strides: those of a parameter that is a slice of something would overlap.
            stride = torch.empty_like(tensor, device="meta").stride()
            self.tensors.append(part.as_strided(tensor.shape, stride))

    @classmethod
    def copy_of(cls, tensors: Sequence[Tensor]) -> JointTensors:
        joint = cls(tensors)
        torch._foreach_copy_(joint.tensors, list(tensors))
        return joint

    def zero_(self) -> None:
        for block in self.blocks:
            block.zero_()

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)


@dataclass(frozen=True)
class _Piece:
    """A tensor, by its place in the list, or some of its rows."""

    index: int
    rows: slice | None = None


class Group:
    """Some tensors of a list, or pieces of them."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the members in `tensors`, a list like the one that was divided."""
        return [
            tensors[piece.index] if piece.rows is None else tensors[piece.index][piece.rows]
            for piece in self._pieces
        ]

    def factors(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """For each member, its tensor's entry in `factors`."""
        return [factors[piece.index] for piece in self._pieces]


def groups_of(tensors: Sequence[Tensor]) -> list[Group]:
    """`tensors`, the large ones in pieces, in groups that change places one after the other.

    On a CPU a group stays in the cache while it does, so that memory is read once and written once;
    elsewhere the groups are few, because each costs some kernels.
    """
    sizes = [tensor.numel() for tensor in tensors]
    on_cpu = all(tensor.is_cpu for tensor in tensors)
    most = _CACHED if on_cpu else max(*sizes, sum(sizes) // 8)
    groups: list[list[_Piece]] = [[]]
    left = most
    pieces = itertools.chain.from_iterable(
        _pieces(index, tensor, most) for index, tensor in enumerate(tensors)
    )
    for piece, size in pieces:
        if size > left and groups[-1]:
            groups.append([])
            left = most
        groups[-1].append(piece)
        left -= size
    return [Group(pieces) for pieces in groups]


def _pieces(index: int, tensor: Tensor, most: int) -> Iterator[tuple[_Piece, int]]:
    """With their sizes: `tensor` as a whole, or as many rows at a time as `most` elements hold."""
    size = tensor.numel()
    if size <= most:
        yield _Piece(index), size
        return
    row = size // len(tensor)
    rows = max(1, most // row)
    for start in range(0, len(tensor), rows):
        yield _Piece(index, slice(start, start + rows)), rows * row
