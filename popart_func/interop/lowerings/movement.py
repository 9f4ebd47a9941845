"""Lowerings of the ops that move elements without computing on them; `lowerings` says how an op is called.

An index out of range, which PyTorch refuses, is not noticed: JAX clamps it, or drops what would be written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.trees import jax_dtype

__all__ = ["MOVEMENT"]


def _view(out: TensorSpec, x: Any, *shape: Any) -> Any:
    return jnp.reshape(x, out.shape) if shape else _seen_as(out, x)  # x.view(dtype) has no shape


def _seen_as(out: TensorSpec, x: Any) -> Any:
    """The same bits in another dtype, which may be narrower or wider."""
    dtype = jax_dtype(out.dtype)
    if dtype.itemsize != out.dtype.itemsize or bool in (x.dtype, dtype):
        raise NotImplementedError(f"bits seen as {out.dtype}")
    if dtype.itemsize > x.dtype.itemsize:
        x = x.reshape(*out.shape, -1)
    return jax.lax.bitcast_convert_type(x, dtype).reshape(out.shape)


def _copy(out: TensorSpec, x: Any, *_: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(x).astype(jax_dtype(out.dtype)), out.shape)


def _full(out: TensorSpec, _: Any, value: Any = 0, *__: Any) -> Any:
    return jnp.full(out.shape, value, jax_dtype(out.dtype))


def _empty(out: TensorSpec, *_: Any) -> Any:
    return jnp.zeros(out.shape, jax_dtype(out.dtype))


def _arange(out: TensorSpec, start: Any, end: Any, step: Any = 1, *_: Any) -> Any:
    return jnp.asarray((start + np.arange(out.shape[0]) * step).astype(jax_dtype(out.dtype)))


def _slices(x: Any, axis: int, start: Any, end: Any, step: int) -> tuple[slice, ...]:
    axis %= x.ndim
    bounds = slice(*slice(start, end, step).indices(x.shape[axis]))
    return (*(slice(None) for _ in range(axis)), bounds)


def _slice(out: TensorSpec, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return x[_slices(x, axis, start, end, step)]


def _select(out: TensorSpec, x: Any, axis: int, index: int) -> Any:
    return jax.lax.index_in_dim(x, index, axis % x.ndim, keepdims=False)


def _places(shape: Any, strides: Any, offset: int | None) -> Any:
    places = np.full(shape, offset or 0)
    for axis, stride in enumerate(strides):
        places += np.arange(shape[axis]).reshape(-1, *(1 for _ in shape[axis + 1 :])) * stride
    return places


def _as_strided(out: TensorSpec, x: Any, size: Any, strides: Any, offset: int | None = None) -> Any:
    return x.reshape(-1)[_places(size, strides, offset)]


def _as_strided_scatter(
    out: TensorSpec, x: Any, source: Any, size: Any, strides: Any, offset: int | None = None
) -> Any:
    return x.reshape(-1).at[_places(size, strides, offset)].set(source).reshape(out.shape)


def _unfold(out: TensorSpec, x: Any, axis: int, size: int, step: int) -> Any:
    if not x.ndim:  # becomes a vector
        return x[None][:size]
    axis %= x.ndim
    places = np.arange(out.shape[axis])[:, None] * step + np.arange(size)
    return jnp.moveaxis(jnp.take(x, places, axis=axis), axis + 1, -1)


def _pieces(outs: Any, x: Any, lengths: Any, axis: int = 0, *_: Any) -> list[Any]:
    outs, axis = outs if isinstance(outs, list) else [outs], axis % x.ndim
    starts = [sum(out.shape[axis] for out in outs[:position]) for position in range(len(outs))]
    pairs = zip(starts, outs, strict=True)
    return [jax.lax.slice_in_dim(x, start, start + out.shape[axis], axis=axis) for start, out in pairs]


def _cat(out: TensorSpec, parts: Sequence[Any], axis: int = 0) -> Any:
    # PyTorch lets an empty vector pass.
    kept = [part.astype(jax_dtype(out.dtype)) for part in parts if part.shape != (0,) or len(out.shape) == 1]
    return jnp.concatenate(kept, axis % len(out.shape)) if kept else jnp.zeros(out.shape, jax_dtype(out.dtype))


def _pad(out: TensorSpec, x: Any, pads: Sequence[int], value: Any = 0) -> Any:
    sides = [(0, 0)] * x.ndim
    for position in range(len(pads) // 2):
        sides[x.ndim - 1 - position] = (pads[2 * position], pads[2 * position + 1])
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(before, after, 0) for before, after in sides])


def _slice_scatter(
    out: TensorSpec, x: Any, source: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    return x.at[_slices(x, axis, start, end, step)].set(source)


def _diagonal_scatter(out: TensorSpec, x: Any, source: Any, shift: int = 0, first: int = 0, second: int = 1) -> Any:
    moved, steps = jnp.moveaxis(x, (first, second), (-2, -1)), np.arange(source.shape[-1])
    moved = moved.at[..., steps + max(-shift, 0), steps + max(shift, 0)].set(source)
    return jnp.moveaxis(moved, (-2, -1), (first, second))


def _gather(out: TensorSpec, x: Any, axis: int, index: Any, *_: Any) -> Any:
    if not x.ndim:
        return jnp.broadcast_to(x, index.shape)
    axis %= x.ndim
    # Along other axes the index may be shorter.
    part = x[tuple(slice(None) if other == axis else slice(size) for other, size in enumerate(index.shape))]
    return jnp.take_along_axis(part, index, axis)


def _indices(indices: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(slice(None) if index is None else index for index in indices)


def _index(out: TensorSpec, x: Any, indices: Sequence[Any]) -> Any:
    return x[_indices(indices)]


def _index_select(out: TensorSpec, x: Any, axis: int, index: Any) -> Any:
    if not x.ndim:
        return jnp.broadcast_to(x, out.shape)
    return x[(*(slice(None) for _ in range(axis % x.ndim)), jnp.atleast_1d(index))]


def _embedding(out: TensorSpec, weight: Any, index: Any, padding: int = -1, scale: bool = False, *_: Any) -> Any:
    if scale:
        raise NotImplementedError("scale_grad_by_freq=True")
    if padding >= 0:
        weight = weight.at[padding].set(jax.lax.stop_gradient(weight[padding]))
    return weight[index]


def _index_put(out: TensorSpec, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False, *_: Any) -> Any:
    if len(indices) == 1 and indices[0].dtype == bool and math.prod(values.shape) == 1:
        mask = indices[0].reshape(*indices[0].shape, *(1 for _ in x.shape[indices[0].ndim :]))
        return jnp.where(mask, x + values.reshape(()) if accumulate else values.reshape(()), x)
    place = x.at[_indices(indices)]
    return place.add(values) if accumulate else place.set(values)


_COMBINE = {
    "add": "add",
    "sum": "add",
    "mean": "add",
    "multiply": "multiply",
    "prod": "multiply",
    "amax": "max",
    "amin": "min",
}


def _scatter(
    out: TensorSpec, x: Any, axis: int, index: Any, source: Any, reduce: Any = None, include_self: bool = True
) -> Any:
    target, index = (x.reshape(1), index.reshape(-1)) if not x.ndim else (x, index)
    if isinstance(source, jax.Array) and source.ndim:
        source = source[tuple(slice(size) for size in index.shape)]
    axes = list(jnp.indices(index.shape, sparse=True))
    axes[axis % target.ndim] = index
    places = tuple(axes)
    source = jnp.broadcast_to(jnp.asarray(source, x.dtype), index.shape)
    if not include_self:
        target = target.at[places].set(_neutral(reduce, x.dtype))
    combined = getattr(target.at[places], _COMBINE.get(reduce, "set"))(source)
    if reduce == "mean":
        counts = jnp.full(target.shape, int(include_self)).at[places].add(1)
        counts = jnp.maximum(counts, 1).astype(x.dtype)
        combined = combined / counts if jnp.issubdtype(x.dtype, jnp.inexact) else combined // counts
    return combined.reshape(out.shape)


def _neutral(reduce: str, dtype: Any) -> Any:
    """What changes nothing."""
    if reduce not in ("amax", "amin"):
        return int(reduce == "prod")
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf if reduce == "amax" else jnp.inf
    return jnp.iinfo(dtype).min if reduce == "amax" else jnp.iinfo(dtype).max


def _put(out: TensorSpec, x: Any, index: Any, source: Any, accumulate: bool = False) -> Any:
    place = x.reshape(-1).at[index]
    return (place.add(source) if accumulate else place.set(source)).reshape(out.shape)


MOVEMENT: dict[str, Callable[..., Any]] = {
    "view": _view,
    **dict.fromkeys(("unsqueeze", "squeeze"), lambda out, x, *_: jnp.reshape(x, out.shape)),
    **dict.fromkeys(("_to_copy", "clone", "expand", "scalar_tensor"), _copy),
    "copy": lambda out, _, source, *__: _copy(out, source),
    **dict.fromkeys(("full", "full_like"), _full),
    **dict.fromkeys(("empty", "empty_permuted", "new_empty_strided"), _empty),
    "arange": _arange,
    "permute": lambda out, x, axes: jnp.transpose(x, [axis % x.ndim for axis in axes]),
    "repeat": lambda out, x, repeats: jnp.tile(x, repeats),
    "slice": _slice,
    "select": _select,
    "flip": lambda out, x, axes: jnp.flip(x, tuple(axes)) if x.ndim else x,
    "diagonal": lambda out, x, shift=0, first=0, second=1: jnp.diagonal(x, shift, first, second),
    "as_strided": _as_strided,
    "unfold": _unfold,
    "as_strided_scatter": _as_strided_scatter,
    "split_with_sizes": _pieces,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "slice_scatter": _slice_scatter,
    "diagonal_scatter": _diagonal_scatter,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "embedding": _embedding,
    "index_put": _index_put,
    "put": _put,
    **dict.fromkeys(("scatter", "scatter_reduce"), _scatter),
    "scatter_add": lambda out, x, axis, index, source: _scatter(out, x, axis, index, source, "add"),
}
"""Every op that moves elements, by its name in ATen."""
