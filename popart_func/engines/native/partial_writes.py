"""Partial writes: a step that writes a part of a carry writes it in place, at a cost that does not grow with the carry.

A replay buffer is such a carry: a step reads some of its elements and writes one. In a lowered step the new buffer is a
copy of the old one, into which statements write. Reads of the old buffer may come later. Here these reads are stored
first, in small buffers of their own, once for all that use them. Then nothing reads the old buffer after the copy, and
`in_place` removes the copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from popart_func.engines.native.expressions import Buffer, Expr, Load, Operation
from popart_func.engines.native.kernel import Kernel
from popart_func.engines.native.layouts import contiguous
from popart_func.engines.native.statements import (
    MatMul,
    Nested,
    NestedResult,
    Pointwise,
    Program,
    Statement,
    reads,
    writes,
)

__all__ = ["read_before_writing"]


def read_before_writing(program: Program) -> Program:
    """The program with the reads of each carry that is written in part before the writes."""
    for old, new in zip(program.inputs, program.carry, strict=False):
        if new is not None:
            statements = _read_first(program.statements, old, new)
            if statements is not None:
                program = program._replace(statements=statements)
    return program


def _read_first(statements: Sequence[Statement], old: Buffer, new: Buffer) -> tuple[Statement, ...] | None:
    """The statements with the reads of an old carry first; None where that is impossible or does not pay."""
    writers = [statement for statement in statements if writes(statement) is new]
    if not writers or not _copies(writers[0], old):
        return None
    if any(isinstance(part, Nested | NestedResult) for part in statements):
        return None  # the bodies of loops read buffers, too
    late = [part for part in statements if part is not writers[0] and any(load.buffer is old for load in reads(part))]
    loads = {_key(load): load for part in late for load in reads(part) if load.buffer is old}
    # A read of the whole buffer costs as much as the copy.
    if not loads or sum(math.prod(load.shape) for load in loads.values()) >= old.numel:
        return None
    first: list[Statement] = []
    kept: dict[Hashable, Load] = {}
    for part in late:
        whole = isinstance(part, Pointwise) and part.target.is_whole and not part.overwrites
        value = part.value if isinstance(part, Pointwise) else None
        if whole and isinstance(value, Load) and value.buffer is old and _key(value) not in kept:
            kept[_key(value)] = part.target  # it stores what is read already
            first.append(part)
    moved = set(map(id, first))
    for number, (key, load) in enumerate(loads.items()):
        if key not in kept:
            kernel = Kernel()
            kept[key] = Load(Buffer(f"{old.name}_{number}", load.dtype, math.prod(load.shape)), contiguous(load.shape))
            kernel.store(kept[key], load)
            first.extend(kernel.statements)
    others = [
        part if part is writers[0] else _with_loads(part, old, kept) for part in statements if id(part) not in moved
    ]
    needed = _producers([*others, *first], first)
    if any(writes(part) is new for part in needed):
        return None  # what is read from the old buffer depends on what the new one holds
    chosen = set(map(id, needed))
    return (*_in_order(needed), *(part for part in others if id(part) not in chosen))


def _copies(statement: Statement, old: Buffer) -> bool:
    """Whether a statement copies a whole buffer."""
    return (
        isinstance(statement, Pointwise)
        and statement.target.is_whole
        and isinstance(statement.value, Load)
        and statement.value.is_whole
        and statement.value.buffer is old
    )


def _key(load: Load) -> Hashable:
    """What loads of the same elements of a buffer have in common."""
    return load.layout, tuple(
        (_index_key(index.value), index.stride, index.size, index.wraps) for index in load.dynamic
    )


def _index_key(value: Expr) -> Hashable:
    return (value.buffer, value.layout) if isinstance(value, Load) and not value.dynamic else id(value)


def _producers(statements: Sequence[Statement], readers: Sequence[Statement]) -> list[Statement]:
    """The readers and all statements on which they depend."""
    wanted = {writes(statement) for statement in readers}
    while True:
        found = [statement for statement in statements if writes(statement) in wanted]
        more = {load.buffer for statement in found for load in reads(statement)} | wanted
        if more == wanted:
            return found
        wanted = more


def _in_order(statements: Sequence[Statement]) -> list[Statement]:
    """The statements in an order in which they may run: what fills a buffer before what reads it."""
    left, ordered = list(statements), []
    while left:
        to_come = Counter(map(writes, left))
        ready, waiting = [], []
        begun: set[Buffer] = set()  # buffers of which an earlier writer waits
        for statement in left:
            target = writes(statement)
            if target in begun or any(to_come[load.buffer] for load in reads(statement)):
                waiting.append(statement)
                begun.add(target)
            else:
                ready.append(statement)
                to_come[target] -= 1
        assert ready, "statements depend on each other in a circle"
        ordered += ready
        left = waiting
    return ordered


def _with_loads(statement: Statement, old: Buffer, kept: dict[Hashable, Load]) -> Statement:
    """The statement with what it reads of a buffer read from where that is stored."""
    if all(load.buffer is not old for load in reads(statement)):
        return statement
    done: dict[int, Expr] = {}  # one operation that several need stays one

    def replaced(expr: Expr) -> Expr:
        if id(expr) not in done:
            done[id(expr)] = rebuilt(expr)
        return done[id(expr)]

    def rebuilt(expr: Expr) -> Expr:
        if isinstance(expr, Operation):
            return replace(expr, operands=tuple(map(replaced, expr.operands)))
        if not isinstance(expr, Load):
            return expr
        return read(expr)

    def read(load: Load) -> Load:
        return kept[_key(load)] if load.buffer is old else indexed(load)

    def indexed(load: Load) -> Load:
        return replace(load, dynamic=tuple(replace(index, value=replaced(index.value)) for index in load.dynamic))

    if isinstance(statement, Nested | NestedResult):
        return statement  # `_read_first` leaves programs with loops alone
    if isinstance(statement, MatMul):
        return replace(statement, left=read(statement.left), right=read(statement.right))
    return replace(statement, target=indexed(statement.target), value=replaced(statement.value))
