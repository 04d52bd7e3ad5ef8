"""Part of a batch, whatever its collator made of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor


def first_samples(batch: Any, fraction: float) -> Any:
    """The first `fraction` of the samples, and at least two, which BatchNorm needs.

    Tensors and arrays have a row for each sample. Dictionaries and tuples hold parts of the batch,
    each with all samples; so do lists outside of a dictionary, as of `(pixels, labels)`. A list in
    a dictionary has an entry for each sample, as has a list of dictionaries and any of strings or
    numbers. What is none of these, a scalar for example, is kept as it is.

    Raises:
        ValueError: the parts do not agree on the number of samples.
    """
    return _first(batch, _number_of_samples(batch, fraction), fraction)


def check_divisible(batch: Any, fraction: float) -> None:
    """Raises `ValueError` where `first_samples` would, and where `batch` is a single sample.

    A last batch may be one; a first one is all that there ever is, such as a row of packed texts.
    """
    if _number_of_samples(batch, fraction) < 2:
        raise ValueError(
            f"AMPConfig.ascent_fraction={fraction:g} takes batches of two samples or more; this "
            "one has a single row, as packed texts have. Use ascent_fraction=1."
        )


def _number_of_samples(batch: Any, fraction: float) -> int:
    sizes = _sizes(batch)
    if not sizes:
        raise ValueError(
            f"AMPConfig.ascent_fraction={fraction:g} takes batches whose tensors and lists have an "
            f"entry for each sample; here their lengths are {sorted(set(_lengths(batch)))}. Use "
            "ascent_fraction=1."
        )
    return sizes[0]


def _sizes(value: Any, named: bool = False) -> list[int] | None:
    """The numbers of samples that `value` may hold, the likeliest first. `None`: any."""
    if isinstance(value, Tensor | np.ndarray):
        return [len(value)] if value.ndim else None
    if isinstance(value, Mapping):
        return _common(_sizes(part, named=True) for part in value.values())
    if not isinstance(value, list | tuple):
        return None
    of_parts = _sizes_of_parts(value, named)
    if of_parts is None:
        return [len(value)]
    if _may_be_samples(value, named):
        return [len(value), *(size for size in of_parts if size != len(value))]
    return of_parts


def _sizes_of_parts(value: list | tuple, named: bool) -> list[int] | None:
    return _common(_sizes(part, named) for part in value)


def _may_be_samples(value: list | tuple, named: bool) -> bool:
    """Whether a list or tuple that holds tensors has an entry for each sample."""
    return isinstance(value, list) and (named or isinstance(value[0], Mapping))


def _common(all_sizes: Iterable[list[int] | None]) -> list[int] | None:
    common: list[int] | None = None
    for sizes in all_sizes:
        if sizes is not None:
            common = sizes if common is None else [size for size in common if size in sizes]
    return common


def _first(value: Any, samples: int, fraction: float, named: bool = False) -> Any:
    size = max(2, round(samples * fraction))
    if isinstance(value, Tensor | np.ndarray):
        return value[:size] if value.ndim else value
    if isinstance(value, Mapping):
        part: Any = copy.copy(value)  # a `BatchEncoding`, say, stays one
        part.update({name: _first(v, samples, fraction, True) for name, v in value.items()})
        return part
    if not isinstance(value, list | tuple):
        return value
    alone = _sizes_of_parts(value, named) is None  # no samples in the parts
    if alone or (_may_be_samples(value, named) and len(value) == samples):
        return value[:size]
    parts = [_first(part, samples, fraction, named) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _lengths(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor | np.ndarray):
        yield from [len(value)] if value.ndim else []
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _lengths(part)
    elif isinstance(value, list | tuple):
        of_parts = [length for part in value for length in _lengths(part)]
        yield from of_parts if isinstance(value, tuple) and of_parts else [len(value)]
