"""The checks between the native engine's stages: each rule, broken once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native import engine, validation
from popart_func.engines.native.expressions import Buffer, Const, DynamicIndex, Load, Operation
from popart_func.engines.native.layouts import StridedLayout, contiguous
from popart_func.engines.native.plan import KernelPlan, make_plan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import (
    ArgReduce,
    Cumulate,
    MatMul,
    Pointwise,
    Program,
    Reduce,
    Scatter,
    Statement,
    writes,
)
from popart_func.engines.native.validation import InvalidError, check_expression, check_plan, check_program

F32, F64, I64 = torch.float32, torch.float64, torch.int64
ADD = "{0} + {1}"


def load(name: str, *shape: int, dtype: torch.dtype = F32) -> Load:
    return Load(Buffer(name, dtype, math.prod(shape)), contiguous(shape))


def test_is_on_under_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validation.ENABLED
    seen = []
    monkeypatch.setattr(validation, "check_program", lambda program: seen.append(program))
    monkeypatch.setattr(validation, "check_plan", lambda plan: seen.append(plan.program))
    program = sound().program
    assert seen == [program, program]
    monkeypatch.setattr(validation, "ENABLED", False)
    sound()
    assert len(seen) == 2


# Expressions and statements.

X, Y, SQUARE = load("x", 4), load("y", 4), load("m", 4, 4)
LONG, WIDE = load("index", 4, dtype=I64), load("wide", 4, dtype=F64)
OUT = load("out", 4)


def at(index: Any, size: int, stride: int = 1, *, buffer: Buffer = X.buffer) -> Load:
    """``buffer[index]``."""
    return Load(buffer, StridedLayout((4,), (0,)), (DynamicIndex(index, stride, size),))


@pytest.mark.parametrize(
    ("expr", "rule"),
    [
        (Const(0, torch.bfloat16), "dtypes have a type in C++"),
        (Operation(ADD, (X, load("z", 3)), F32, (4,)), "operands have the operation's shape"),
        (Operation(ADD, (X,), F32, (4,)), "a template names operands that it has"),
        (Operation("-{0}", (Operation(ADD, (X,), F32, (4,)),), F32, (4,)), "a template names operands"),
        (Load(X.buffer, StridedLayout((4,), (1, 1))), "a layout has a stride for each axis"),
        (Load(X.buffer, StridedLayout((4,), (1,), 1)), "a layout stays in its buffer"),
        (Load(X.buffer, StridedLayout((4,), (-1,), 2)), "a layout stays in its buffer"),
        (Load(X.buffer, StridedLayout((3,), (2,))), "a layout stays in its buffer"),
        (at(LONG, 5), "a layout stays in its buffer"),
        (at(LONG, 3, -1), "a layout stays in its buffer"),
        (at(Y, 4), "an index has integers"),
        (at(load("short", 3, dtype=I64), 4), "an index has integers and the shape of its load"),
    ],
)
def test_expressions(expr: Any, rule: str) -> None:
    for sound_one in (X, at(LONG, 4), at(LONG, 2, 3), Operation(ADD, (X, Y), F32, (4,))):
        check_expression(sound_one)
    with pytest.raises(InvalidError) as caught:
        check_expression(expr)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "rule"),
    [
        (Pointwise(OUT, load("z", 3)), "the target of a statement has the shape of its value"),
        (Pointwise(OUT, WIDE), "the target of a statement has the dtype of its value"),
        (Pointwise(load("out", 4, 1), load("x", 4, 1)), "a pointwise statement has no axes of length 1"),
        (Pointwise(at(LONG, 4, buffer=OUT.buffer), X), "only a scatter writes to computed places"),
        (Pointwise(Load(OUT.buffer, StridedLayout((4,), (2,))), X), "a layout stays in its buffer"),
        (Reduce(load("out"), load("x"), "0", ADD), "a reduction has an axis to reduce"),
        (Reduce(OUT, X, "0", ADD), "the target of a statement has the shape of its value"),
        (Reduce(load("out", dtype=F64), X, "0", ADD), "the target of a statement has the dtype of its value"),
        (ArgReduce(load("out", dtype=I64), load("x", 0), "{0} > {1}"), "a best element is one of at least one"),
        (Cumulate(load("out", 3), X, ADD), "the target of a statement has the shape of its value"),
        (Scatter(at(LONG, 4, buffer=OUT.buffer), WIDE, "{1}"), "the target of a statement has the dtype of its value"),
        (MatMul(load("p", 1, 2, 3), load("a", 1, 2, 5), load("b", 1, 4, 3)), "matrices of a product fit"),
        (MatMul(load("p", 1, 3, 2), load("a", 1, 2, 5), load("b", 1, 5, 3)), "matrices of a product fit"),
        (MatMul(load("p", 1, 2, 3), load("a", 1, 2, 5), load("b", 1, 5, 3, dtype=F64)), "have one dtype"),
    ],
)
def test_statements(statement: Statement, rule: str) -> None:
    sound_ones: list[Statement] = [
        Pointwise(OUT, X),
        Reduce(load("out"), X, "0", ADD),
        Reduce(load("out"), load("x", 0), "0", ADD),
        ArgReduce(load("out", dtype=I64), X, "{0} > {1}"),
        Cumulate(OUT, X, ADD),
        Scatter(at(LONG, 4, buffer=OUT.buffer), X, "{1}"),
        MatMul(load("p", 1, 2, 3), load("a", 1, 2, 5), load("b", 1, 5, 3)),
    ]
    for part in sound_ones:
        validation.check_statement(part)
    with pytest.raises(InvalidError) as caught:
        validation.check_statement(statement)
    assert rule in str(caught.value)


# Programs.

HALVES = [Load(OUT.buffer, StridedLayout((2,), (1,), start)) for start in (0, 2)]
PAIR = load("pair", 2)


def program_of(*statements: Statement, carry: tuple[Buffer | None, ...] = (None,), ys: Any = ()) -> Program:
    return Program((X.buffer, Y.buffer, PAIR.buffer, LONG.buffer), 1, statements, carry, ys)


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        (program_of(Pointwise(load("t", 4), OUT), Pointwise(OUT, X)), "a buffer is written before it is read, out"),
        (program_of(Pointwise(HALVES[0], PAIR), Pointwise(load("t", 4), OUT)), "written before it is read, out"),
        (program_of(Pointwise(load("t", 4), at(load("i", 4, dtype=I64), 4))), "written before it is read, i is not"),
        (program_of(Pointwise(X, Y)), "no statement writes to an input"),
        (program_of(Pointwise(OUT, X, overwrites=True)), "a buffer is filled before it is changed, out is not"),
        (program_of(Scatter(at(LONG, 4, buffer=OUT.buffer), X, "{1}")), "a buffer is filled before it is changed"),
        (program_of(Pointwise(OUT, X), Pointwise(OUT, Y)), "a buffer is filled once, out is not"),
        (program_of(ys=(OUT.buffer,)), "an output is written, out is not"),
        (program_of(Pointwise(HALVES[1], PAIR), carry=(OUT.buffer,)), "an output is written, out is not"),
        (program_of(carry=(Y.buffer,)), "each new carry has a buffer of its own"),
        (program_of(Pointwise(OUT, X), carry=(OUT.buffer, OUT.buffer)), "each new carry has a buffer of its own"),
        (program_of(Pointwise(OUT, WIDE)), "has the dtype of its value"),
    ],
)
def test_programs(program: Program, rule: str) -> None:
    pieces = [Pointwise(half, PAIR) for half in HALVES]
    check_program(program_of(*pieces, Pointwise(OUT, X, overwrites=True), carry=(OUT.buffer,), ys=(OUT.buffer,)))
    with pytest.raises(InvalidError) as caught:
        check_program(program)
    assert rule in str(caught.value)


# Plans.


def sound() -> KernelPlan:
    """A plan with a loop before the time loop, reductions, a value in a register and a carry in place."""

    def step(carry: Any, x: Any, rate: Any) -> Any:
        c, d = carry
        steady = torch.tanh(rate) * torch.arange(4)
        hidden = torch.tanh(c * x) + steady
        shown = torch.sigmoid(c)
        return (c - hidden.exp() * hidden, d.flip(0) + x.sum()), (shown.sum(), shown)

    carry = (torch.zeros(2, 4), torch.zeros(2, 4))
    scan = make_lane_scan("scan", step, carry, torch.ones(5, 2, 4), torch.ones(2))
    return engine.planned(scan, scan.graph())


def nest_of(plan: KernelPlan, kind: type) -> LoopNest:
    return next(nest for nest in plan.always if isinstance(nest.statements[0], kind))


def drop(plan: KernelPlan) -> KernelPlan:
    return plan._replace(always=plan.always[:-1])


def merge_unlike(plan: KernelPlan) -> KernelPlan:
    nests = [nest for nest in plan.always if nest.shape is not None]
    first, other = nests[0], nest_of(plan, Reduce)
    mixed = LoopNest(first.shape, [*first.statements, *other.statements])
    return plan._replace(always=[mixed if nest is first else nest for nest in plan.always if nest is not other])


def too_early(plan: KernelPlan) -> KernelPlan:
    return plan._replace(once=[*plan.once, *plan.always], always=[])


def backwards(plan: KernelPlan) -> KernelPlan:
    return plan._replace(always=plan.always[::-1])


def swapped(plan: KernelPlan) -> KernelPlan:
    """Two statements of a nest of which the second reads the first."""
    nest = next(nest for nest in plan.always if len(nest.statements) > 1)
    other = LoopNest(nest.shape, nest.statements[::-1])
    return plan._replace(always=[other if part is nest else part for part in plan.always])


def no_memory(plan: KernelPlan) -> KernelPlan:
    """A buffer that another loop reads is taken for one that needs no memory."""
    (_, shown) = plan.program.ys
    return plan._replace(local={*plan.local, shown})


def output_without_memory(plan: KernelPlan) -> KernelPlan:
    return plan._replace(buffers=[part for part in plan.buffers if part not in plan.program.ys])


def forgotten(plan: KernelPlan) -> KernelPlan:
    return plan._replace(local=set())


def wrong_leaf(plan: KernelPlan) -> KernelPlan:
    (new,) = plan.merged
    return plan._replace(merged={new: plan.program.inputs[1]})


def flipped_in_place(plan: KernelPlan) -> KernelPlan:
    return plan._replace(merged=plan.merged | {plan.program.carry[1]: plan.program.inputs[1]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (drop, "each statement is scheduled once"),
        (merge_unlike, "a loop nest has one statement, or pointwise ones of its shape"),
        (too_early, "what runs before the time loop is constant"),
        (backwards, "a loop nest reads what has been written"),
        (swapped, "a loop nest reads what has been written"),
        (no_memory, "which has no memory"),
        (output_without_memory, "each buffer has memory, or needs none"),
        (forgotten, "each buffer has memory, or needs none"),
        (wrong_leaf, "only the new carry is written over the old"),
        (flipped_in_place, "is not read after"),
    ],
)
def test_plans(broken: Callable[[KernelPlan], KernelPlan], rule: str) -> None:
    check_plan(sound())
    with pytest.raises(InvalidError) as caught:
        check_plan(broken(sound()))
    assert rule in str(caught.value)


def plan_with(program: Program, *nests: LoopNest, merged: Any = None) -> KernelPlan:
    targets = [writes(statement) for nest in nests for statement in nest.statements]
    plan = make_plan(program)
    return plan._replace(
        once=[], always=list(nests), merged=merged or {}, local=set(), buffers=[*plan.buffers, *targets]
    )


def test_a_change_comes_after_what_fills_the_buffer() -> None:
    fill, change = Pointwise(OUT, X), Pointwise(OUT, Y, overwrites=True)
    program = program_of(fill, change, carry=(OUT.buffer,))
    check_plan(plan_with(program, LoopNest((4,), [fill]), LoopNest((4,), [change])))
    for nests in ([LoopNest((4,), [change]), LoopNest((4,), [fill])], [LoopNest((4,), [fill, change])]):
        with pytest.raises(InvalidError, match="a loop nest changes what has been filled, out has not been"):
            check_plan(plan_with(program, *nests))


def test_a_carry_is_written_whole_in_place() -> None:
    transposed = Load(SQUARE.buffer, StridedLayout((4, 4), (1, 4)))
    old = load("old", 4, 4)
    fill = Pointwise(transposed, Const(1.0, F32, (4, 4)))
    program = Program((old.buffer,), 0, (fill,), (SQUARE.buffer,), ())
    nest = LoopNest((4, 4), [fill])
    check_plan(plan_with(program, nest))
    with pytest.raises(InvalidError, match="m is written whole over old"):
        check_plan(plan_with(program, nest, merged={SQUARE.buffer: old.buffer}))


def test_a_carry_is_not_read_after_it_has_been_written_over() -> None:
    first, total = Pointwise(OUT, X), Reduce(load("t"), X, "0", ADD)
    program = program_of(first, total, carry=(OUT.buffer,), ys=(total.target.buffer,))
    nests = [LoopNest((4,), [first]), LoopNest(None, [total])]
    check_plan(plan_with(program, *reversed(nests), merged={OUT.buffer: X.buffer}))
    with pytest.raises(InvalidError, match="x is not read after out has been written over it"):
        check_plan(plan_with(program, *nests, merged={OUT.buffer: X.buffer}))
