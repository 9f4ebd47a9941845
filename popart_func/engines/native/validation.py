"""Checks of the representation between lowering, scheduling and emission, for the engine's own tests.

They are off unless the tests turn them on, since they take as long as lowering. What they find is a bug of the engine,
or of a lowering that was registered.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from popart_func.engines.native.c_code import C_TYPES
from popart_func.engines.native.expressions import Buffer, Const, Expr, Load, Operation
from popart_func.engines.native.layouts import bounds
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import (
    ArgReduce,
    MatMul,
    Nested,
    NestedResult,
    Pointwise,
    Program,
    Reduce,
    Scatter,
    Statement,
    Window,
    reads,
    writes,
)

__all__ = ["ENABLED", "InvalidError", "check_expression", "check_plan", "check_program", "check_statement"]

ENABLED = False
"""Whether the engine checks what it makes: the tests turn it on."""


class InvalidError(AssertionError):
    """The representation breaks a rule; the message names the rule and shows the place."""


def _rule(holds: bool, rule: str, where: object) -> None:
    if not holds:
        raise InvalidError(f"native: {rule}: {where}")


def check_expression(expr: Expr) -> None:
    """Checks shapes, dtypes and bounds in an expression.

    Raises:
        InvalidError: a rule is broken.
    """
    _rule(expr.dtype in C_TYPES, f"dtypes have a type in C++, {expr.dtype} has none", expr)
    if isinstance(expr, Operation):
        _rule(all(part.shape == expr.shape for part in expr.operands), "operands have the operation's shape", expr)
        places = {int(place) for place in re.findall(r"\{(\d+)\}", expr.template)}
        _rule(max(places, default=-1) < len(expr.operands), "a template names operands that it has", expr.template)
        for part in expr.operands:
            check_expression(part)
    elif not isinstance(expr, Const):
        ranks = len(expr.layout.shape), len(expr.layout.strides)
        _rule(ranks[0] == ranks[1], "a layout has a stride for each axis", expr.layout)
    if isinstance(expr, Load):
        for index in expr.dynamic:
            check_expression(index.value)
            integer = not index.value.dtype.is_floating_point
            _rule(integer and index.value.shape == expr.shape, "an index has integers and the shape of its load", expr)
        if math.prod(expr.shape):
            lowest, highest = bounds(expr.layout)
            spans = [(index.size - 1) * index.stride for index in expr.dynamic]
            lowest, highest = lowest + sum(min(span, 0) for span in spans), highest + sum(max(s, 0) for s in spans)
            within = lowest >= 0 and highest < expr.buffer.numel
            _rule(within, f"a layout stays in its buffer, which has {expr.buffer.numel} elements", expr)


def check_statement(statement: Statement) -> None:
    """Checks that a statement's parts fit together.

    Raises:
        InvalidError: a rule is broken.
    """
    check_expression(statement.target)
    target = statement.target
    if isinstance(statement, Nested):
        for part in statement.parts:
            check_program(part)
        return
    if isinstance(statement, NestedResult):
        _rule(target.is_whole and not target.buffer.uniform, "a loop gives whole buffers", statement)
        return
    if isinstance(statement, MatMul):
        check_expression(statement.left)
        check_expression(statement.right)
        (batch, rows, inner), right = statement.left.shape, statement.right.shape
        shapes = right == (batch, inner, right[-1]) and target.shape == (batch, rows, right[-1])
        same = statement.left.dtype == statement.right.dtype == target.dtype
        plain = not statement.left.dynamic and not statement.right.dynamic
        _rule(shapes and same and plain, "matrices of a product fit, have one dtype and no computed index", statement)
        return
    check_expression(statement.value)
    shape = statement.value.shape
    if isinstance(statement, Reduce | ArgReduce):
        _rule(bool(shape), "a reduction has an axis to reduce", target)
        _rule(isinstance(statement, Reduce) or shape[-1] > 0, "a best element is one of at least one", statement)
        shape = shape[:-1]
    _rule(target.shape == shape, "the target of a statement has the shape of its value", statement)
    if not isinstance(statement, ArgReduce):
        _rule(target.dtype == statement.value.dtype, "the target of a statement has the dtype of its value", statement)
    if isinstance(statement, Pointwise):
        _rule(1 not in shape, "a pointwise statement has no axes of length 1", statement)
    if not isinstance(statement, Scatter):
        _rule(not target.dynamic, "only a scatter writes to computed places", statement)


def _changes(statement: Statement) -> bool:
    """Whether a statement changes a buffer that others have filled."""
    return isinstance(statement, Scatter) or (isinstance(statement, Pointwise | NestedResult) and statement.overwrites)


def check_program(program: Program) -> None:
    """Checks each statement, and that each buffer is filled once, wholly, and before it is read.

    Raises:
        InvalidError: a rule is broken.
    """
    inputs = set(program.inputs)
    filled = {buffer: buffer.numel for buffer in program.inputs}  # elements that have been written

    def is_full(buffer: Buffer) -> bool:
        return filled.get(buffer, 0) == buffer.numel

    for statement in program.statements:
        check_statement(statement)
        for load in reads(statement):
            full = is_full(load.buffer) or 0 in load.shape
            _rule(full, f"a buffer is written before it is read, {load.buffer.name} is not", statement)
        buffer = writes(statement)
        _rule(buffer not in inputs, "no statement writes to an input", statement)
        if _changes(statement):
            _rule(is_full(buffer), f"a buffer is filled before it is changed, {buffer.name} is not", statement)
        else:
            filled[buffer] = filled.get(buffer, 0) + math.prod(statement.target.shape)
            _rule(filled[buffer] <= buffer.numel, f"a buffer is filled once, {buffer.name} is not", statement)
    outputs = [buffer for buffer in (*program.carry, *program.ys) if buffer is not None]
    for buffer in outputs:
        _rule(is_full(buffer), f"an output is written, {buffer.name} is not", buffer)
    new = [buffer for buffer in program.carry if buffer is not None]
    _rule(len(set(new)) == len(new) and inputs.isdisjoint(new), "each new carry has a buffer of its own", new)


def check_plan(plan: KernelPlan, windows: Sequence[Window] = ()) -> None:
    """Checks that the schedule keeps the program's meaning, and that buffers share memory only where they may.

    ``windows``: the xs and ys of a scan whose body it is.

    Raises:
        InvalidError: a rule is broken.
    """
    nests = [*plan.once, *plan.always]
    scheduled = [statement for nest in nests for statement in nest.statements]
    ids = sorted(map(id, plan.program.statements))
    _rule(sorted(map(id, scheduled)) == ids, "each statement is scheduled once", plan)
    for nest in nests:
        alone = nest.shape is None and len(nest.statements) == 1
        merged = all(isinstance(part, Pointwise) and part.target.shape == nest.shape for part in nest.statements)
        _rule(alone or merged, "a loop nest has one statement, or pointwise ones of its shape", nest)
    early = [load for nest in plan.once for part in nest.statements for load in reads(part)]
    moving = set(plan.program.moving)
    _rule(all(load.buffer not in moving for load in early), "what runs before the time loop is constant", plan)
    _check_order(nests)
    for nest in nests:
        computed = {writes(part) for part in nest.statements}
        for load in (load for part in nest.statements for load in reads(part) if load.buffer in plan.local):
            _rule(load.buffer in computed, f"only its own loop reads {load.buffer.name}, which has no memory", nest)
    memory = {
        *(window.part for window in windows),
        *plan.buffers,
        *plan.merged,
        *(part for part in plan.program.inputs if part.uniform),
    }
    outputs = {part for part in (*plan.program.carry, *plan.program.ys) if part is not None and part.numel}
    touched = {writes(part) for part in scheduled} | {load.buffer for part in scheduled for load in reads(part)}
    missing = (touched - plan.local - memory) | (outputs - memory)
    _rule(not missing, "each buffer has memory, or needs none", sorted(part.name for part in missing))
    _check_merged(plan)
    for loop, parts in plan.nested.items():
        for part in parts:
            check_plan(part, loop.windows)


def _check_order(nests: Sequence[LoopNest]) -> None:
    """Each loop nest comes after all writes to what it reads, save for what it computes at the same index itself.

    A nest that changes a buffer comes after those that fill it.
    """
    fills = Counter(writes(part) for nest in nests for part in nest.statements if not _changes(part))
    left = Counter(writes(part) for nest in nests for part in nest.statements)  # writes that are to come
    for nest in nests:
        here = {writes(statement) for statement in nest.statements}
        done: set[Buffer] = set()
        for statement in nest.statements:
            for load in reads(statement):
                own = load.is_whole and load.shape == nest.shape and load.buffer in done
                known = own if load.buffer in here else not left[load.buffer]
                if isinstance(statement, Nested) and load.buffer in statement.changed:  # it begins with what is there
                    known = not fills[load.buffer]
                _rule(known, f"a loop nest reads what has been written, {load.buffer.name} has not been", nest)
            target = writes(statement)
            ready = not _changes(statement) or not fills[target]
            _rule(ready, f"a loop nest changes what has been filled, {target.name} has not been", nest)
            done.add(target)
        left.subtract(writes(statement) for statement in nest.statements)
        fills.subtract(writes(statement) for statement in nest.statements if not _changes(statement))


def _check_merged(plan: KernelPlan) -> None:
    """Nothing reads the old carry after the new one has been written over it."""
    pairs = {new: old for old, new in zip(plan.program.inputs, plan.program.carry, strict=False) if new is not None}
    for new, old in plan.merged.items():
        _rule(pairs.get(new) is old, "only the new carry is written over the old", f"{new} over {old}")
        written = False
        for nest in plan.always:
            first = not written and any(
                writes(part) is new or (isinstance(part, Nested) and new in part.stacks) for part in nest.statements
            )
            for load in (load for part in nest.statements for load in reads(part) if load.buffer is old):
                same = first and load.is_whole and load.shape == nest.shape
                legal = same or not (first or written)
                _rule(legal, f"{old.name} is not read after {new.name} has been written over it", nest)
            if first:
                whole = all(part.target.is_whole for part in nest.statements if writes(part) is new)
                _rule(whole, f"{new.name} is written whole over {old.name}", nest)
            written = written or first
