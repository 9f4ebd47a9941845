"""Products of matrices and vectors."""

from __future__ import annotations

from typing import Any

from popart_func.engines.native.expressions import Expr
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["PRODUCTS"]


def _mm(kernel: Kernel, out: TensorSpec, left: Expr, right: Expr) -> Expr:
    return kernel.reshape(kernel.matmul(_batched(kernel, left), _batched(kernel, right)), out.shape)


def _batched(kernel: Kernel, x: Expr) -> Expr:
    return x if len(x.shape) == 3 else kernel.reshape(x, (1, *x.shape))


def _mv(kernel: Kernel, out: TensorSpec, matrix: Expr, vector: Expr) -> Expr:
    return _mm(kernel, out, matrix, kernel.reshape(vector, (vector.shape[0], 1)))


def _addmm(kernel: Kernel, out: TensorSpec, bias: Expr, left: Expr, right: Expr, beta: Any = 1, alpha: Any = 1) -> Expr:
    product = _mm(kernel, out, left, right) if len(right.shape) > 1 else _mv(kernel, out, left, right)
    if alpha != 1:
        product = kernel.pointwise("{0} * {1}", out.dtype, product, kernel.operand(alpha, out.dtype))
    if beta == 0:
        return product
    if beta != 1:
        bias = kernel.pointwise("{0} * {1}", out.dtype, bias, kernel.operand(beta, out.dtype))
    return kernel.pointwise("{1} + {0}", out.dtype, product, bias)


PRODUCTS: dict[str, Lowering] = {
    "mm": _mm,
    "bmm": _mm,
    **dict.fromkeys(("addmm", "addmv"), _addmm),
}
"""Every product, by its name in ATen."""
