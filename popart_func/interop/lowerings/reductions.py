"""Lowerings of reductions, of cumulative ops, and of softmax; `table` says how an op is called."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering, axes_of, operand

__all__ = ["REDUCTIONS"]


def _reduction(function: Lowering) -> Lowering:
    def op(out: TensorSpec, x: Any, axes: Any = None, *_: Any) -> Any:
        return function(operand(x, out.dtype), axis=axes_of(x, axes)).reshape(out.shape)

    return op


def _var(out: TensorSpec, x: Any, axes: Any = None, correction: Any = 1, *_: Any) -> Any:
    axes, x = axes_of(x, axes), operand(x, out.dtype)
    count = math.prod(x.shape[axis] for axis in axes)
    squares = jnp.square(x - jnp.mean(x, axis=axes, keepdims=True)).sum(axes)
    return (squares / max(count - (1 if correction is None else correction), 0.0)).reshape(out.shape)


def _along(function: Lowering) -> Lowering:
    """A function along an axis; a number without axes is taken as a vector of one."""

    def op(out: TensorSpec, x: Any, axis: int, *_: Any) -> Any:
        x = operand(x, out.dtype)
        return function(x, axis=axis % x.ndim) if x.ndim else function(x[None], axis=0)[0]

    return op


def _softmax(x: Any, axis: int) -> Any:
    """The softmax; NaN with derivative 0 where all is masked, which `scaled_dot_product_attention` replaces by 0."""
    masked = (x == -jnp.inf).all(axis, keepdims=True)
    return jnp.where(masked, jnp.nan, jax.nn.softmax(jnp.where(masked, 0, x), axis))


REDUCTIONS: dict[str, Lowering] = {
    "sum": _reduction(jnp.sum),
    "prod": _reduction(jnp.prod),
    "amax": _reduction(jnp.max),
    "amin": _reduction(jnp.min),
    "any": _reduction(jnp.any),
    "mean": _reduction(jnp.mean),
    "var": _var,
    "var_mean": lambda outs, x, axes=None, *rest: [
        _var(outs[0], x, axes, *rest),
        _reduction(jnp.mean)(outs[1], x, axes),
    ],
    "_softmax": _along(_softmax),
    "_log_softmax": _along(jax.nn.log_softmax),
    "cumsum": _along(jnp.cumsum),
    "cumprod": _along(jnp.cumprod),
    "logcumsumexp": _along(jax.lax.cumlogsumexp),
}
"""Every op that combines the numbers along axes, by its name in ATen."""
