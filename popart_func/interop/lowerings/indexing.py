"""Lowerings of the ops that read or write at computed places; `table` says how an op is called.

PyTorch refuses an index out of range. JAX does not: it clamps the index, or drops what would be written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from popart_func.engines.lane_scan import NotLoweredError
from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["INDEXING"]


def _gather(out: TensorSpec, x: Any, axis: int, index: Any, *_: Any) -> Any:
    if not x.ndim:
        return jnp.broadcast_to(x, index.shape)
    axis %= x.ndim
    if not index.ndim:  # of a vector, as in `q.gather(-1, action)`
        return x[index]
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


_COMBINE = {"add": "add", "sum": "add", "multiply": "multiply", "prod": "multiply", "amax": "max", "amin": "min"}


def _scatter(
    out: TensorSpec, x: Any, axis: int, index: Any, source: Any, reduce: Any = None, include_self: bool = True
) -> Any:
    if reduce == "mean" or not include_self:
        raise NotLoweredError(f"reduce={reduce!r}, include_self={include_self}")
    target, index = (x.reshape(1), index.reshape(-1)) if not x.ndim else (x, index)
    if isinstance(source, jax.Array) and source.ndim:
        source = source[tuple(slice(size) for size in index.shape)]
    axes = list(jnp.indices(index.shape, sparse=True))
    axes[axis % target.ndim] = index
    source = jnp.broadcast_to(jnp.asarray(source, x.dtype), index.shape)
    return getattr(target.at[tuple(axes)], _COMBINE.get(reduce, "set"))(source).reshape(out.shape)


def _nonzero(out: TensorSpec, x: Any, size: int = 0, fill: int = -1) -> Any:
    if not x.ndim:
        return jnp.zeros(out.shape, jnp.int32)
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill), -1)


INDEXING: dict[str, Lowering] = {
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "embedding": _embedding,
    "index_put": _index_put,
    "nonzero_static": _nonzero,
    **dict.fromkeys(("scatter", "scatter_reduce"), _scatter),
    "scatter_add": lambda out, x, axis, index, source: _scatter(out, x, axis, index, source, "add"),
}
"""Every op that reads or writes at computed places, by its name in ATen."""
