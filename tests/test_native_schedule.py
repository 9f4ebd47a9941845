"""The native engine's schedule, without a compiler: which loops are merged, what is constant, what is in place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native import listing
from popart_func.engines.native.engine import planned
from popart_func.engines.native.expressions import Buffer, Expr, Load
from popart_func.engines.native.kernel import Kernel
from popart_func.engines.native.layouts import contiguous
from popart_func.engines.native.loops import tiles
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LARGE, LoopNest, in_place, invariant, schedule, stay_in_registers
from popart_func.engines.native.statements import writes

F32 = torch.float32


def load(name: str, *shape: int, dtype: torch.dtype = F32) -> Load:
    return Load(Buffer(name, dtype, math.prod(shape)), contiguous(shape))


def plus(kernel: Kernel, *parts: Expr) -> Load:
    """The sum of expressions, in a new buffer."""
    return kernel.copied(kernel.pointwise(" + ".join(f"{{{i}}}" for i in range(len(parts))), F32, *parts))


def flipped(kernel: Kernel, x: Load) -> Expr:
    return kernel.slice(x, 0, x.shape[0] - 1, x.shape[0], -1)


def names(nests: list[LoopNest]) -> list[list[str]]:
    """The buffers that each loop nest writes."""
    return [[writes(statement).name for statement in nest.statements] for nest in nests]


# schedule


def test_pointwise_statements_of_one_shape_share_a_loop() -> None:
    kernel, x, y = Kernel(), load("x", 3, 4), load("y", 5)
    first = plus(kernel, x, x)  # t1
    plus(kernel, y, y)  # t2, of another shape
    plus(kernel, first, x)  # t3 reads what t1 computes at the same index
    assert names(schedule(kernel.statements)) == [["t1", "t3"], ["t2"]]


def test_what_is_read_through_a_view_is_computed_in_an_earlier_loop() -> None:
    kernel, x = Kernel(), load("x", 4)
    first = plus(kernel, x, x)
    plus(kernel, flipped(kernel, first), x)
    assert names(schedule(kernel.statements)) == [["t1"], ["t2"]]


def test_what_is_filled_through_a_view_is_read_in_a_later_loop() -> None:
    kernel, x = Kernel(), load("x", 4, 4)
    transposed = kernel.buffer((4, 4), F32)
    kernel.store(kernel.permute(transposed, [1, 0]), x)
    plus(kernel, transposed, x)
    assert names(schedule(kernel.statements)) == [["t1"], ["t2"]]


def test_a_loop_over_one_element_is_printed_without_its_head() -> None:
    kernel, x = Kernel(), load("x")
    plus(kernel, plus(kernel, x, x), x)
    (nest,) = schedule(kernel.statements)
    assert str(nest).split("\n") == [str(statement) for statement in kernel.statements]


def test_a_statement_joins_the_last_loop_that_fits() -> None:
    kernel, x = Kernel(), load("x", 4)
    first = plus(kernel, x, x)
    second = plus(kernel, flipped(kernel, first), x)
    plus(kernel, x, x, x)  # t3 fits into both
    plus(kernel, flipped(kernel, second), first)  # t4 fits into neither
    assert names(schedule(kernel.statements)) == [["t1"], ["t2", "t3"], ["t4"]]


def test_a_large_loop_takes_only_what_has_an_operand_in_common_with_it() -> None:
    kernel, parts = Kernel(), [load(f"x{number}", 4) for number in range(2 * LARGE)]
    for part in parts:
        plus(kernel, part, part)
    plus(kernel, parts[0], parts[1])  # reads what the first loop reads
    assert [len(nest.statements) for nest in schedule(kernel.statements)] == [LARGE + 1, LARGE]


def test_a_statement_waits_for_no_more_loops_than_it_must() -> None:
    kernel, x = Kernel(), load("x", 4)
    first = plus(kernel, x, x)
    plus(kernel, flipped(kernel, first), x)
    plus(kernel, flipped(kernel, first), x, x)
    assert names(schedule(kernel.statements)) == [["t1"], ["t2", "t3"]]
    kernel = Kernel()
    target, other = kernel.copied(x), plus(kernel, x, x)
    plus(kernel, flipped(kernel, other), x)
    kernel.store(kernel.slice(target, 0, 0, 4), x, overwrites=True)
    assert names(schedule(kernel.statements)) == [["t1", "t2"], ["t3", "t1"]]


def test_a_reduction_has_a_loop_of_its_own_and_its_readers_come_after() -> None:
    kernel, x = Kernel(), load("x", 4)
    total = kernel.reduce(plus(kernel, x, x), [0], "0", "{0} + {1}")  # t2 of t1
    plus(kernel, x, kernel.expand(total, (4,)))  # t3
    plus(kernel, x, x)  # t4: back in the loop of t3, the last one
    assert names(schedule(kernel.statements)) == [["t1"], ["t2"], ["t3", "t4"]]


def test_readers_of_a_buffer_that_is_filled_piece_by_piece_wait_for_the_last_piece() -> None:
    kernel, x, y = Kernel(), load("x", 4), load("y", 4)
    joined = kernel.buffer((8,), F32)
    kernel.store(kernel.slice(joined, 0, 0, 4), x)
    late = plus(kernel, flipped(kernel, plus(kernel, y, y)), y)
    kernel.store(kernel.slice(joined, 0, 4, 4), late)
    plus(kernel, kernel.slice(joined, 0, 0, 4), x)  # t5, which reads the first piece only
    assert names(schedule(kernel.statements)) == [["t1", "t2"], ["t3", "t1"], ["t4"]]


def test_the_last_piece_may_be_in_an_earlier_loop_than_another() -> None:
    kernel, x, y = Kernel(), load("x", 2), load("y", 4)
    plus(kernel, x, x)  # t1, a loop over 2
    late = flipped(kernel, plus(kernel, y, y))  # t2, a loop over 4
    joined = kernel.buffer((6,), F32)
    kernel.store(kernel.slice(joined, 0, 0, 4), late)
    kernel.store(kernel.slice(joined, 0, 4, 2), x)
    plus(kernel, kernel.slice(joined, 0, 0, 4), y)  # t4
    assert names(schedule(kernel.statements)) == [["t1", "t3"], ["t2"], ["t3"], ["t4"]]


def test_a_change_comes_after_what_fills_the_buffer() -> None:
    kernel, x = Kernel(), load("x", 4)
    target = kernel.copied(x)
    kernel.store(kernel.slice(target, 0, 0, 4), plus(kernel, x, x), overwrites=True)
    assert names(schedule(kernel.statements)) == [["t1", "t2"], ["t1"]]


def test_what_an_index_is_computed_from_has_a_loop_of_its_own() -> None:
    """GCC 12 would miscompile the look-up."""

    def step(c: Any, x: Any) -> Any:
        index = (x > 0).long()
        return c + torch.tensor([1.0, 2.0])[index], index

    always = plan_of(step, torch.zeros(2, 3), torch.ones(5, 3), shared=True).always
    assert [len(nest.statements) for nest in always] == [1, 1]


# invariant


def test_what_depends_on_neither_carry_nor_xs_is_computed_once() -> None:
    kernel, carry, rate = Kernel(), load("carry", 4), load("rate", 4)
    steady = plus(kernel, rate, rate)
    later = plus(kernel, steady, rate)
    moving = plus(kernel, later, carry)
    plus(kernel, moving, rate)
    found = invariant(kernel.statements, [carry.buffer])
    assert {buffer.name for buffer in found} == {"t1", "t2"}


def test_all_is_computed_once_where_nothing_moves() -> None:
    kernel, rate = Kernel(), load("rate", 4)
    plus(kernel, rate, rate)
    assert {buffer.name for buffer in invariant(kernel.statements, [])} == {"t1"}


def test_a_buffer_that_a_later_statement_changes_is_not_constant() -> None:
    kernel, carry, rate = Kernel(), load("carry", 4), load("rate", 4)
    target = kernel.copied(rate)
    reader = plus(kernel, target, rate)
    kernel.store(target, carry, overwrites=True)
    assert reader.buffer not in invariant(kernel.statements, [carry.buffer])
    assert target.buffer not in invariant(kernel.statements, [carry.buffer])


# in_place


def merged(kernel: Kernel, old: list[Load], new: list[Load | None]) -> set[str]:
    pairs = in_place(
        schedule(kernel.statements), [part.buffer for part in old], [part.buffer if part else None for part in new]
    )
    return {f"{after.name} over {before.name}" for after, before in pairs.items()}


def test_a_carry_that_is_read_at_the_index_that_is_written_is_in_place() -> None:
    kernel, c, x = Kernel(), load("c", 4), load("x", 4)
    assert merged(kernel, [c], [plus(kernel, c, x)]) == {"t1 over c"}


def test_a_carry_that_is_read_through_a_view_is_not() -> None:
    """``c.flip(0) + x``: the second half would read what the first has written."""
    kernel, c, x = Kernel(), load("c", 4), load("x", 4)
    assert merged(kernel, [c], [plus(kernel, flipped(kernel, c), x)]) == set()


def test_a_carry_that_a_later_loop_reads_is_not() -> None:
    kernel, c, x = Kernel(), load("c", 4), load("x", 4)
    new = plus(kernel, c, x)
    kernel.reduce(c, [0], "0", "{0} + {1}")
    assert merged(kernel, [c], [new]) == set()


def test_a_carry_that_an_earlier_loop_reads_is_in_place() -> None:
    kernel, c, x = Kernel(), load("c", 4), load("x", 4)
    total = kernel.reduce(flipped(kernel, c), [0], "0", "{0} + {1}")
    assert merged(kernel, [c], [plus(kernel, c, kernel.expand(total, (4,)), x)]) == {"t2 over c"}


def test_carries_that_swap_are_in_place_where_one_loop_loads_both_before_it_stores() -> None:
    kernel, a, b = Kernel(), load("a", 4), load("b", 4)
    assert merged(kernel, [a, b], [kernel.copied(b), kernel.copied(a)]) == {"t1 over a", "t2 over b"}
    kernel = Kernel()
    assert merged(kernel, [a, b], [kernel.copied(b), plus(kernel, flipped(kernel, a), a)]) == {"t2 over b"}


def test_a_carry_that_is_filled_piece_by_piece_is_not() -> None:
    kernel, c, x = Kernel(), load("c", 4), load("x", 1)
    ring = kernel.buffer((4,), F32)
    kernel.store(kernel.slice(ring, 0, 0, 3), kernel.slice(c, 0, 1, 3))
    kernel.store(kernel.slice(ring, 0, 3, 1), x)
    assert merged(kernel, [c], [ring]) == set()


def test_a_carry_that_is_written_through_a_view_is_not() -> None:
    kernel, c = Kernel(), load("c", 4, 4)
    transposed = kernel.buffer((4, 4), F32)
    kernel.store(kernel.permute(transposed, [1, 0]), c)
    assert merged(kernel, [c], [transposed]) == set()


def test_a_leaf_that_stays_or_is_computed_once_is_not() -> None:
    kernel, c, d, x = Kernel(), load("c", 4), load("d", 4), load("x", 4)
    plus(kernel, c, x)
    assert merged(kernel, [c, d], [None, x]) == set()
    new = plus(kernel, d, x)
    assert merged(kernel, [c, d], [None, new]) == merged(kernel, [c, d], [x, new]) == {"t2 over d"}


def test_one_buffer_takes_the_place_of_one_leaf_only() -> None:
    kernel, c, d, x = Kernel(), load("c", 4), load("d", 4), load("x", 4)
    new = plus(kernel, x, x)
    assert merged(kernel, [c, d], [new, new]) == {"t1 over c"}


# Plans of steps.


def plan_of(step: Any, carry: Any, xs: Any, hparams: Any = None, **options: Any) -> KernelPlan:
    scan = make_lane_scan("scan", step, carry, xs, hparams, **options)
    return planned(scan, scan.graph())


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (lambda c, x: c + x, True),
        (lambda c, x: c * c.sum() + x, True),  # the sum has a loop of its own, before
        (lambda c, x: c.flip(0) + x, False),
        (lambda c, x: c.roll(1) + x, False),
        (lambda c, x: torch.cat([c[1:], x]), False),
        (lambda c, x: c[0] + x.expand(7), False),
        (lambda c, x: F.relu(c) - c, True),
    ],
)
def test_which_steps_are_in_place(update: Any, expected: bool) -> None:
    plan = plan_of(lambda c, x: (update(c, x), ()), torch.zeros(3, 7), torch.ones(5, 3, 1))
    assert bool(plan.merged) == expected
    assert str(plan).count("in place") == expected


def test_values_that_one_loop_uses_need_no_memory() -> None:
    kernel, x = Kernel(), load("x", 4)
    first = plus(kernel, x, x)
    second = plus(kernel, first, x)
    third = plus(kernel, flipped(kernel, second), second)
    plus(kernel, third, x)
    assert {buffer.name for buffer in stay_in_registers(schedule(kernel.statements))} == {"t1", "t3", "t4"}


def test_what_needs_memory_has_it() -> None:
    def step(c: Any, x: Any, rate: Any) -> Any:
        hidden = torch.tanh(c * x)
        return c - rate * hidden * hidden.sum(), hidden.mean()

    plan = plan_of(step, torch.zeros(2, 4), torch.ones(5, 4), torch.ones(2), shared=True)
    own = {buffer for buffer in plan.program.inputs if not buffer.uniform}
    assert own < set(plan.buffers)
    assert plan.program.inputs[1].uniform
    assert not plan.local & set(plan.buffers)
    assert not set(plan.merged) & set(plan.buffers)
    assert set(plan.program.ys) <= set(plan.buffers)


def test_a_shape_is_kept_where_a_loop_is_printed() -> None:
    scan = make_lane_scan("scan", lambda c, x: (c + x, ()), torch.zeros(2, 3, 4), torch.ones(5, 4), shared=True)
    assert "for i0 < 3, i1 < 4:\n    t1 = (in0 + in1[i1])" in listing(scan).loops


# tiles


@pytest.mark.parametrize("most", [1, 3, 4, 12])
def test_tiles_cover_an_axis_once_and_are_never_too_large(most: int) -> None:
    for length in range(1, 60):
        parts = tiles(length, most)
        covered = [place for part, size in parts for start in part[::size] for place in range(start, start + size)]
        assert covered == list(range(length))
        assert all(1 <= size <= most for _, size in parts)
        assert len(parts) <= 2
        assert all(len(part) % size == 0 for part, size in parts)


def test_tiles_divide_the_axis_where_they_stay_large() -> None:
    assert tiles(10, 4) == [(range(8), 4), (range(8, 10), 2)]
    assert tiles(9, 4) == [(range(9), 3)]
    assert tiles(16, 12) == [(range(16), 8)]
    assert tiles(13, 12) == [(range(7), 7), (range(7, 13), 6)]
    assert tiles(2, 4) == [(range(2), 2)]
