"""Ops that combine elements along axes: sums, means, extremes and their positions, softmax, cumulative sums."""

from __future__ import annotations

import math
from typing import Any

from popart_func.engines.native.expressions import Const, Expr
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["REDUCTIONS"]

# Where to start from, and how to combine; NaN counts as greater than all numbers.
SIMPLE = {
    "sum": ("0", "{0} + {1}"),
    "prod": ("1", "{0} * {1}"),
    "amax": ("LOWEST", "maximum({0}, {1})"),
    "amin": ("GREATEST", "minimum({0}, {1})"),
    "any": ("0", "({0} != 0) | ({1} != 0)"),
}


def _reduction(name: str) -> Lowering:
    start, combine = SIMPLE[name]

    def op(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, *_: Any) -> Expr:
        return kernel.reshape(kernel.reduce(kernel.cast(x, out.dtype), _axes(x, axes), start, combine), out.shape)

    return op


def _axes(x: Expr, axes: Any) -> list[int]:
    """An op's ``dim`` as a list of axes that are not negative; all axes where it is None or empty."""
    rank = len(x.shape)
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    return [axis % rank for axis in axes] if isinstance(axes, list | tuple) and axes and rank else list(range(rank))


def _sum_of(kernel: Kernel, x: Expr, axes: list[int]) -> Expr:
    """The sum along axes, which are kept with length 1."""
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    return kernel.reshape(kernel.reduce(x, axes, *SIMPLE["sum"]), kept)


def _mean(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, *_: Any) -> Expr:
    axes = _axes(x, axes)
    total = kernel.reshape(_sum_of(kernel, kernel.cast(x, out.dtype), axes), out.shape)
    count = math.prod(x.shape[axis] for axis in axes)
    return total if count == 1 else kernel.pointwise("{0} / {1}", out.dtype, total, Const(float(count), out.dtype))


def _var(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, correction: Any = 1, *_: Any) -> Expr:
    axes = _axes(x, axes)
    correction = 1 if correction is None else correction
    x = kernel.stored(kernel.cast(x, out.dtype))
    count = math.prod(x.shape[axis] for axis in axes)
    mean = kernel.pointwise("{0} / {1}", out.dtype, _sum_of(kernel, x, axes), Const(float(count), out.dtype))
    squares = kernel.pointwise("({0} - {1}) * ({0} - {1})", out.dtype, x, mean)
    total = kernel.reshape(_sum_of(kernel, squares, axes), out.shape)
    return kernel.pointwise("{0} / {1}", out.dtype, total, Const(float(max(count - correction, 0)), out.dtype))


def _softmax(log: bool) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, *_: Any) -> Expr:
        if 0 in x.shape:
            return Const(0, out.dtype, x.shape)
        axes = _axes(x, axis)
        x = kernel.stored(kernel.cast(x, out.dtype))
        kept = tuple(1 if other in axes else size for other, size in enumerate(x.shape))
        greatest = kernel.reshape(kernel.reduce(x, axes, *SIMPLE["amax"]), kept)
        shifted = kernel.pointwise("{0} - {1}", out.dtype, x, greatest)
        if log:
            shifted = kernel.stored(shifted)
        powers = kernel.stored(kernel.pointwise("vector_exp({0})", out.dtype, shifted))
        total = kernel.stored(_sum_of(kernel, powers, axes))
        if log:
            return kernel.pointwise(
                "{0} - {1}", out.dtype, shifted, kernel.pointwise("vector_log({0})", out.dtype, total)
            )
        return kernel.pointwise("{0} / {1}", out.dtype, powers, total)

    return op


def _arg(better: str) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int | None = None, *_: Any) -> Expr:
        x, axis = (kernel.reshape(x, (math.prod(x.shape),)), 0) if axis is None or not x.shape else (x, axis)
        return kernel.reshape(kernel.arg_reduce(x, axis % len(x.shape), better), out.shape)

    return op


def _best(name: str, better: str) -> Lowering:
    def op(kernel: Kernel, outs: Any, x: Expr, axis: int | None = None, *_: Any) -> Any:
        if axis is None:
            return _reduction(name)(kernel, outs, x)
        x = kernel.stored(x)
        return [_reduction(name)(kernel, outs[0], x, axis), _arg(better)(kernel, outs[1], x, axis)]

    return op


def _cumulative(combine: str) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, *_: Any) -> Expr:
        x = kernel.cast(x, out.dtype)
        return kernel.cumulate(x, axis % len(x.shape), combine) if x.shape else x

    return op


REDUCTIONS: dict[str, Lowering] = {
    **{name: _reduction(name) for name in SIMPLE},
    "mean": _mean,
    "var": _var,
    "var_mean": lambda kernel, outs, x, axes=None, *rest: [
        _var(kernel, outs[0], x, axes, *rest),
        _mean(kernel, outs[1], x, axes),
    ],
    "_softmax": _softmax(log=False),
    "_log_softmax": _softmax(log=True),
    "argmax": _arg("better_max({0}, {1})"),
    "argmin": _arg("better_min({0}, {1})"),
    "max": _best("amax", "better_max({0}, {1})"),
    "min": _best("amin", "better_min({0}, {1})"),
    "cumsum": _cumulative("{0} + {1}"),
    "cumprod": _cumulative("{0} * {1}"),
}
"""Every op that combines elements along axes, by its name in ATen."""
