"""Part of a batch, whatever its collator made of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def first_samples(batch: Any, fraction: float) -> Any:
    """The first `fraction` of the samples (which come shuffled).

    At least two: BatchNorm cannot do with one. Tensors and lists have an entry a sample; anything
    else, a scalar for example, is kept.

    Raises:
        ValueError: not all tensors and lists are of the same length.
    """
    sizes = set(_lengths(batch))
    if len(sizes) != 1:
        raise ValueError(
            f"AMPConfig.ascent_fraction={fraction:g} takes batches whose tensors and lists have an "
            f"entry a sample; here their lengths are {sorted(sizes)}. Use ascent_fraction=1."
        )
    return _first(batch, max(2, round(sizes.pop() * fraction)))


def _has_entries(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, list | tuple)


def _lengths(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _lengths(part)
    elif _has_entries(value):
        yield len(value)


def _first(value: Any, size: int) -> Any:
    if isinstance(value, Mapping):
        part: Any = copy.copy(value)  # a `BatchEncoding`, say, stays one
        part.update({name: _first(entry, size) for name, entry in value.items()})
        return part
    return value[:size] if _has_entries(value) else value
