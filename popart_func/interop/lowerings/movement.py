"""Lowerings of the ops that move elements or make new ones; `table` says how an op is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering
from popart_func.interop.trees import jax_dtype

__all__ = ["MOVEMENT"]

_MANY = 32
"""From how long windows on elements are gathered: for shorter ones, slices side by side are faster."""


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
    count = out.shape[axis]
    if size > _MANY:
        places = np.arange(count)[:, None] * step + np.arange(size)
        return jnp.moveaxis(jnp.take(x, places, axis=axis), axis + 1, -1)
    ends = [first + (count - 1) * step + 1 for first in range(size)]
    return jnp.stack([jax.lax.slice_in_dim(x, end - ends[0], end, step, axis) for end in ends], -1)


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


MOVEMENT: dict[str, Lowering] = {
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
}
"""Every op that moves elements or makes new ones, by its name in ATen."""
