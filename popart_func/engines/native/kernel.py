"""The kernel under construction: the methods in which ops are lowered to expressions and statements.

An expression is stored in a buffer only where that pays or where a view needs it; everything else is computed in the
loop that reads it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from popart_func.engines.native.expressions import (
    Buffer,
    Const,
    Expr,
    Iota,
    Load,
    Operation,
    broadcast_shape,
    leaves,
    viewed,
)
from popart_func.engines.native.layouts import (
    NotViewableError,
    Shape,
    StridedLayout,
    contiguous,
    expand_layout,
    permute_layout,
    reshape_layout,
    slice_layout,
)
from popart_func.engines.native.statements import ArgReduce, Cumulate, MatMul, Pointwise, Reduce, Scatter, Statement

__all__ = ["MAX_DEPTH", "Kernel", "Lowering", "is_cheap"]

MAX_DEPTH = 48
"""How many operations may stand on each other before the expression is stored: deeper ones compile slowly."""

SHALLOW = 8
"""How many operations may stand on each other within a reduction.

More are stored first, in a loop of their own. GCC can't vectorize a reduction over all that mixes floating-point
numbers of two widths with a bool from memory: a sum of normal draws took twice as long.
"""

CHEAP = 3
"""How many operations on numbers alone may be computed again at each use, rather than stored."""

Lowering = Callable[..., Any]
"""How an op is lowered: ``lowering(kernel, out, *arguments) -> expression``; see `register_op`."""


class Kernel:
    """Collects the statements of a step while its ops are lowered."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self._numbers = itertools.count(1)

    def child(self) -> Kernel:
        """A kernel for the body of a loop in this one; their buffers have different names."""
        child = Kernel()
        child._numbers = self._numbers
        return child

    def buffer(self, shape: Shape, dtype: torch.dtype) -> Load:
        """A new buffer, not yet filled."""
        return Load(Buffer(f"t{next(self._numbers)}", dtype, math.prod(shape)), contiguous(shape))

    def operand(self, value: Expr | int | float, dtype: torch.dtype) -> Expr:
        """An op's argument, a tensor's expression or a number, as an expression of a dtype."""
        if isinstance(value, int | float):
            wide = torch.float64 if isinstance(value, float) else torch.int64
            return self.cast(Const(value, wide), dtype)
        return self.cast(value, dtype)

    def pointwise(self, template: str, dtype: torch.dtype, *operands: Expr) -> Expr:
        """A C++ expression of operands, which are broadcast against each other.

        Args:
            template: C++, with ``{0}``, ``{1}``, ... for the operands; it may call the functions of `arithmetic.hpp`.
                Operands have their own dtypes.
            dtype: of the result, to which the C++ expression is cast.
            operands: expressions.
        """
        shape = broadcast_shape([operand.shape for operand in operands])
        operands = tuple(self.expand(operand, shape) for operand in operands)
        depth = 1 + max(operand.depth if isinstance(operand, Operation) else 0 for operand in operands)
        return Operation(template, operands, dtype, shape, depth)

    def cast(self, expr: Expr, dtype: torch.dtype) -> Expr:
        """The expression in another dtype."""
        if expr.dtype == dtype:
            return expr
        if isinstance(expr, Const):
            value = torch.tensor(expr.value, dtype=expr.dtype, device="cpu").to(dtype).item()
            return Const(value, dtype, expr.shape)
        return self.pointwise("{0} != 0" if dtype == torch.bool else "{0}", dtype, expr)

    # Storing.

    def store(self, target: Expr, value: Expr, *, overwrites: bool = False) -> None:
        """Fills a buffer, or a part of it.

        Args:
            target: from `buffer` or `copied`, perhaps through views.
            value: an expression of the target's shape and dtype.
            overwrites: whether the buffer has been filled already, and this changes it.
        """
        if math.prod(target.shape):
            shape = tuple(size for size in target.shape if size != 1)
            target, value = self.reshape(target, shape), self.reshape(value, shape)
            self.statements.append(Pointwise(_place(target), value, overwrites))

    def stored(self, expr: Expr) -> Load:
        """The expression in a buffer: the one that it reads, where it only reads one; else a new one."""
        return expr if isinstance(expr, Load) and not expr.dynamic else self.copied(expr)

    def whole(self, expr: Expr) -> Load:
        """The expression in a buffer that it fills in order, and that holds nothing else."""
        return expr if isinstance(expr, Load) and expr.is_whole else self.copied(expr)

    def copied(self, expr: Expr) -> Load:
        """The expression in a new buffer, which may be changed."""
        target = self.buffer(expr.shape, expr.dtype)
        self.store(target, expr)
        return target

    def shallow(self, expr: Expr) -> Expr:
        """The expression, stored if more than `SHALLOW` operations stand on each other."""
        return self.stored(expr) if isinstance(expr, Operation) and expr.depth > SHALLOW else expr

    # Views.

    def view(self, expr: Expr, view: Callable[[StridedLayout], StridedLayout]) -> Expr:
        """The expression through a view, a function on layouts; it is stored first where strides can't express that."""
        try:
            return viewed(expr, view)
        except NotViewableError:
            return viewed(self.copied(expr), view)

    def expand(self, expr: Expr, shape: Shape) -> Expr:
        """Broadcasts to a shape. An operation is stored first: it would be computed again for each copy."""
        if expr.shape == shape:
            return expr
        if isinstance(expr, Operation) and not is_cheap(expr) and math.prod(shape) > math.prod(expr.shape):
            expr = self.stored(expr)
        return viewed(expr, lambda layout: expand_layout(layout, shape))

    def reshape(self, expr: Expr, shape: Shape) -> Expr:
        """The expression in another shape of as many elements."""
        return expr if expr.shape == shape else self.view(expr, lambda layout: reshape_layout(layout, shape))

    def permute(self, expr: Expr, axes: Sequence[int]) -> Expr:
        """The axes in another order."""
        return self.view(expr, functools.partial(permute_layout, axes=axes))

    def last(self, expr: Expr, axes: Sequence[int]) -> Expr:
        """The expression with some axes moved to the end and joined into one."""
        kept = [axis for axis in range(len(expr.shape)) if axis not in axes]
        moved = self.permute(expr, [*kept, *axes])
        size = math.prod(expr.shape[axis] for axis in axes)
        return self.reshape(moved, (*(expr.shape[axis] for axis in kept), size))

    def slice(self, expr: Expr, axis: int, start: int, length: int, step: int = 1) -> Expr:
        """Every ``step``-th element of an axis, ``length`` of them, from ``start`` on."""
        return self.view(expr, functools.partial(slice_layout, axis=axis, start=start, length=length, step=step))

    def select(self, expr: Expr, axis: int, index: int) -> Expr:
        """One element of an axis; the axis is dropped."""
        part = self.slice(expr, axis, index, 1)
        return self.reshape(part, part.shape[:axis] + part.shape[axis + 1 :])

    # Statements with a loop of their own.

    def reduce(self, expr: Expr, axes: Sequence[int], start: str, combine: str) -> Expr:
        """Combines the elements along axes, in order; the axes are dropped. A single element is its own reduction.

        Args:
            expr: what is reduced.
            axes: not negative.
            start: C++ for the value to start from; ``LOWEST`` and ``GREATEST`` stand for the dtype's bounds.
            combine: C++ in ``{0}``, what has been combined so far, and ``{1}``, the next element.
        """
        kept = tuple(size for axis, size in enumerate(expr.shape) if axis not in axes)
        if 0 in expr.shape:  # a buffer of no elements is never written, and so it is never declared
            expr = Const(0, expr.dtype, expr.shape)
        expr = self.last(self.shallow(expr), axes)
        if expr.shape[-1] == 1:
            return self.reshape(expr, kept)
        target = self.buffer(kept, expr.dtype)
        if math.prod(kept):
            self.statements.append(Reduce(target, expr, start, combine))
        return target

    def arg_reduce(self, expr: Expr, axis: int, better: str) -> Load:
        """The position of the first best element along an axis; the axis is dropped.

        ``better``: C++ that is true where ``{0}``, the next element, is better than ``{1}``, the best so far.
        """
        value = self.last(self.shallow(expr), [axis])
        target = self.buffer(value.shape[:-1], torch.int64)
        if math.prod(target.shape):
            self.statements.append(ArgReduce(target, value, better))
        return target

    def cumulate(self, expr: Expr, axis: int, combine: str) -> Expr:
        """Combines the elements along an axis and keeps each intermediate result; ``combine`` as in `reduce`."""
        order = [*(other for other in range(len(expr.shape)) if other != axis), axis]
        value = self.permute(self.shallow(expr), order)
        target = self.buffer(value.shape, expr.dtype)
        if math.prod(target.shape):
            self.statements.append(Cumulate(target, value, combine))
        return self.permute(target, [order.index(position) for position in range(len(order))])

    def scatter(self, target: Expr, value: Expr, combine: str) -> None:
        """Writes to computed places of a buffer that has been filled already.

        ``combine``: C++ in ``{0}``, what lies at the place, and ``{1}``, the value.
        """
        if math.prod(value.shape):
            self.statements.append(Scatter(_place(target), value, combine))

    def matmul(self, left: Expr, right: Expr) -> Expr:
        """``[b, m, k] @ [b, k, n]``; with ``k = 1`` it is pointwise."""
        batch, rows, inner = left.shape
        columns = right.shape[2]
        if inner == 1:
            return self.pointwise("{0} * {1}", left.dtype, left, right)
        target = self.buffer((batch, rows, columns), left.dtype)
        if inner == 0:
            self.store(target, Const(0, left.dtype, target.shape))
        elif math.prod(target.shape):
            self.statements.append(MatMul(target, self.stored(left), self.stored(right)))
        return target


def is_cheap(expr: Expr) -> bool:
    """Whether an expression is as cheap to compute as to read: a number, or a few operations on numbers."""
    if isinstance(expr, Operation) and expr.depth > CHEAP:
        return False
    return not any(isinstance(leaf, Load) for leaf in leaves(expr)) and not any(
        isinstance(leaf, Iota) and math.prod(leaf.shape) > 1 for leaf in leaves(expr)
    )


def _place(target: Expr) -> Load:
    assert isinstance(target, Load), "a target is a buffer, seen through views that strides can express"
    return target
