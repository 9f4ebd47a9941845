"""Loops inside a step, lowered: statements that run programs of their own, many times or by choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import fx

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.loops.cond_loop import Cond
from popart_func.engines.loops.scan_loop import ScanLoop
from popart_func.engines.loops.while_loop import WhileLoop
from popart_func.engines.native.expressions import Buffer, Const, Expr, Iota, Load
from popart_func.engines.native.kernel import Kernel, is_cheap
from popart_func.engines.native.layouts import contiguous
from popart_func.engines.native.statements import Nested, NestedResult, Program, Window, needed, reads, writes
from popart_func.engines.tracing.loop_nodes import Body, LoopTarget

__all__ = ["lower_loop"]

LowerGraph = Callable[[Kernel, fx.Graph, Sequence[Expr]], list[Expr]]


def lower_loop(kernel: Kernel, loop: LoopTarget, operands: Sequence[Expr], lower_graph: LowerGraph) -> list[Expr]:
    """Lowers a loop: adds its statement to a kernel, and returns its results.

    Args:
        kernel: of the program that has the loop.
        loop: what the node calls.
        operands: its arguments.
        lower_graph: lowers the graph of a body.
    """
    lowering = _Lowering(kernel, lower_graph)
    if isinstance(loop, ScanLoop):
        return lowering.scan(loop, operands)
    if isinstance(loop, WhileLoop):
        return lowering.while_loop(loop, operands)
    if isinstance(loop, Cond):
        return lowering.cond(loop, operands)
    raise UnsupportedError(f"native: no loop {loop.name!r}.")


class _Lowering:
    """Lowers one loop of a program."""

    def __init__(self, kernel: Kernel, lower_graph: LowerGraph) -> None:
        self._kernel, self._lower_graph = kernel, lower_graph

    def scan(self, loop: ScanLoop, operands: Sequence[Expr]) -> list[Expr]:
        """A scan: each round changes the carry, which has buffers of its own; xs and ys stay where they lie."""
        carry = [self._kernel.copied(value) for value in operands[: loop.carries]]
        sources = [self._whole(value) for value in operands[loop.carries : loop.carries + loop.xs]]
        closed = [self._readable(value) for value in operands[loop.carries + loop.xs :]]
        child = self._kernel.child()
        xs = [
            self._window(child, spec.shape, source.buffer)
            for spec, source in zip(loop.body.inputs[loop.carries :], sources, strict=False)
        ]
        results = self._lower_graph(child, loop.body.graph, [*carry, *xs, *closed])
        inputs = [load.buffer for load in (*carry, *xs)]
        new: list[Buffer | None] = []
        for old, value in zip(carry, results[: loop.carries], strict=True):
            new.append(None if _is(value, old) else _own(child, value, [*inputs, *new]))
        ys: list[Buffer] = []
        for value in results[loop.carries :]:
            ys.append(_own(child, value, [*inputs, *new, *ys]))
        stacked = [self._kernel.buffer(spec.shape, spec.dtype) for spec in loop.outputs[loop.carries :]]
        windows = [Window(x.buffer, source.buffer, False) for x, source in zip(xs, sources, strict=True)]
        windows += [Window(y, whole.buffer, True) for y, whole in zip(ys, stacked, strict=True)]
        part = _program(child, inputs, len(xs), new, ys)
        count = f"{loop.length} rounds{', in reverse' * loop.reverse}"
        self._finish(
            Nested("scan", count, self._token(), (part,), tuple(windows), (), loop.length, loop.reverse), carry, stacked
        )
        return [*carry, *stacked]

    def while_loop(self, loop: WhileLoop, operands: Sequence[Expr]) -> list[Expr]:
        """A while loop, which ends with the last lane of a block; a lane that is done keeps its carry."""
        carry = [self._kernel.copied(value) for value in operands[: loop.carries]]
        closed = [self._readable(value) for value in operands[loop.carries :]]
        inputs = [load.buffer for load in carry]
        test, step = self._kernel.child(), self._kernel.child()
        (going,) = self._lower_graph(test, loop.condition.graph, [*carry, *closed])
        condition = _program(test, inputs, len(inputs), [], [_own(test, going, inputs)])
        results = self._lower_graph(step, loop.body.graph, [*carry, *closed])
        ys: list[Buffer] = []
        for value in results:
            ys.append(_own(step, value, [*inputs, *ys]))
        body = _program(step, inputs, len(inputs), [], ys)
        self._finish(Nested("while", "", self._token(), (condition, body), (), tuple(carry)), carry, [])
        return list(carry)

    def cond(self, loop: Cond, operands: Sequence[Expr]) -> list[Expr]:
        """A choice: a branch runs if a lane of the block takes it, and each lane keeps the results of its branch."""
        predicate = self._kernel.stored(operands[0])
        given = [self._readable(value) for value in operands[1:]]
        results = [self._kernel.buffer(spec.shape, spec.dtype) for spec in loop.outputs]
        parts = tuple(self._branch(body, given) for body in (loop.true, loop.false))
        self._finish(Nested("if", str(predicate), self._token(), parts, (), (predicate, *results)), [], results)
        return list(results)

    def _branch(self, body: Body, given: Sequence[Expr]) -> Program:
        child = self._kernel.child()
        ys: list[Buffer] = []
        outside = {leaf.buffer for leaf in given if isinstance(leaf, Load)}
        for value in self._lower_graph(child, body.graph, given):
            ys.append(_own(child, value, [*outside, *ys]))
        return _program(child, [], 0, [], ys)

    def _finish(self, statement: Nested, changed: Sequence[Load], filled: Sequence[Load]) -> None:
        """Adds the statement of a loop, and one for each result, which waits for it."""
        self._kernel.statements.append(statement)
        for loads, overwrites in ((changed, True), (filled, False)):
            for load in loads:
                if load.buffer.numel:
                    self._kernel.statements.append(NestedResult(load, statement.target, overwrites))

    def _token(self) -> Load:
        """The buffer that stands for the loop in the order of statements."""
        return self._kernel.buffer((), torch.bool)

    def _window(self, child: Kernel, shape: tuple[int, ...], source: Buffer) -> Load:
        """One round's part of a stack."""
        name = child.buffer(shape, source.dtype).buffer.name
        return Load(Buffer(f"w{name[1:]}", source.dtype, math.prod(shape), source.uniform), contiguous(shape))

    def _whole(self, value: Expr) -> Load:
        return value if isinstance(value, Load) and value.is_whole else self._kernel.copied(value)

    def _readable(self, value: Expr) -> Expr:
        """A value that each round can read without computing it again."""
        return value if isinstance(value, Load | Const | Iota) or is_cheap(value) else self._kernel.stored(value)


def _is(value: Expr, old: Load) -> bool:
    return isinstance(value, Load) and value.buffer is old.buffer and value.is_whole


def _own(child: Kernel, value: Expr, taken: Sequence[Buffer | None]) -> Buffer:
    """A buffer that the body fills with exactly this value, and that no other result has."""
    filled = {writes(statement) for statement in child.statements}
    own = isinstance(value, Load) and value.is_whole and value.buffer not in taken and value.buffer in filled
    return value.buffer if own else child.copied(value).buffer  # type: ignore[union-attr]


def _program(
    child: Kernel, inputs: Sequence[Buffer], moving: int, carry: Sequence[Buffer | None], ys: Sequence[Buffer]
) -> Program:
    """The program of a body; what it reads of the program around it is among its inputs."""
    statements = needed(child.statements, {*carry, *ys})
    filled = {writes(statement) for statement in statements}
    read = dict.fromkeys(load.buffer for statement in statements for load in reads(statement))
    outside = [buffer for buffer in read if buffer not in filled and buffer not in inputs]
    return Program((*inputs, *outside), moving, statements, tuple(carry), tuple(ys))
