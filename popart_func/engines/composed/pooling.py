"""Pools as reductions over windows of a padded buffer, with their gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func.engines.composed.indexing import least
from popart_func.engines.composed.windows import padded, per_axis, sums_of_windows, windows

__all__ = ["POOLS"]


def _places(length: int, size: int, stride: int, pad: int, dilation: int, ceil: bool) -> int:
    """How many windows there are along an axis; with ``ceil`` the last may stand over, but must begin inside."""
    reach = length + 2 * pad - dilation * (size - 1) - 1
    places = (-(-reach // stride) if ceil else reach // stride) + 1
    return places - (ceil and (places - 1) * stride >= length + pad)


def _layout(x: Tensor, rank: int, size: Any, stride: Any, pad: Any, dilation: Any, ceil: bool) -> tuple[Any, ...]:
    sizes = per_axis(size, rank)
    strides = per_axis(stride, rank) if stride else sizes
    pads, dilations = per_axis(pad, rank), per_axis(dilation, rank)
    lengths = x.shape[x.ndim - rank :]
    places = [_places(*each, ceil) for each in zip(lengths, sizes, strides, pads, dilations, strict=True)]
    return sizes, strides, pads, dilations, lengths, places


def _windows(x: Tensor, layout: tuple[Any, ...], value: int | float) -> Tensor:
    """``[N, C, O..., K...]``, with a value around what is given."""
    sizes, strides, pads, dilations, lengths, places = layout
    around = [
        (pad, max(0, (count - 1) * stride + (size - 1) * dilation + 1 - pad - length))
        for pad, count, stride, size, dilation, length in zip(
            pads, places, strides, sizes, dilations, lengths, strict=True
        )
    ]
    return windows(padded(x, around, value), sizes, strides, dilations, places)


def _along(numbers: Tensor, axis: int, rank: int) -> Tensor:
    """A vector as one axis of the ``rank`` last ones."""
    return numbers.reshape(-1, *(1 for _ in range(rank - 1 - axis)))


def _max_pool(
    rank: int, x: Tensor, size: Any, stride: Any = (), pad: Any = 0, dilation: Any = 1, ceil: bool = False
) -> tuple[Tensor, Tensor]:
    layout = _layout(x, rank, size, stride, pad, dilation, ceil)
    sizes, strides, pads, dilations, lengths, _ = layout
    flat = _windows(x, layout, least(x.dtype)).flatten(-rank)
    values, best = flat.max(-1)
    position = torch.zeros_like(best)
    for axis in range(rank):
        within = best // math.prod(sizes[axis + 1 :]) % sizes[axis]
        begin = torch.arange(best.shape[best.ndim - rank + axis], device=x.device) * strides[axis] - pads[axis]
        at = _along(begin, axis, rank) + within * dilations[axis]
        # Where all is -inf the first place is best, which may lie in the padding: PyTorch takes the first one inside.
        at = torch.where(at < 0, at % dilations[axis], at)
        position = position * lengths[axis] + at
    return values, position


def _max_pool_backward(rank: int, gradient: Tensor, x: Tensor, *rest: Any) -> Tensor:
    indices = rest[-1]
    outer = x.shape[: x.ndim - rank]
    flat = torch.zeros_like(x).reshape(*outer, -1)
    return flat.scatter_add(-1, indices.reshape(*outer, -1), gradient.reshape(*outer, -1)).reshape(x.shape)


def _counts(x: Tensor, rank: int, layout: tuple[Any, ...], with_padding: bool, divisor: int | None) -> Any:
    """By how many elements the sum of each window is divided."""
    if divisor is not None:
        return divisor
    sizes, strides, pads, _, lengths, places = layout
    counts: Any = 1
    for axis in range(rank):
        begin = torch.arange(places[axis], device=x.device) * strides[axis] - pads[axis]
        end = (begin + sizes[axis]).clamp(max=lengths[axis] + pads[axis])
        count = end - begin if with_padding else end.clamp(max=lengths[axis]) - begin.clamp(min=0)
        counts = counts * _along(count, axis, rank)
    return counts.to(x.dtype)


def _average_pool(
    rank: int,
    x: Tensor,
    size: Any,
    stride: Any = (),
    pad: Any = 0,
    ceil: bool = False,
    with_padding: bool = True,
    divisor: int | None = None,
) -> Tensor:
    layout = _layout(x, rank, size, stride, pad, 1, ceil)
    total = _windows(x, layout, 0).sum(tuple(range(-rank, 0)))
    return total / _counts(x, rank, layout, with_padding, divisor)


def _average_pool_backward(
    rank: int,
    gradient: Tensor,
    x: Tensor,
    size: Any,
    stride: Any,
    pad: Any,
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> Tensor:
    layout = _layout(x, rank, size, stride, pad, 1, ceil)
    sizes, strides, pads, dilations, lengths, _ = layout
    share = gradient / _counts(x, rank, layout, with_padding, divisor)
    parts = share.reshape(*share.shape, *(1 for _ in sizes)).expand(*share.shape, *sizes)
    return sums_of_windows(parts, lengths, strides, dilations, pads)


def _cut(length: int, places: int) -> list[tuple[int, int]]:
    """The windows ``(start, end)`` of an adaptive pool along an axis."""
    return [(place * length // places, -(-(place + 1) * length // places)) for place in range(places)]


def _whole_windows(rank: int, x: Tensor, places: Sequence[int]) -> list[int] | None:
    """The sizes of the windows of an adaptive pool where they are as in a pool with a kernel: equal, side by side."""
    pairs = list(zip(x.shape[x.ndim - rank :], places, strict=True))
    return None if any(count == 0 or length % count for length, count in pairs) else [n // count for n, count in pairs]


def _adaptive_average_pool(rank: int, x: Tensor, places: Any) -> Tensor:
    """The mean of each window, one axis after the other: the mean of means of windows of one size."""
    places = per_axis(places, rank)
    sizes = _whole_windows(rank, x, places)
    if sizes is not None:
        return _average_pool(rank, x, sizes)
    for axis, count in enumerate(places):
        at = x.ndim - rank + axis
        parts = [x.narrow(at, start, end - start).mean(at, keepdim=True) for start, end in _cut(x.shape[at], count)]
        x = torch.cat(parts, at)
    return x


def _adaptive_average_pool_backward(rank: int, gradient: Tensor, x: Tensor) -> Tensor:
    places = gradient.shape[gradient.ndim - rank :]
    result: Tensor = torch.func.vjp(lambda x: _adaptive_average_pool(rank, x, places), x)[1](gradient)[0]
    return result


def _adaptive_max_pool(rank: int, x: Tensor, places: Any) -> tuple[Tensor, Tensor]:
    """The largest element of each window and its place: one axis after the other, the last one first."""
    places = per_axis(places, rank)
    sizes = _whole_windows(rank, x, places)
    if sizes is not None:
        return _max_pool(rank, x, sizes)
    lengths = x.shape[x.ndim - rank :]
    position: Tensor | None = None
    for axis in reversed(range(rank)):
        at = x.ndim - rank + axis
        best, found = [], []
        for start, end in _cut(x.shape[at], places[axis]):
            part = x.narrow(at, start, end - start)
            value, where = part.max(at, keepdim=True)
            step = math.prod(lengths[axis + 1 :])
            inner = 0 if position is None else position.narrow(at, start, end - start).gather(at, where)
            best.append(value)
            found.append((where + start) * step + inner)
        x, position = torch.cat(best, at), torch.cat(found, at)
    assert position is not None
    return x, position


def _all(name: str, function: Callable[..., Any], ranks: Sequence[int]) -> dict[str, Callable[..., Any]]:
    return {name.format(rank): functools.partial(function, rank) for rank in ranks}


POOLS: dict[str, Callable[..., Any]] = {
    **_all("max_pool{}d_with_indices", _max_pool, (2, 3)),
    **_all("max_pool{}d_with_indices_backward", _max_pool_backward, (2, 3)),
    **_all("avg_pool{}d", _average_pool, (2, 3)),
    **_all("avg_pool{}d_backward", _average_pool_backward, (2, 3)),
    **_all("_adaptive_avg_pool{}d", _adaptive_average_pool, (2, 3)),
    **_all("_adaptive_avg_pool{}d_backward", _adaptive_average_pool_backward, (2, 3)),
    **_all("adaptive_max_pool{}d", _adaptive_max_pool, (2, 3)),
    **_all("adaptive_max_pool{}d_backward", _max_pool_backward, (2, 3)),
}
"""Pools, by their name in ATen."""
