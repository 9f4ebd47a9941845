"""A step graph as statements over buffers: ops become expressions, and an expression is stored only where it pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.native import ops
from popart_func.engines.native.expressions import (
    Buffer,
    Const,
    Expr,
    Iota,
    Layout,
    Load,
    NotViewableError,
    Op,
    Shape,
    broadcast_shape,
    contiguous_strides,
    leaves,
    reshape_layout,
    viewed,
)
from popart_func.engines.native.statements import (
    ArgReduce,
    MatMul,
    Pointwise,
    Reduce,
    Scan,
    Scatter,
    Statement,
    reads,
    writes,
)
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec, describe, op_name
from popart_func.engines.tracing.walk import bind_arguments

__all__ = ["Kernel", "Program", "UnsupportedError", "lower"]

MAX_DEPTH = 48
"""How many operations may stand on each other before the expression is stored."""

SHALLOW = 8
"""How many of them may be computed within a reduction: more are stored first, in the loop that computes their operands.

GCC can't vectorize all that mixes floating-point numbers of two widths with a bool from memory: a sum of normal draws
took twice as long.
"""


class Program(NamedTuple):
    """A lowered step.

    Attributes:
        inputs: a buffer for each input and constant of the graph.
        statements: in order.
        carry: what each leaf of the carry becomes; None where it stays as it is.
        ys: the other outputs.
    """

    inputs: tuple[Buffer, ...]
    statements: tuple[Statement, ...]
    carry: tuple[Buffer | None, ...]
    ys: tuple[Buffer, ...]


def lower(graph: StepGraph, carries: int, uniform: Sequence[bool]) -> Program:
    """Lowers a step graph.

    Args:
        graph: of a step.
        carries: how many of its inputs, and of its outputs, are the carry; they come first.
        uniform: for each input and constant whether all lanes share it.

    Raises:
        UnsupportedError: an op, dtype or shape that the engine lacks.
    """
    kernel = Kernel()
    values: dict[fx.Node, Any] = {}
    inputs: list[Buffer] = []
    nodes = graph.graph.nodes
    for node in nodes:
        if node.op == "placeholder":
            spec = TensorSpec.of(node.meta["val"])
            _check_dtype(node, spec.dtype)
            buffer = Buffer(f"in{len(inputs)}", spec.dtype, math.prod(spec.shape), uniform[len(inputs)])
            inputs.append(buffer)
            values[node] = Load(buffer, Layout(spec.shape, contiguous_strides(spec.shape)))
        elif node.op == "call_function":
            value = _lower_node(kernel, node, values)
            if isinstance(value, Op) and (_fanout(node) != 1 or value.depth >= MAX_DEPTH) and not _is_constant(value):
                value = kernel.stored(value)
            values[node] = value
    (output,) = (node for node in nodes if node.op == "output")
    outputs = [values[node] for node in output.args[0]]
    carry: list[Buffer | None] = []
    for value, buffer in zip(outputs[:carries], inputs, strict=False):
        stays = isinstance(value, Load) and value.buffer is buffer and value.is_whole
        carry.append(None if stays else _output(kernel, value, taken=[*inputs, *carry]))
    ys = tuple(_output(kernel, value, taken=inputs) for value in outputs[carries:])
    return Program(tuple(inputs), _needed(kernel.statements, {*carry, *ys}), tuple(carry), ys)


def _needed(statements: Sequence[Statement], outputs: set[Buffer | None]) -> tuple[Statement, ...]:
    """The statements whose values are read: of a loss, say, its gradient wants the shape only."""
    read, needed = set(outputs), []
    for statement in reversed(statements):
        if writes(statement) in read:
            needed.append(statement)
            read |= {load.buffer for load in reads(statement)}
    return tuple(reversed(needed))


def _output(kernel: Kernel, value: Expr, taken: Sequence[Buffer | None]) -> Buffer:
    """A buffer that holds just this value, and is none of those that are taken."""
    own = isinstance(value, Load) and value.is_whole and value.buffer not in taken
    return value.buffer if own else kernel.copied(value).buffer  # type: ignore[union-attr]


class Kernel:
    """Collects statements; its methods are what `ops` is written in."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []
        self._buffers = 0

    def buffer(self, shape: Shape, dtype: torch.dtype) -> Load:
        """A new buffer, not yet filled."""
        self._buffers += 1
        return Load(Buffer(f"t{self._buffers}", dtype, math.prod(shape)), Layout(shape, contiguous_strides(shape)))

    def store(self, target: Load, value: Expr, *, overwrites: bool = False) -> None:
        """Fills (a part of) a buffer."""
        if math.prod(target.shape):
            shape = tuple(size for size in target.shape if size != 1)
            target, value = self.reshape(target, shape), self.reshape(value, shape)  # type: ignore[assignment]
            self.statements.append(Pointwise(target, value, overwrites))

    def stored(self, expr: Expr) -> Load:
        """The expression as a plain buffer, stored if it isn't one."""
        if isinstance(expr, Load) and not expr.dynamic:
            return expr
        target = self.buffer(expr.shape, expr.dtype)
        self.store(target, expr)
        return target

    def copied(self, expr: Expr) -> Load:
        """The expression in a new buffer, which can be changed."""
        target = self.buffer(expr.shape, expr.dtype)
        self.store(target, expr)
        return target

    def shallow(self, expr: Expr) -> Expr:
        """The expression, stored if many operations stand on each other."""
        return self.stored(expr) if isinstance(expr, Op) and expr.depth > SHALLOW else expr

    def op(self, template: str, dtype: torch.dtype, *operands: Expr) -> Expr:
        """A pointwise operation on operands that are broadcast against each other."""
        shape = broadcast_shape([operand.shape for operand in operands])
        operands = tuple(self.expand(operand, shape) for operand in operands)
        depth = 1 + max(operand.depth if isinstance(operand, Op) else 0 for operand in operands)
        return Op(template, operands, dtype, shape, depth)

    def cast(self, expr: Expr, dtype: torch.dtype) -> Expr:
        """The expression in another dtype."""
        if expr.dtype == dtype:
            return expr
        if isinstance(expr, Const):
            value = torch.tensor(expr.value, dtype=expr.dtype, device="cpu").to(dtype).item()
            return Const(value, dtype, expr.shape)
        return self.op("{0} != 0" if dtype == torch.bool else "{0}", dtype, expr)

    def expand(self, expr: Expr, shape: Shape) -> Expr:
        """Broadcasts. What would be computed again for each copy is stored first."""
        if expr.shape == shape:
            return expr
        if isinstance(expr, Op) and not _is_constant(expr) and math.prod(shape) > math.prod(expr.shape):
            expr = self.stored(expr)

        def view(layout: Layout) -> Layout:
            new = len(shape) - len(layout.shape)
            strides = (0 if size == 1 else stride for size, stride in zip(layout.shape, layout.strides, strict=True))
            return Layout(shape, (*(0 for _ in range(new)), *strides), layout.offset)

        return viewed(expr, view)

    def view(self, expr: Expr, view: Callable[[Layout], Layout]) -> Expr:
        """The expression through a view; it is stored first where strides can't express that."""
        try:
            return viewed(expr, view)
        except NotViewableError:
            return viewed(self.copied(expr), view)

    def reshape(self, expr: Expr, shape: Shape) -> Expr:
        """The expression in another shape of as many elements."""
        return expr if expr.shape == shape else self.view(expr, lambda layout: reshape_layout(layout, shape))

    def permute(self, expr: Expr, axes: Sequence[int]) -> Expr:
        """The axes in another order."""

        def view(layout: Layout) -> Layout:
            shape, strides = (tuple(part[axis] for axis in axes) for part in layout[:2])
            return Layout(shape, strides, layout.offset)

        return self.view(expr, view)

    def last(self, expr: Expr, axes: Sequence[int]) -> Expr:
        """Some axes moved to the end and made one."""
        kept = [axis for axis in range(len(expr.shape)) if axis not in axes]
        moved = self.permute(expr, [*kept, *axes])
        size = math.prod(expr.shape[axis] for axis in axes)
        return self.reshape(moved, (*(expr.shape[axis] for axis in kept), size))

    def slice(self, expr: Expr, axis: int, start: int, length: int, step: int = 1) -> Expr:
        """Every ``step``-th element of an axis, from ``start``."""

        def view(layout: Layout) -> Layout:
            shape, strides, offset = list(layout.shape), list(layout.strides), layout.offset
            offset += start * strides[axis]
            shape[axis], strides[axis] = length, strides[axis] * step
            return Layout(tuple(shape), tuple(strides), offset)

        return self.view(expr, view)

    def select(self, expr: Expr, axis: int, index: int) -> Expr:
        """One element of an axis, which is gone."""
        part = self.slice(expr, axis, index, 1)
        return self.reshape(part, part.shape[:axis] + part.shape[axis + 1 :])

    def reduce(self, expr: Expr, axes: Sequence[int], start: str, combine: str) -> Expr:
        """Combines along axes, which are gone; of one element that is the element itself."""
        kept = tuple(size for axis, size in enumerate(expr.shape) if axis not in axes)
        if 0 in expr.shape:  # no one writes to a buffer of no elements, and so it is not declared
            expr = Const(0, expr.dtype, expr.shape)
        expr = self.last(self.shallow(expr), axes)
        if expr.shape[-1] == 1:
            return self.reshape(expr, kept)
        target = self.buffer(kept, expr.dtype)
        if math.prod(kept):
            self.statements.append(Reduce(target, expr, start, combine))
        return target

    def arg_reduce(self, expr: Expr, axis: int, better: str) -> Load:
        """The position of the first best element along an axis, which is gone."""
        value = self.last(self.shallow(expr), [axis])
        target = self.buffer(value.shape[:-1], torch.int64)
        if math.prod(target.shape):
            self.statements.append(ArgReduce(target, value, better))
        return target

    def scan(self, expr: Expr, axis: int, combine: str) -> Expr:
        """Combines along an axis, keeping what came out on the way."""
        order = [*(other for other in range(len(expr.shape)) if other != axis), axis]
        value = self.permute(self.shallow(expr), order)
        target = self.buffer(value.shape, expr.dtype)
        if math.prod(target.shape):
            self.statements.append(Scan(target, value, combine))
        return self.permute(target, [order.index(position) for position in range(len(order))])

    def scatter(self, target: Load, value: Expr, combine: str) -> None:
        """Writes to computed places of a buffer that is filled already."""
        if math.prod(value.shape):
            self.statements.append(Scatter(target, value, combine))

    def matmul(self, left: Expr, right: Expr) -> Expr:
        """``[b, m, k] @ [b, k, n]``; a product without a sum is pointwise."""
        batch, rows, inner = left.shape
        columns = right.shape[2]
        if inner == 1:
            return self.op("{0} * {1}", left.dtype, left, right)
        target = self.buffer((batch, rows, columns), left.dtype)
        if inner == 0:
            self.store(target, Const(0, left.dtype, target.shape))
        elif math.prod(target.shape):
            self.statements.append(MatMul(target, self.stored(left), self.stored(right)))
        return target


