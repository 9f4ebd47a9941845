"""Strided layouts: where the elements of an array lie in its buffer, and how views rewrite that.

All functions are pure. A layout means what ``torch.as_strided`` means, except that strides may be negative (a flipped
axis).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "NotViewableError",
    "Shape",
    "StridedLayout",
    "address",
    "bounds",
    "contiguous",
    "contiguous_strides",
    "expand_layout",
    "permute_layout",
    "reshape_layout",
    "slice_layout",
]

Shape = tuple[int, ...]


class NotViewableError(Exception):
    """Strides can't express the view: the expression must be stored first."""


class StridedLayout(NamedTuple):
    """The element at an index lies at ``offset + Σ index · stride``, in elements of the buffer."""

    shape: Shape
    strides: tuple[int, ...]
    offset: int = 0


def contiguous_strides(shape: Shape) -> tuple[int, ...]:
    """Row-major strides.

    >>> contiguous_strides((2, 3))
    (3, 1)
    """
    strides = []
    size = 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def contiguous(shape: Shape) -> StridedLayout:
    """The layout of a whole buffer, row-major."""
    return StridedLayout(shape, contiguous_strides(shape))


def bounds(layout: StridedLayout) -> tuple[int, int]:
    """The lowest and the highest place of an element; the layout must have at least one.

    >>> bounds(StridedLayout((2, 3), (3, -1), 2))
    (0, 5)
    """
    steps = [(size - 1) * stride for size, stride in zip(layout.shape, layout.strides, strict=True)]
    return layout.offset + sum(min(step, 0) for step in steps), layout.offset + sum(max(step, 0) for step in steps)


def address(layout: StridedLayout, indices: Sequence[str]) -> str:
    """The place of an element as a formula, in C++ and for people, given a name for the index along each axis.

    >>> address(StridedLayout((2, 1, 3), (3, 3, 1), 4), ["i", "j", "k"])
    'i * 3 + k + 4'
    """
    terms = [
        index if stride == 1 else f"{index} * {stride}"
        for index, size, stride in zip(indices, layout.shape, layout.strides, strict=True)
        if size != 1 and stride != 0
    ]
    return " + ".join([*terms, *([str(layout.offset)] if layout.offset or not terms else [])])


def expand_layout(layout: StridedLayout, shape: Shape) -> StridedLayout:
    """The layout broadcast to a shape: new axes and axes of length 1 get stride 0."""
    new = len(shape) - len(layout.shape)
    strides = (0 if size == 1 else stride for size, stride in zip(layout.shape, layout.strides, strict=True))
    return StridedLayout(shape, (*(0 for _ in range(new)), *strides), layout.offset)


def permute_layout(layout: StridedLayout, axes: Sequence[int]) -> StridedLayout:
    """The axes in another order."""
    shape, strides = (tuple(part[axis] for axis in axes) for part in layout[:2])
    return StridedLayout(shape, strides, layout.offset)


def slice_layout(layout: StridedLayout, axis: int, start: int, length: int, step: int = 1) -> StridedLayout:
    """Every ``step``-th element of an axis, ``length`` of them, from ``start`` on; a negative step walks backwards."""
    shape, strides, offset = list(layout.shape), list(layout.strides), layout.offset
    offset += start * strides[axis]
    shape[axis], strides[axis] = length, strides[axis] * step
    return StridedLayout(tuple(shape), tuple(strides), offset)


def reshape_layout(layout: StridedLayout, shape: Shape) -> StridedLayout:
    """The layout in another shape of as many elements, in row-major order of the index.

    Raises:
        NotViewableError: no strides do it.
    """
    if math.prod(shape) == 0:
        return contiguous(shape)._replace(offset=layout.offset)
    # Neighbouring axes that one stride walks through are one run of elements, (size, stride). Two axes form a run where
    # a step along the outer one is as long as the whole inner one. Any shape can be cut out of a run, but an axis of
    # the new shape that spans two runs would need two strides.
    runs: list[tuple[int, int]] = []
    for size, stride in zip(layout.shape, layout.strides, strict=True):
        if size == 1:
            continue  # its stride is never used, and must not break a run
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    # Cuts the new axes from the runs, the innermost axis from the last run first: ``left`` elements of the present run
    # are not yet used, and the next axis walks through them in steps of ``stride``.
    strides = [0] * len(shape)
    left, stride = 1, 0
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        if left == 1:
            left, stride = runs.pop()
        if left % shape[axis]:
            raise NotViewableError
        strides[axis] = stride
        left //= shape[axis]
        stride *= shape[axis]
    return StridedLayout(shape, tuple(strides), layout.offset)
