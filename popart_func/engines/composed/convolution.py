"""Convolutions as matrix products over windows of a padded buffer, with both gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from popart_func.engines.composed.windows import padded, per_axis, sums_of_windows, windows

__all__ = ["CONVOLUTIONS"]


def _rows(x: Tensor, sizes: Sequence[int], options: Any, places: Sequence[int], groups: int) -> Tensor:
    """The windows of a padded ``[N, C, S...]`` as matrices ``[groups, N · O, C / groups · K]``."""
    strides, dilations = options
    parts = windows(x, sizes, strides, dilations, places)
    batch, channels = x.shape[:2]
    parts = parts.reshape(batch, groups, channels // groups, *parts.shape[2:])
    count = len(sizes)
    order = [1, 0, *range(3, 3 + count), 2, *range(3 + count, 3 + 2 * count)]
    return parts.permute(order).reshape(groups, batch * math.prod(places), channels // groups * math.prod(sizes))


def _columns(y: Tensor, groups: int) -> Tensor:
    """``[N, C, O...]`` as matrices ``[groups, N · O, C / groups]``."""
    batch, channels, *places = y.shape
    y = y.reshape(batch, groups, channels // groups, math.prod(places))
    return y.permute(1, 0, 3, 2).reshape(groups, batch * math.prod(places), channels // groups)


def _from_columns(matrices: Tensor, batch: int, places: Sequence[int]) -> Tensor:
    """The inverse of `_columns`."""
    groups, _, channels = matrices.shape
    y = matrices.reshape(groups, batch, math.prod(places), channels).permute(1, 0, 3, 2)
    return y.reshape(batch, groups * channels, *places)


def _forward(
    x: Tensor, weight: Tensor, strides: Any, pads: Any, dilations: Any, groups: int, most: Sequence[int] = ()
) -> Tensor:
    """The convolution; of ``most`` places at most along each axis, if that is given."""
    sizes = weight.shape[2:]
    x = padded(x, [(pad, pad) for pad in pads])
    places = [
        (length - dilation * (size - 1) - 1) // stride + 1
        for length, size, stride, dilation in zip(x.shape[2:], sizes, strides, dilations, strict=True)
    ]
    places = [min(pair) for pair in zip(places, most or places, strict=True)]
    rows = _rows(x, sizes, (strides, dilations), places, groups)
    factors = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    return _from_columns(rows.bmm(factors), x.shape[0], places)


def _transposed(
    y: Tensor, weight: Tensor, strides: Any, pads: Any, dilations: Any, groups: int, lengths: Sequence[int]
) -> Tensor:
    """The transpose of `_forward` in its first argument, whose spatial axes have these lengths."""
    sizes = weight.shape[2:]
    batch, places = y.shape[0], y.shape[2:]
    if all(stride == 1 for stride in strides):  # a convolution with the weight flipped: no sums of windows
        flipped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        flipped = flipped.flip(list(range(3, 3 + len(sizes)))).reshape(-1, weight.shape[0] // groups, *sizes)
        around = []
        for axis, length in enumerate(lengths):
            before = (sizes[axis] - 1) * dilations[axis] - pads[axis]
            around.append((before, length + pads[axis] - places[axis]))
        return _forward(padded(y, around), flipped, strides, [0] * len(sizes), dilations, groups)
    factors = weight.reshape(groups, weight.shape[0] // groups, -1)
    parts = _columns(y, groups).bmm(factors)  # [groups, N · O, C / groups · K]
    parts = parts.reshape(groups, batch, *places, weight.shape[1], *sizes)
    count = len(sizes)
    order = [1, 0, 2 + count, *range(2, 2 + count), *range(3 + count, 3 + 2 * count)]
    parts = parts.permute(order).reshape(batch, groups * weight.shape[1], *places, *sizes)
    return sums_of_windows(parts, lengths, strides, dilations, pads)


def _weight_gradient(
    x: Tensor, y: Tensor, sizes: Sequence[int], strides: Any, pads: Any, dilations: Any, groups: int
) -> Tensor:
    """The gradient of `_forward` in the weight, for a gradient ``y`` of its result."""
    x = padded(x, [(pad, pad) for pad in pads])
    rows = _rows(x, sizes, (strides, dilations), y.shape[2:], groups)
    product = _columns(y, groups).transpose(1, 2).bmm(rows)  # [groups, C_out / groups, C_in / groups · K]
    return product.reshape(y.shape[1], x.shape[1] // groups, *sizes)


def _options(weight: Tensor, *options: Any) -> list[list[int]]:
    return [per_axis(option, weight.ndim - 2) for option in options]


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in y.shape[2:]))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    strides, pads, dilations, more = _options(weight, stride, padding, dilation, output_padding)
    if not transposed:
        return _with_bias(_forward(x, weight, strides, pads, dilations, groups), bias)
    lengths = [
        (length - 1) * stride - 2 * pad + dilation * (size - 1) + extra + 1
        for length, stride, pad, dilation, size, extra in zip(
            x.shape[2:], strides, pads, dilations, weight.shape[2:], more, strict=True
        )
    ]
    return _with_bias(_transposed(x, weight, strides, pads, dilations, groups, lengths), bias)


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    strides, pads, dilations = _options(weight, stride, padding, dilation)
    sizes = weight.shape[2:]
    of_x: Callable[[], Tensor]
    of_weight: Callable[[], Tensor]
    if transposed:
        of_x = lambda: _forward(gradient, weight, strides, pads, dilations, groups, x.shape[2:])  # noqa: E731
        of_weight = lambda: _weight_gradient(gradient, x, sizes, strides, pads, dilations, groups)  # noqa: E731
    else:
        of_x = lambda: _transposed(gradient, weight, strides, pads, dilations, groups, x.shape[2:])  # noqa: E731
        of_weight = lambda: _weight_gradient(x, gradient, sizes, strides, pads, dilations, groups)  # noqa: E731
    of_bias = lambda: gradient.sum([0, *range(2, gradient.ndim)])  # noqa: E731
    return [make() if want else None for make, want in zip((of_x, of_weight, of_bias), wanted, strict=True)]


CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
"""Convolutions of any number of spatial axes, transposed ones too, by their name in ATen."""