def _lower_node(kernel: Kernel, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    name = op_name(node)
    if name == "getitem":
        return values[node.args[0]][node.args[1]]  # type: ignore[index]
    outs = node.meta["val"]
    specs = [TensorSpec.of(out) for out in (outs if isinstance(outs, list | tuple) else [outs])]
    for spec in specs:
        _check_dtype(node, spec.dtype)
    if name not in ops.OPS:
        raise UnsupportedError(f"native: no op {name!r}, which gives {_shapes(specs)}; {describe(node)}.")
    try:
        return ops.OPS[name](kernel, specs[0] if len(specs) == 1 else specs, *bind_arguments(node, values).values())
    except ops.NotLoweredError as error:
        raise UnsupportedError(f"native: {name!r}, which gives {_shapes(specs)}: {error}; {describe(node)}.") from None


def _shapes(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}" for spec in specs)


def _check_dtype(node: fx.Node, dtype: torch.dtype) -> None:
    if dtype not in ops.C_TYPES:
        raise UnsupportedError(f"native: no dtype {dtype}; {describe(node)}.")


def _fanout(node: fx.Node) -> int:
    """How many times a value is read, views looked through."""
    return sum(_fanout(user) if ops.is_view(user) else 1 for user in node.users)


def _is_constant(expr: Expr) -> bool:
    """Whether it is as cheap to compute as to read: a number, or a few operations on numbers."""
    if isinstance(expr, Op) and expr.depth > 3:
        return False
    return not any(isinstance(leaf, Load) for leaf in leaves(expr)) and not any(
        isinstance(leaf, Iota) and math.prod(leaf.shape) > 1 for leaf in leaves(expr)
    )
