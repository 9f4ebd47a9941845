"""Ops that make tensors from numbers alone."""

from __future__ import annotations

from typing import Any

from popart_func.engines.native.expressions import Const, Expr, Iota
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.native.layouts import StridedLayout
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["CREATION"]


def _full(kernel: Kernel, out: TensorSpec, _: Any, value: Any = 0, *__: Any) -> Expr:
    return kernel.expand(kernel.operand(value, out.dtype), out.shape)


def _scalar_tensor(kernel: Kernel, out: TensorSpec, value: Any, *_: Any) -> Expr:
    return kernel.operand(value, out.dtype)


def _empty(kernel: Kernel, out: TensorSpec, *_: Any) -> Expr:
    return Const(0, out.dtype, out.shape)


def _arange(kernel: Kernel, out: TensorSpec, start: Any, end: Any, step: Any = 1, *_: Any) -> Expr:
    indices = Iota(StridedLayout(out.shape, (1,)))
    if all(isinstance(value, int) for value in (start, step)):
        return kernel.cast(Iota(StridedLayout(out.shape, (step,), start)), out.dtype)
    operands = (kernel.operand(value, out.dtype) for value in (start, step))
    return kernel.pointwise("{1} + {0} * {2}", out.dtype, kernel.cast(indices, out.dtype), *operands)


CREATION: dict[str, Lowering] = {
    **dict.fromkeys(("full", "full_like"), _full),
    **dict.fromkeys(("empty", "empty_permuted", "new_empty_strided"), _empty),
    "scalar_tensor": _scalar_tensor,
    "arange": _arange,
}
"""Every op that makes a tensor, by its name in ATen."""
