"""Lowerings of matrix products and convolutions; `table` says how an op is called.

The graph of a step that calls `torch.func.grad` has backward ops: JAX derives them from the lowering of the forward op.
"""

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


def _convolve(
    x: Any, weight: Any, strides: Any, pads: Any, dilations: Any, transposed: bool, extra: Any, groups: int
) -> Any:
    rank = x.ndim - 2
    strides, pads, dilations, extra = (
        tuple(value) * (rank if len(value) == 1 else 1) for value in (strides, pads, dilations, extra)
    )
    inner = None
    sides = [(pad, pad) for pad in pads]
    if transposed:
        # [in, out / groups, ...] as the kernel [out, in / groups, ...] of the convolution that spreads the input.
        parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = jnp.flip(jnp.swapaxes(parts, 1, 2), tuple(range(3, parts.ndim)))
        weight = weight.reshape(-1, *weight.shape[2:])
        spans = [dilation * (size - 1) for dilation, size in zip(dilations, weight.shape[2:], strict=True)]
        sides = [(span - pad, span - pad + more) for span, pad, more in zip(spans, pads, extra, strict=True)]
        inner, strides = strides, (1,) * rank
    return jax.lax.conv_general_dilated(
        x,
        weight,
        strides,
        sides,
        lhs_dilation=inner,
        rhs_dilation=dilations,
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )


def _convolution(out: TensorSpec, x: Any, weight: Any, bias: Any, *setting: Any) -> Any:
    result = _convolve(x, weight, *setting)
    return result if bias is None else result + bias.reshape(-1, *(1 for _ in x.shape[2:]))


def _convolution_backward(outs: Any, cotangent: Any, x: Any, weight: Any, _: Any, *rest: Any) -> Any:
    *setting, _mask = rest
    _, pull_back = jax.vjp(lambda x, weight: _convolve(x, weight, *setting), x, weight)
    return [*pull_back(cotangent), cotangent.sum((0, *range(2, cotangent.ndim)))]


PRODUCTS: dict[str, Lowering] = {
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "addmv"), _addmm),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
"""Every matrix product and convolution, by its name in ATen."""
