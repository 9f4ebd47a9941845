"""Lowerings of pooling in one to three dimensions; `table` says how an op is called.

A pool reads windows: for each spatial axis a table ``[out, size of the window]`` of places, and of which of them exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["POOLS"]

Window = tuple[Any, Any]
"""The places ``[out, size]`` that the windows along an axis read, and which of them exist."""


def _spread(value: Sequence[int], rank: int, default: Sequence[int] = (1,)) -> tuple[int, ...]:
    value = tuple(value) or tuple(default)
    return value * rank if len(value) == 1 else value


def _regular(sizes: Any, outs: Any, kernel: Any, strides: Any = (), pads: Any = (0,), dilations: Any = (1,)) -> Any:
    """The windows of a pool with a kernel."""
    rank = len(outs)
    kernel = _spread(kernel, rank)
    strides, pads, dilations = _spread(strides, rank, kernel), _spread(pads, rank), _spread(dilations, rank)
    windows = []
    for axis in range(rank):
        starts = np.arange(outs[axis])[:, None] * strides[axis] - pads[axis]
        places = starts + np.arange(kernel[axis]) * dilations[axis]
        windows.append((places, (places >= 0) & (places < sizes[axis])))
    return windows


def _adaptive(sizes: Any, outs: Any) -> list[Window]:
    """The windows of a pool with a given number of windows, which may overlap."""
    windows = []
    for size, count in zip(sizes, outs, strict=True):
        starts = np.arange(count) * size // max(count, 1)
        ends = -(-(np.arange(count) + 1) * size // max(count, 1))
        places = starts[:, None] + np.arange(max((ends - starts).max(initial=0), 1))
        windows.append((places, places < ends[:, None]))
    return windows


def _read(x: Any, windows: Sequence[Window], fill: Any) -> tuple[Any, Any]:
    """The elements ``[..., outs, window]`` that windows read, and the place of each among an image's elements."""
    rank = len(windows)
    sizes, outs = x.shape[x.ndim - rank :], tuple(len(places) for places, _ in windows)
    flat, exist = np.zeros((1,) * (2 * rank), int), np.ones((1,) * (2 * rank), bool)
    for axis, (places, which) in enumerate(windows):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = places.shape
        flat = flat * sizes[axis] + places.clip(0, max(sizes[axis] - 1, 0)).reshape(shape)
        exist = exist & which.reshape(shape)
    flat, exist = (np.broadcast_to(part, np.broadcast_shapes(flat.shape, exist.shape)) for part in (flat, exist))
    window = math.prod(flat.shape[rank:])
    flat, exist = flat.reshape(*outs, window), exist.reshape(*outs, window)
    images = x.reshape(*x.shape[: x.ndim - rank], math.prod(sizes))
    return jnp.where(exist, images[..., flat], fill), (flat, exist)


def _maxima(x: Any, windows: Sequence[Window]) -> list[Any]:
    """The largest elements and their places: the first of equal ones, NaN before all."""
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    elements, (flat, exist) = _read(x, windows, lowest)
    largest = elements.max(-1, keepdims=True)
    best = jnp.argmax(((elements == largest) | (elements != elements)) & exist, -1, keepdims=True)
    index = jnp.take_along_axis(jnp.broadcast_to(jnp.asarray(flat), elements.shape), best, -1)
    return [jnp.take_along_axis(elements, best, -1)[..., 0], index[..., 0]]


def _max_pool(rank: int) -> Lowering:
    def op(outs: Any, x: Any, kernel: Any, strides: Any = (), pads: Any = (0,), dilations: Any = (1,), *_: Any) -> Any:
        shape = outs[0].shape
        return _maxima(x, _regular(x.shape[-rank:], shape[-rank:], kernel, strides, pads, dilations))

    return op


def _adaptive_max_pool(rank: int) -> Lowering:
    return lambda outs, x, _: _maxima(x, _adaptive(x.shape[-rank:], outs[0].shape[-rank:]))


def _scattered(rank: int) -> Lowering:
    """The derivative of a max pool: each cotangent goes where the largest element was."""

    def op(out: TensorSpec, cotangent: Any, x: Any, *rest: Any) -> Any:
        images, index = math.prod(out.shape[:-rank]), rest[-1]
        lengths = images, math.prod(cotangent.shape[-rank:])
        flat = jnp.zeros((images, math.prod(out.shape[-rank:])), x.dtype)
        lines = jnp.arange(images)[:, None]
        return flat.at[lines, index.reshape(lengths)].add(cotangent.reshape(lengths)).reshape(out.shape)

    return op


Average = Callable[..., Any]


def _average(rank: int) -> Average:
    def pool(outs: Any, x: Any, kernel: Any, strides: Any, pads: Any, ceil: bool, with_pads: bool, divisor: Any) -> Any:
        sizes = x.shape[-rank:]
        windows = _regular(sizes, outs, kernel, strides, pads)
        elements, _ = _read(x, windows, 0)
        total = elements.sum(-1)
        if divisor is not None:
            return total / divisor
        counts = np.ones((1,) * rank)
        for axis, (places, exist) in enumerate(windows):
            pad = _spread(pads, rank)[axis]
            counted = (places < sizes[axis] + pad) if with_pads else exist  # a window may end behind the padding
            counts = counts * counted.sum(-1).reshape(*(-1 if other == axis else 1 for other in range(rank)))
        return total / jnp.asarray(counts, x.dtype)

    return pool


def _adaptive_average(rank: int) -> Average:
    def pool(outs: Any, x: Any) -> Any:
        elements, (_, exist) = _read(x, _adaptive(x.shape[-rank:], outs), 0)
        return elements.sum(-1) / jnp.asarray(exist.sum(-1), x.dtype)

    return pool


def _forward(rank: int, pool: Average) -> Lowering:
    def op(
        out: TensorSpec,
        x: Any,
        kernel: Any,
        strides: Any = (),
        pads: Any = (0,),
        ceil: bool = False,
        with_pads: bool = True,
        divisor: Any = None,
    ) -> Any:
        return pool(out.shape[-rank:], x, kernel, strides, pads, ceil, with_pads, divisor)

    return op


def _backward(rank: int, pool: Average) -> Lowering:
    def op(out: TensorSpec, cotangent: Any, x: Any, *setting: Any) -> Any:
        return jax.vjp(lambda x: pool(cotangent.shape[-rank:], x, *setting), x)[1](cotangent)[0]

    return op


def _adaptive_forward(rank: int) -> Lowering:
    return lambda out, x, _: _adaptive_average(rank)(out.shape[-rank:], x)


POOLS: dict[str, Lowering] = {}
"""Every pool, by its name in ATen."""

for _rank in (2, 3):
    POOLS |= {
        f"max_pool{_rank}d_with_indices": _max_pool(_rank),
        f"max_pool{_rank}d_with_indices_backward": _scattered(_rank),
        f"adaptive_max_pool{_rank}d": _adaptive_max_pool(_rank),
        f"adaptive_max_pool{_rank}d_backward": _scattered(_rank),
        f"avg_pool{_rank}d": _forward(_rank, _average(_rank)),
        f"avg_pool{_rank}d_backward": _backward(_rank, _average(_rank)),
        f"_adaptive_avg_pool{_rank}d": _adaptive_forward(_rank),
        f"_adaptive_avg_pool{_rank}d_backward": _backward(_rank, _adaptive_average(_rank)),
    }
