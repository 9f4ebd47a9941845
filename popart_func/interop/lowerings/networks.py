"""Lowerings of convolution, padding and distances; `table` says how an op is called.

The graph of a step that calls `torch.func.grad` has backward ops: JAX derives them from the lowering of the forward op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["NETWORKS"]


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


def _replication_backward(out: TensorSpec, cotangent: Any, x: Any, pads: Sequence[int]) -> Any:
    sides = [(pads[position], pads[position + 1]) for position in range(0, len(pads), 2)][::-1]

    def pad(x: Any) -> Any:
        for axis, (before, after) in enumerate(sides, x.ndim - len(sides)):
            x = jnp.take(x, np.arange(-before, x.shape[axis] + after).clip(0, x.shape[axis] - 1), axis)
        return x

    return jax.vjp(pad, x)[1](cotangent)[0]


def _distances(x: Any, y: Any, power: float) -> Any:
    """The distances between rows; the derivative of that between equal rows is 0."""
    difference = x[..., :, None, :] - y[..., None, :, :]
    size = jnp.abs(jnp.where(difference == 0, 0, difference))
    if power == 0:
        return (size != 0).sum(-1).astype(x.dtype)
    if power in (1, math.inf):
        return size.sum(-1) if power == 1 else size.max(-1, initial=0)
    total = (size**power).sum(-1)
    return jnp.where(total == 0, 0, jnp.where(total == 0, 1, total) ** (1 / power))


def _distances_backward(out: TensorSpec, cotangent: Any, x: Any, y: Any, power: float, _: Any) -> Any:
    return jax.vjp(lambda x: _distances(x, y, power), x)[1](cotangent)[0]


def _pair_distances(out: TensorSpec, x: Any, power: float = 2.0) -> Any:
    first, second = np.triu_indices(x.shape[0], 1)
    return jax.vmap(lambda a, b: _distances(a[None], b[None], power)[0, 0])(x[first], x[second])


def _trilinear(out: TensorSpec, *arguments: Any) -> Any:
    """The product of three tensors, each with new axes, summed over some axes."""
    factors, new_axes, summed = arguments[:3], arguments[3:6], arguments[6]
    x, y, z = (jnp.expand_dims(factor, axes) for factor, axes in zip(factors, new_axes, strict=True))
    return (x * y * z).sum(tuple(summed))


NETWORKS: dict[str, Lowering] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **{f"replication_pad{rank}d_backward": _replication_backward for rank in (1, 2, 3)},
    "_pdist_forward": _pair_distances,
    "_cdist_forward": lambda out, x, y, power, *_: _distances(x, y, power),
    "_cdist_backward": _distances_backward,
    "_trilinear": _trilinear,
}
"""Every op of convolution, padding and distances, by its name in ATen."""
