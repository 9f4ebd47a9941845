"""Windows of an array as one more axis per spatial axis, and their inverse; convolutions and pools are made of them.

A window is an overlapping strided view of a padded buffer: it moves no elements. Shapes: ``N`` batch, ``C`` channels,
``S...`` spatial axes, ``O...`` places of windows, ``K...`` places within a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["padded", "per_axis", "sums_of_windows", "windows"]


def per_axis(value: int | Sequence[int], count: int) -> list[int]:
    """An option of a convolution or a pool for each spatial axis: one number stands for all of them.

    >>> per_axis(2, 3), per_axis([4], 2), per_axis([1, 2], 2)
    ([2, 2, 2], [4, 4], [1, 2])
    """
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: int | float = 0) -> Tensor:
    """``x`` with so many more elements before and after each of its last axes; fewer where a number is negative."""
    flat = [number for pair in reversed(pads) for number in pair]
    return torch.constant_pad_nd(x, flat, value) if any(flat) else x


def windows(
    x: Tensor, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int], places: Sequence[int]
) -> Tensor:
    """The windows ``[N, C, O..., K...]`` of a padded ``[N, C, S...]``: a view.

    Args:
        x: padded, so that ``places`` windows fit.
        sizes: elements of a window along each axis.
        strides: from a window to the next.
        dilations: from an element of a window to the next.
        places: how many windows there are along each axis.
    """
    first = x.ndim - len(sizes)
    for axis, (size, stride, dilation, count) in enumerate(zip(sizes, strides, dilations, places, strict=True)):
        x = x.unfold(first + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        x = x.narrow(first + axis, 0, count)
    return x


def sums_of_windows(
    parts: Tensor, lengths: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> Tensor:
    """Adds windows ``[N, C, O..., K...]`` up where they lie: ``[N, C, S...]``, the transpose of `windows`.

    One axis after the other: with zeros between the places of windows, what meets at an element is a diagonal, which
    is a strided view of a padded buffer again. The sum along it is a reduction.

    Args:
        parts: elements of windows.
        lengths: of the result's spatial axes.
        strides: from a window to the next.
        dilations: from an element of a window to the next.
        pads: how many elements the first window begins before the result, along each axis.
    """
    count = len(lengths)
    first = parts.ndim - 2 * count
    for axis in range(count):  # the first axis of K... comes after all axes that are left
        place = first + axis
        within = first + count  # since earlier ones are summed
        x = parts.movedim((place, within), (-2, -1)).flip(-1)  # [..., O, K]
        places, size = x.shape[-2:]
        reach = (size - 1) * dilations[axis]
        length = lengths[axis]
        if strides[axis] > 1:
            x = padded(x.unsqueeze(-2), [(0, strides[axis] - 1), (0, 0)])
            x = x.reshape(*x.shape[:-3], places * strides[axis], size)
        # Element p takes from place p + pad - k * dilation, for k = size - 1, size - 2, ... since k is flipped.
        before = reach - pads[axis]
        after = length + pads[axis] - x.shape[-2]
        x = padded(x, [(before, after), (0, 0)]).clone(memory_format=torch.contiguous_format)
        outer = x.shape[:-2]
        rows = x.shape[-2]
        flat = x.reshape(-1, rows * size)
        diagonal = flat.as_strided((flat.shape[0], length, size), (rows * size, size, dilations[axis] * size + 1))
        x = diagonal.sum(-1).reshape(*outer, length)
        parts = x.movedim(-1, place)
    return parts
