"""Lowerings of sorting, of searching, and of the places of extremes; `table` says how an op is called."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["ORDER"]


def _arg(function: Lowering) -> Lowering:
    def op(out: TensorSpec, x: Any, axis: int | None = None, *_: Any) -> Any:
        x, axis = (x.reshape(-1), 0) if axis is None or not x.ndim else (x, axis)
        return function(x, axis=axis).reshape(out.shape)

    return op


def _best(every: Lowering, which: Lowering) -> Lowering:
    def op(outs: Any, x: Any, axis: int | None = None, *_: Any) -> Any:
        if axis is None:
            return every(x)
        x = x.reshape(1) if not x.ndim else x
        return _taken(outs, x, which(x, axis=axis, keepdims=True), axis)

    return op


def _taken(outs: Any, x: Any, index: Any, axis: int) -> list[Any]:
    return [jnp.take_along_axis(x, index, axis).reshape(outs[0].shape), index.reshape(outs[1].shape)]


def _cummax(function: Lowering) -> Lowering:
    def op(outs: Any, x: Any, axis: int) -> Any:
        if not x.ndim:
            return [x, jnp.zeros((), jnp.int32)]
        axis %= x.ndim
        places = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        best = (x == function(x, axis=axis)) | jnp.isnan(x)  # PyTorch has a NaN's own place, and keeps the NaN
        index = jax.lax.cummax(jnp.where(best, places, 0), axis=axis)
        return [jnp.take_along_axis(x, index, axis), index]

    return op


def _sort(outs: Any, x: Any, *arguments: Any) -> Any:
    # sort(x, dim, descending), and sort.stable(x, stable, dim, descending)
    axis, descending = (arguments[1], arguments[2]) if len(arguments) == 3 else (*arguments, -1, False)[:2]
    x_ = x.reshape(1) if not x.ndim else x
    order = jnp.argsort(x_, axis=axis, stable=True, descending=descending)
    return _taken(outs, x_, order, axis)


def _topk(outs: Any, x: Any, k: int, axis: int = -1, largest: bool = True, *_: Any) -> Any:
    order = jnp.argsort(x, axis=axis, stable=True, descending=largest)
    return _taken(outs, x, jax.lax.slice_in_dim(order, 0, k, axis=axis % x.ndim), axis)


def _searched(out: TensorSpec, boundaries: Any, x: Any, right: bool, side: str | None = None) -> Any:
    find = functools.partial(jnp.searchsorted, side=side or ("right" if right else "left"))
    if boundaries.ndim == 1:
        return find(boundaries, x)
    return jnp.vectorize(find, signature="(n),(m)->(m)")(boundaries, x)


def _search_sorted(
    out: TensorSpec, boundaries: Any, x: Any, _: bool = False, right: bool = False, side: Any = None, sorter: Any = None
) -> Any:
    boundaries = boundaries if sorter is None else jnp.take_along_axis(boundaries, sorter, -1)
    return _searched(out, boundaries, x, right, side)


ORDER: dict[str, Lowering] = {
    "argmax": _arg(jnp.argmax),
    "argmin": _arg(jnp.argmin),
    "max": _best(jnp.max, jnp.argmax),
    "min": _best(jnp.min, jnp.argmin),
    "cummax": _cummax(jax.lax.cummax),
    "cummin": _cummax(jax.lax.cummin),
    "sort": _sort,
    "topk": _topk,
    "searchsorted": _search_sorted,
    "bucketize": lambda out, x, boundaries, _=False, right=False: _searched(out, boundaries, x, right),
}
"""Every op that sorts, searches, or finds the place of an extreme, by its name in ATen."""
