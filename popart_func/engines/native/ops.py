"""The table of ops: each ATen op as expressions and statements.

An op is called with the kernel, the spec of its result (a list of them if there are several), and its arguments in the
schema's order; tensors among them are expressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from popart_func.engines.native.expressions import Const, Expr
from popart_func.engines.native.indexing import INDEXING, NotLoweredError
from popart_func.engines.native.pointwise import C_TYPES, POINTWISE, operand
from popart_func.engines.tracing.step_graph import TensorSpec

if TYPE_CHECKING:
    from popart_func.engines.native.lower import Kernel

__all__ = ["C_TYPES", "OPS", "NotLoweredError", "is_view"]

# start and combine; NaN is greater than everything.
REDUCTIONS = {
    "sum": ("0", "{0} + {1}"),
    "prod": ("1", "{0} * {1}"),
    "amax": ("LOWEST", "maximum({0}, {1})"),
    "amin": ("GREATEST", "minimum({0}, {1})"),
    "any": ("0", "({0} != 0) | ({1} != 0)"),
}

VIEWS = [
    "view",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "t",
    "expand",
    "unsqueeze",
    "squeeze",
    "select",
    "slice",
    "diagonal",
    "flip",
    "alias",
    "detach",
    "clone",
]


def is_view(node: fx.Node) -> bool:
    """Whether a node only shows other elements of one tensor, each at most once."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name.removeprefix("aten::") not in VIEWS:
        return False
    (source,) = node.all_input_nodes
    return bool(node.meta["val"].numel() <= source.meta["val"].numel())


def _reduction(name: str) -> Callable[..., Expr]:
    start, combine = REDUCTIONS[name]

    def op(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, *_: Any) -> Expr:
        return kernel.reshape(kernel.reduce(kernel.cast(x, out.dtype), _axes(x, axes), start, combine), out.shape)

    return op


def _axes(x: Expr, axes: Any) -> list[int]:
    rank = len(x.shape)
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    return [axis % rank for axis in axes] if isinstance(axes, list | tuple) and axes and rank else list(range(rank))


def _sum_of(kernel: Kernel, x: Expr, axes: list[int]) -> Expr:
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    return kernel.reshape(kernel.reduce(x, axes, *REDUCTIONS["sum"]), kept)


def _mean(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, *_: Any) -> Expr:
    axes = _axes(x, axes)
    total = kernel.reshape(_sum_of(kernel, kernel.cast(x, out.dtype), axes), out.shape)
    count = math.prod(x.shape[axis] for axis in axes)
    return total if count == 1 else kernel.op("{0} / {1}", out.dtype, total, Const(float(count), out.dtype))


def _var(kernel: Kernel, out: TensorSpec, x: Expr, axes: Any = None, correction: Any = 1, *_: Any) -> Expr:
    axes = _axes(x, axes)
    correction = 1 if correction is None else correction
    x = kernel.stored(kernel.cast(x, out.dtype))
    count = math.prod(x.shape[axis] for axis in axes)
    mean = kernel.op("{0} / {1}", out.dtype, _sum_of(kernel, x, axes), Const(float(count), out.dtype))
    squares = kernel.op("({0} - {1}) * ({0} - {1})", out.dtype, x, mean)
    total = kernel.reshape(_sum_of(kernel, squares, axes), out.shape)
    return kernel.op("{0} / {1}", out.dtype, total, Const(float(max(count - correction, 0)), out.dtype))


def _softmax(log: bool) -> Callable[..., Expr]:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, *_: Any) -> Expr:
        if 0 in x.shape:
            return Const(0, out.dtype, x.shape)
        axes = _axes(x, axis)
        x = kernel.stored(kernel.cast(x, out.dtype))
        kept = tuple(1 if other in axes else size for other, size in enumerate(x.shape))
        greatest = kernel.reshape(kernel.reduce(x, axes, *REDUCTIONS["amax"]), kept)
        shifted = kernel.op("{0} - {1}", out.dtype, x, greatest)
        if log:
            shifted = kernel.stored(shifted)
        powers = kernel.stored(kernel.op("vector_exp({0})", out.dtype, shifted))
        total = kernel.stored(_sum_of(kernel, powers, axes))
        if log:
            return kernel.op("{0} - {1}", out.dtype, shifted, kernel.op("vector_log({0})", out.dtype, total))
        return kernel.op("{0} / {1}", out.dtype, powers, total)

    return op


def _arg(better: str) -> Callable[..., Expr]:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int | None = None, *_: Any) -> Expr:
        x, axis = (kernel.reshape(x, (math.prod(x.shape),)), 0) if axis is None or not x.shape else (x, axis)
        return kernel.reshape(kernel.arg_reduce(x, axis % len(x.shape), better), out.shape)

    return op


def _best(name: str, better: str) -> Callable[..., Any]:
    def op(kernel: Kernel, outs: Any, x: Expr, axis: int | None = None, *_: Any) -> Any:
        if axis is None:
            return _reduction(name)(kernel, outs, x)
        x = kernel.stored(x)
        return [_reduction(name)(kernel, outs[0], x, axis), _arg(better)(kernel, outs[1], x, axis)]

    return op


def _cumulative(combine: str) -> Callable[..., Expr]:
    def op(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, *_: Any) -> Expr:
        x = kernel.cast(x, out.dtype)
        return kernel.scan(x, axis % len(x.shape), combine) if x.shape else x

    return op


def _mm(kernel: Kernel, out: TensorSpec, left: Expr, right: Expr) -> Expr:
    return kernel.reshape(kernel.matmul(_batched(kernel, left), _batched(kernel, right)), out.shape)


def _batched(kernel: Kernel, x: Expr) -> Expr:
    return x if len(x.shape) == 3 else kernel.reshape(x, (1, *x.shape))


def _mv(kernel: Kernel, out: TensorSpec, matrix: Expr, vector: Expr) -> Expr:
    return _mm(kernel, out, matrix, kernel.reshape(vector, (vector.shape[0], 1)))


def _addmm(kernel: Kernel, out: TensorSpec, bias: Expr, left: Expr, right: Expr, beta: Any = 1, alpha: Any = 1) -> Expr:
    product = _mm(kernel, out, left, right) if len(right.shape) > 1 else _mv(kernel, out, left, right)
    if alpha != 1:
        product = kernel.op("{0} * {1}", out.dtype, product, operand(kernel, alpha, out.dtype))
    if beta == 0:
        return product
    if beta != 1:
        bias = kernel.op("{0} * {1}", out.dtype, bias, operand(kernel, beta, out.dtype))
    return kernel.op("{1} + {0}", out.dtype, product, bias)


OPS: dict[str, Callable[..., Any]] = {
    **POINTWISE,
    **{name: _reduction(name) for name in REDUCTIONS},
    **INDEXING,
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
    "mm": _mm,
    "bmm": _mm,
    **dict.fromkeys(("addmm", "addmv"), _addmm),
}
"""Every op that the engine has, by its name in ATen."""
