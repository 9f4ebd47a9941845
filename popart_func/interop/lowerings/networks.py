"""Lowerings of convolution, pooling and interpolation; `table` says how an op is called.

The graph of a step that calls `torch.func.grad` has backward ops: JAX derives them from the lowering of the forward op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

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


def _pair(value: Sequence[int], default: Sequence[int] = (1, 1)) -> tuple[int, int]:
    value = tuple(value) or tuple(default)
    return (value[0], value[-1])


def _windows(shape: Any, outs: Any, kernel: Any, strides: Any, pads: Any, dilations: Any) -> tuple[Any, Any, Any]:
    """The rows ``[out, 1, kernel, 1]`` and columns ``[1, out, 1, kernel]`` of each window, and which lie inside."""
    places = [
        np.arange(outs[axis])[:, None] * strides[axis] - pads[axis] + np.arange(kernel[axis]) * dilations[axis]
        for axis in (0, 1)
    ]
    rows, columns = places[0][:, None, :, None], places[1][None, :, None, :]
    exist = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    return rows.clip(0, shape[0] - 1), columns.clip(0, shape[1] - 1), exist


def _max_pool(
    outs: Any, x: Any, kernel: Any, strides: Any = (), pads: Any = (0,), dilations: Any = (1,), *_: Any
) -> Any:
    kernel = _pair(kernel)
    shape, size = outs[0].shape, (x.shape[-2], x.shape[-1])
    rows, columns, exist = _windows(size, shape[-2:], kernel, _pair(strides, kernel), _pair(pads), _pair(dilations))
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    windows = jnp.where(exist, x[..., rows, columns], lowest).reshape(*shape, -1)
    best = jnp.argmax(windows, axis=-1, keepdims=True)
    values = jnp.take_along_axis(windows, best, -1)[..., 0]
    flat = jnp.asarray(np.broadcast_to(rows * size[1] + columns, exist.shape).reshape(*shape[-2:], -1))
    index = jnp.take_along_axis(jnp.broadcast_to(flat, windows.shape), best, -1)[..., 0]
    return [values, index]


def _max_pool_backward(out: TensorSpec, cotangent: Any, x: Any, *rest: Any) -> Any:
    index = rest[-1].reshape(-1, int(np.prod(cotangent.shape[-2:])))
    flat = jnp.zeros((index.shape[0], x.shape[-2] * x.shape[-1]), x.dtype)
    lines = jnp.arange(index.shape[0])[:, None]
    return flat.at[lines, index].add(cotangent.reshape(index.shape)).reshape(out.shape)


def _average(
    shape: Any, x: Any, kernel: Any, strides: Any, pads: Any, ceil: bool, with_pads: bool, divisor: Any
) -> Any:
    if ceil:
        raise NotImplementedError("ceil_mode=True")
    kernel = _pair(kernel)
    size = (x.shape[-2], x.shape[-1])
    rows, columns, exist = _windows(size, shape[-2:], kernel, _pair(strides, kernel), _pair(pads), (1, 1))
    total = jnp.where(exist, x[..., rows, columns], 0).sum((-2, -1))
    if divisor is not None:
        return total / divisor
    return total / (kernel[0] * kernel[1] if with_pads else exist.sum((-2, -1)))


def _average_pool(
    out: TensorSpec,
    x: Any,
    kernel: Any,
    strides: Any = (),
    pads: Any = (0,),
    ceil: bool = False,
    with_pads: bool = True,
    divisor: Any = None,
) -> Any:
    return _average(out.shape, x, kernel, strides, pads, ceil, with_pads, divisor)


def _average_pool_backward(out: TensorSpec, cotangent: Any, x: Any, *setting: Any) -> Any:
    _, pull_back = jax.vjp(lambda x: _average(cotangent.shape, x, *setting), x)
    return pull_back(cotangent)[0]


def _shares(size: int, parts: int) -> Any:
    """The matrix ``[parts, size]`` that averages over parts of almost equal length, which may overlap."""
    shares = np.zeros((parts, size))
    for part in range(parts):
        places = slice(part * size // parts, -(-(part + 1) * size // parts))
        shares[part, places] = 1 / (places.stop - places.start)
    return shares


def _adaptive_average(shape: Any, x: Any) -> Any:
    rows, columns = (jnp.asarray(_shares(x.shape[axis], shape[axis]), x.dtype) for axis in (-2, -1))
    return jnp.einsum("...hw,ih,jw->...ij", x, rows, columns, precision=jax.lax.Precision.HIGHEST)


def _adaptive_average_backward(out: TensorSpec, cotangent: Any, x: Any) -> Any:
    return jax.vjp(lambda x: _adaptive_average(cotangent.shape, x), x)[1](cotangent)[0]


def _interpolation(kind: str, rank: int, size: int, outs: int, *setting: Any) -> Any:
    """The matrix ``[out, in]`` of an interpolation along an axis, as PyTorch computes it of unit vectors."""
    others = (1,) * (rank - 1)
    image = torch.eye(size, dtype=torch.float64).reshape(1, size, size, *others)
    nothing = [None] * (rank - 1)
    return getattr(torch.ops.aten, kind)(image, [outs, *others], *setting, *nothing).reshape(size, outs).T.numpy()


def _interpolate(kind: str, back: bool = False) -> Callable[..., Any]:
    rank = next(int(letter) for letter in kind if letter.isdigit())

    def op(out: TensorSpec, x: Any, outs: Any, *setting: Any) -> Any:
        sizes, setting = (setting[0], setting[1:]) if back else (x.shape, setting)
        aligned, scales = setting[:-rank], setting[-rank:]
        for axis in range(-rank, 0):
            matrix = _interpolation(kind, rank, sizes[axis], outs[axis], *aligned, scales[axis])
            matrix = jnp.asarray(matrix.T if back else matrix, x.dtype)
            product = jnp.tensordot(x, matrix, (axis % x.ndim, 1), precision=jax.lax.Precision.HIGHEST)
            x = jnp.moveaxis(product, -1, axis)
        return x

    return op


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


def _trilinear(out: TensorSpec, *arguments: Any) -> Any:
    """The product of three tensors, each with new axes, summed over some axes."""
    factors, new_axes, summed = arguments[:3], arguments[3:6], arguments[6]
    x, y, z = (jnp.expand_dims(factor, axes) for factor, axes in zip(factors, new_axes, strict=True))
    return (x * y * z).sum(tuple(summed))


INTERPOLATIONS = ("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")
# Tracing replaces the forward ops of these by simpler ones.
COPIES = ("upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact2d")

NETWORKS: dict[str, Lowering] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "avg_pool2d": _average_pool,
    "avg_pool2d_backward": _average_pool_backward,
    "_adaptive_avg_pool2d": lambda out, x, _: _adaptive_average(out.shape, x),
    "_adaptive_avg_pool2d_backward": _adaptive_average_backward,
    **{kind: _interpolate(kind) for kind in INTERPOLATIONS},
    **{f"{kind}_backward": _interpolate(kind, back=True) for kind in (*INTERPOLATIONS, *COPIES)},
    **{f"replication_pad{rank}d_backward": _replication_backward for rank in (1, 2, 3)},
    "_cdist_forward": lambda out, x, y, power, *_: _distances(x, y, power),
    "_cdist_backward": _distances_backward,
    "_trilinear": _trilinear,
}
"""Every op of convolution, pooling, interpolation, normalization and distances, by its name in ATen."""
