"""Order statistics, running extremes, and searches, by sorting, counting and comparing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ORDER"]


def _at_least_1d(x: Tensor) -> Tensor:
    return x if x.ndim else x.reshape(1)


def _picked(x: Tensor, dim: int, keepdim: bool, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Sorts along an axis, and returns what ``choose(values, places)`` takes of the sorted values and their places."""
    values, places = _at_least_1d(x).movedim(dim if x.ndim else 0, -1).sort(stable=True, dim=-1)
    value, place = choose(values, places)
    if keepdim and x.ndim:
        return value.unsqueeze(dim), place.unsqueeze(dim)
    return value.reshape(value.shape if x.ndim else ()), place.reshape(place.shape if x.ndim else ())


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return _picked(x, dim, keepdim, lambda values, places: (values[..., k - 1], places[..., k - 1]))


def _median_of(skips: bool) -> Callable[..., Any]:
    """`median`, which is NaN where an element is; `nanmedian`, which skips NaN."""

    def choose(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        numbers = (values == values).sum(-1, keepdim=True)  # sorting puts NaN last
        count = values.shape[-1]
        middle = (numbers - 1).clamp(min=0) // 2
        if not skips:
            middle = torch.where(numbers < count, numbers, (count - 1) // 2)  # the first NaN
        return values.gather(-1, middle).squeeze(-1), places.gather(-1, middle).squeeze(-1)

    def median(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            flat = x.reshape(-1)
            return choose(*flat.sort(stable=True, dim=-1))[0] if x.numel() else flat.new_full((), torch.nan)
        return _picked(x, dim, keepdim, choose)

    return median


def _mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The least of the most frequent elements, and its last place."""

    def choose(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        same = values.unsqueeze(-1) == values.unsqueeze(-2)
        counts = same.sum(-1).clamp(min=1)
        best = counts.argmax(-1, keepdim=True)  # the first: sorted values are rising
        last = (best + counts.gather(-1, best) - 1).clamp(max=values.shape[-1] - 1)
        return values.gather(-1, best).squeeze(-1), places.gather(-1, last).squeeze(-1)

    return _picked(x, dim, keepdim, choose)


def _running(combine: Callable[[Any, Any], Any], parts: Any, dim: int, length: int) -> Any:
    """Combines all elements up to each one, by doubling: elements 1, 2, 4, ... places back.

    Args:
        combine: of what comes first and what follows; each is a tuple of tensors.
        parts: a tuple of tensors.
        dim: along which axis.
        length: of the axis.
    """
    step = 1
    while step < length:
        first = tuple(part.narrow(dim, 0, length - step) for part in parts)
        second = tuple(part.narrow(dim, step, length - step) for part in parts)
        joined = combine(first, second)
        parts = tuple(torch.cat([part.narrow(dim, 0, step), new], dim) for part, new in zip(parts, joined, strict=True))
        step *= 2
    return parts


def _running_extreme(is_better: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """`cummax` and `cummin`: of equal elements the last one counts, and NaN is better than all others."""

    def combine(first: Any, second: Any) -> Any:
        (a, place_a), (b, place_b) = first, second
        later = (b != b) | ((a == a) & is_better(b, a))
        return torch.where(later, b, a), torch.where(later, place_b, place_a)

    def cumulate(x: Tensor, dim: int) -> Any:
        full = _at_least_1d(x)
        dim %= full.ndim
        length = full.shape[dim]
        places = torch.arange(length, device=x.device).reshape(-1, *(1 for _ in full.shape[dim + 1 :]))
        values, places = _running(combine, (full, places.expand(full.shape)), dim, length)
        return values.reshape(x.shape), places.reshape(x.shape)

    return cumulate


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    full = _at_least_1d(x)
    dim %= full.ndim

    def combine(first: Any, second: Any) -> Any:
        return (torch.logaddexp(first[0], second[0]),)

    (total,) = _running(combine, (full,), dim, full.shape[dim])
    return total.reshape(x.shape)


def _searchsorted(
    rising: Tensor,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many elements of the last axis of ``rising`` come before each value."""
    if sorter is not None:
        rising = rising.gather(-1, sorter)
    if not isinstance(values, Tensor):
        values = torch.full((), values, dtype=rising.dtype, device=rising.device)
    shape = values.shape
    if rising.ndim == 1:
        rising = rising.reshape(*(1 for _ in shape), 1, -1) if shape else rising.reshape(1, -1)
        values = values.unsqueeze(-1)
    else:
        rising = rising.unsqueeze(-2)
    values = values.unsqueeze(-1)
    # Negated, so that NaN comes behind all numbers, as a binary search finds.
    before = ~(rising > values) if right or side == "right" else ~(rising >= values)
    return before.sum(-1).reshape(shape).to(torch.int32 if out_int32 else torch.int64)


def _bucketize(values: Any, boundaries: Tensor, out_int32: bool = False, right: bool = False) -> Tensor:
    return _searchsorted(boundaries, values, out_int32, right)


def _histc(x: Tensor, bins: int = 100, low: int | float = 0, high: int | float = 0) -> Tensor:
    flat = x.reshape(-1)
    first: Any = torch.full((), low, dtype=x.dtype, device=x.device)
    last: Any = torch.full((), high, dtype=x.dtype, device=x.device)
    if low == high and x.numel():
        first, last = flat.amin(), flat.amax()
    same = first == last
    first, last = torch.where(same, first - 1, first), torch.where(same, last + 1, last)
    inside = (flat >= first) & (flat <= last)
    place = torch.where(inside, (flat - first) / (last - first) * bins, 0).long().clamp(max=bins - 1)
    return torch.zeros(bins, dtype=x.dtype, device=x.device).scatter_add(0, place, inside.to(x.dtype))


ORDER: dict[str, Callable[..., Any]] = {
    "kthvalue": _kthvalue,
    "median": _median_of(skips=False),
    "nanmedian": _median_of(skips=True),
    "mode": _mode,
    "cummax": _running_extreme(torch.ge),
    "cummin": _running_extreme(torch.le),
    "logcumsumexp": _logcumsumexp,
    "searchsorted": _searchsorted,
    "bucketize": _bucketize,
    "histc": _histc,
}
"""Order statistics and searches, by their name in ATen."""
