"""What a step is lowered to: pointwise expressions over strided buffers.

An expression has a shape and a dtype, and a value at each index of its shape. Its leaves are strided, so that every
view (permute, expand, slice, ...) only rewrites strides, however deep the expression below it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

__all__ = [
    "Buffer",
    "Const",
    "DynamicIndex",
    "Expr",
    "Iota",
    "Layout",
    "Load",
    "NotViewableError",
    "Op",
    "Shape",
    "broadcast_shape",
    "contiguous_strides",
    "leaves",
    "reshape_layout",
    "viewed",
]

Shape = tuple[int, ...]


class NotViewableError(Exception):
    """Strides can't express the view: the expression must be stored first."""


class Layout(NamedTuple):
    """Where the element at an index lies: at ``offset + Σ index · stride``."""

    shape: Shape
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory of one lane block, or of all lanes alike.

    Attributes:
        name: in the emitted code.
        dtype: of its elements.
        numel: elements per lane.
        uniform: whether all lanes share it, so that it has no lane axis.
    """

    name: str
    dtype: torch.dtype
    numel: int
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class DynamicIndex:
    """A computed index: it adds ``value · stride``, and must lie in ``[0, size)``, or from ``-size`` on if it wraps."""

    value: Expr
    stride: int
    size: int
    wraps: bool = False


@dataclass(frozen=True, eq=False)
class Load:
    """Reads (or, as a target, names) elements of a buffer."""

    buffer: Buffer
    layout: Layout
    dynamic: tuple[DynamicIndex, ...] = ()

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.buffer.dtype

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the buffer, in order."""
        shape, strides, offset = self.layout
        return (
            not self.dynamic
            and offset == 0
            and math.prod(shape) == self.buffer.numel
            and all(
                size == 1 or stride == plain
                for size, stride, plain in zip(shape, strides, contiguous_strides(shape), strict=True)
            )
        )


@dataclass(frozen=True, eq=False)
class Const:
    """One number, everywhere."""

    value: float | int | bool
    dtype: torch.dtype
    shape: Shape = ()


@dataclass(frozen=True, eq=False)
class Iota:
    """The integer ``offset + Σ index · stride``."""

    layout: Layout
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.layout.shape


@dataclass(frozen=True, eq=False)
class Op:
    """A C++ expression of operands of the same shape.

    Attributes:
        template: with ``{0}``, ``{1}``, ... for the operands.
        operands: expressions.
        dtype: of the result, to which the C++ expression is cast.
        shape: of the result and of the operands.
        depth: how many operations stand on each other.
    """

    template: str
    operands: tuple[Expr, ...]
    dtype: torch.dtype
    shape: Shape
    depth: int = 0


Expr = Load | Const | Iota | Op


def broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    """What shapes that fit come to: `torch.broadcast_shapes`, which imports sympy.

    >>> broadcast_shape([(2, 1), (3,)])
    (2, 3)
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


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


def leaves(expr: Expr) -> Iterator[Load | Const | Iota]:
    """All that an expression reads, index expressions included."""
    if isinstance(expr, Op):
        for operand in expr.operands:
            yield from leaves(operand)
    else:
        yield expr
        if isinstance(expr, Load):
            for index in expr.dynamic:
                yield from leaves(index.value)


def viewed(expr: Expr, view: Callable[[Layout], Layout]) -> Expr:
    """The expression seen through a view, a function on layouts.

    Raises:
        NotViewableError: the view raised it for a leaf.
    """
    if isinstance(expr, Op):
        operands = tuple(viewed(operand, view) for operand in expr.operands)
        return replace(expr, operands=operands, shape=view(_flat_layout(expr.shape)).shape)
    if isinstance(expr, Const):
        return replace(expr, shape=view(_flat_layout(expr.shape)).shape)
    layout = view(expr.layout)
    if isinstance(expr, Load):
        dynamic = tuple(replace(index, value=viewed(index.value, view)) for index in expr.dynamic)
        return replace(expr, layout=layout, dynamic=dynamic)
    return replace(expr, layout=layout)


def reshape_layout(layout: Layout, shape: Shape) -> Layout:
    """The layout with another shape of as many elements.

    Raises:
        NotViewableError: no strides do it.
    """
    if math.prod(shape) == 0:
        return Layout(shape, contiguous_strides(shape), layout.offset)
    runs: list[tuple[int, int]] = []  # what is contiguous in itself: (size, stride of its last axis)
    for size, stride in zip(layout.shape, layout.strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
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
    return Layout(shape, tuple(strides), layout.offset)


def _flat_layout(shape: Shape) -> Layout:
    return Layout(shape, (0,) * len(shape))
