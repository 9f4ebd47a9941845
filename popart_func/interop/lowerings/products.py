"""Lowerings of matrix products; `table` says how an op is called."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering, operand

__all__ = ["PRODUCTS"]


def _mm(out: TensorSpec, left: Any, right: Any) -> Any:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _addmm(out: TensorSpec, bias: Any, left: Any, right: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _mm(out, left, right)
    product = product if alpha == 1 else product * operand(alpha, out.dtype)
    if beta == 0:
        return jnp.broadcast_to(product, out.shape)
    return (bias if beta == 1 else bias * operand(beta, out.dtype)) + product


PRODUCTS: dict[str, Lowering] = {
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "addmv"), _addmm),
}
"""Every matrix product, by its name in ATen."""
