"""Expressions: the values of a lowered step, computed element by element from strided buffers.

An expression has a shape and a dtype, and a value at each index of its shape. Only its leaves have strides, so that a
view (permute, expand, slice, ...) rewrites the leaves' strides, however deep the expression above them is. Printed, an
expression reads like C++ with ``i0``, ``i1``, ... for the index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from popart_func.engines.native.layouts import Shape, StridedLayout, address, contiguous_strides

__all__ = [
    "Buffer",
    "Const",
    "DynamicIndex",
    "Expr",
    "Iota",
    "Load",
    "Operation",
    "broadcast_shape",
    "index_names",
    "leaves",
    "viewed",
]


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory for one array, in each lane or shared by all lanes.

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

    @property
    def nbytes(self) -> int:
        """Bytes per lane, or of all lanes where they share it."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        shared = ", shared by all lanes" if self.uniform else ""
        return f"{self.name}: {_name(self.dtype)}[{self.numel}]{shared}"


@dataclass(frozen=True, eq=False)
class DynamicIndex:
    """An index that is computed at run time.

    It adds ``value · stride`` to the place. The value must lie in ``[0, size)``; if ``wraps``, in ``[-size, size)``.
    """

    value: Expr
    stride: int
    size: int
    wraps: bool = False


@dataclass(frozen=True, eq=False)
class Load:
    """Elements of a buffer, read; as the target of a statement, written."""

    buffer: Buffer
    layout: StridedLayout
    dynamic: tuple[DynamicIndex, ...] = ()

    @property
    def shape(self) -> Shape:
        """The shape of what is read."""
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the buffer."""
        return self.buffer.dtype

    @property
    def is_whole(self) -> bool:
        """Whether it reads the whole buffer, in order."""
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

    def __str__(self) -> str:
        if self.is_whole:
            return self.buffer.name
        terms = [str(one.value) if one.stride == 1 else f"{one.value} * {one.stride}" for one in self.dynamic]
        place = address(self.layout, index_names(self.shape))
        return f"{self.buffer.name}[{' + '.join(([place] if place != '0' or not terms else []) + terms)}]"


@dataclass(frozen=True, eq=False)
class Const:
    """The same number at each index."""

    value: float | int | bool
    dtype: torch.dtype
    shape: Shape = ()

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Iota:
    """The integer ``offset + Σ index · stride``: what counts along axes."""

    layout: StridedLayout
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> Shape:
        """The shape of the layout."""
        return self.layout.shape

    def __str__(self) -> str:
        return f"({address(self.layout, index_names(self.shape))})"


@dataclass(frozen=True, eq=False)
class Operation:
    """A C++ expression of operands that have the same shape.

    Attributes:
        template: C++, with ``{0}``, ``{1}``, ... for the operands.
        operands: expressions.
        dtype: of the result, to which the C++ expression is cast.
        shape: of the result and of the operands.
        depth: how many operations stand on each other, this one included.
    """

    template: str
    operands: tuple[Expr, ...]
    dtype: torch.dtype
    shape: Shape
    depth: int = 0

    def __str__(self) -> str:
        if self.template == "{0}":
            return f"{_name(self.dtype)}({self.operands[0]})"
        return f"({self.template.replace(', BAD', '').format(*self.operands)})"


Expr = Load | Const | Iota | Operation


def index_names(shape: Sequence[int]) -> list[str]:
    """The name of the index along each axis: ``i0``, ``i1``, ..."""
    return [f"i{axis}" for axis in range(len(shape))]


def broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    """The shape that compatible shapes broadcast to: `torch.broadcast_shapes`, which imports sympy.

    >>> broadcast_shape([(2, 1), (3,)])
    (2, 3)
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def leaves(expr: Expr) -> Iterator[Load | Const | Iota]:
    """All leaves of an expression, those of computed indices included."""
    if isinstance(expr, Operation):
        for operand in expr.operands:
            yield from leaves(operand)
    else:
        yield expr
        if isinstance(expr, Load):
            for index in expr.dynamic:
                yield from leaves(index.value)


def viewed(expr: Expr, view: Callable[[StridedLayout], StridedLayout]) -> Expr:
    """The expression seen through a view, a function on layouts.

    Raises:
        NotViewableError: the view raised it for a leaf.
    """
    if isinstance(expr, Operation):
        operands = tuple(viewed(operand, view) for operand in expr.operands)
        return replace(expr, operands=operands, shape=view(_flat(expr.shape)).shape)
    if isinstance(expr, Const):
        return replace(expr, shape=view(_flat(expr.shape)).shape)
    layout = view(expr.layout)
    if isinstance(expr, Load):
        dynamic = tuple(replace(index, value=viewed(index.value, view)) for index in expr.dynamic)
        return replace(expr, layout=layout, dynamic=dynamic)
    return replace(expr, layout=layout)


def _flat(shape: Shape) -> StridedLayout:
    """A layout that any view can be applied to, for what has a shape but no strides."""
    return StridedLayout(shape, (0,) * len(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
