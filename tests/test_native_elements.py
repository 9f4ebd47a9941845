"""The schedule "elements in registers" of the native engine: it must do what the other schedule does.

Widths that are no multiple of a register, batches, products of all strides; lanes that do not depend on each other;
random steps against eager; replay buffers of which a step writes a row in place.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import native_scenarios as scenarios
import pytest
import small_sweep
import torch
from native_scenarios import assert_bit_equal, difference, pick
from random_steps import random_scan, random_step
from torch import Tensor

from popart_func import sweeps
from popart_func.engines import Native, cost_model, eager, explain, native, scan, scan_lanes
from popart_func.engines.lane_scan import LaneScan, make_lane_scan
from popart_func.engines.native.cpu.target import SCHEDULES
from popart_func.engines.native.engine import planned
from popart_func.engines.native.memory import share_memory
from popart_func.engines.native.statements import reads, writes

pytestmark = [
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("unchecked"),
]


@pytest.fixture
def elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """`native.run` runs the schedule in question, whatever the cost model says."""
    monkeypatch.setattr(native, "run", functools.partial(native.run, schedule="elements"))


def test_the_names_of_the_schedules() -> None:
    assert set(SCHEDULES) == {"lanes", "elements"}
    with pytest.raises(ValueError, match=r"Native: `schedule` must be 'auto' or one of .*, got 'steam'"):
        Native(schedule="steam")


def test_a_part_of_an_array_may_begin_anywhere() -> None:
    """GCC 12 took some of these for aligned, and the process ended."""

    def step(x: Tensor, _: Any) -> Any:
        parts = [x[n : n + size] for n, size in ((6, 5), (6, 6), (3, 9), (9, 6))]
        return x, [(part.sort(), (part.double() * 2).argsort(), part[1:].argmax()) for part in parts]

    x = torch.randn(1, 15)
    expected = scan_lanes(step, x, length=1, engine="eager")
    assert difference(scan_lanes(step, x, length=1, engine="native:elements"), expected) == 0


@pytest.mark.usefixtures("elements")
class TestDoesWhatTheOtherScheduleDoes:
    def test_learners_in_float64(self) -> None:
        scenarios.learners_agree_with_eager([("popart", "adam"), ("normalized_sgd", "sgd")], torch.float64, 1e-12)

    def test_batches_of_several_tasks(self) -> None:
        scenarios.batches_of_several_tasks_agree("mean")

    def test_a_learner_with_its_environment_inside(self) -> None:
        scenarios.a_learner_with_its_environment_inside_agrees()

    def test_lanes_are_bit_equal_for_any_number_of_lanes_and_threads(self) -> None:
        scenarios.lanes_are_bit_equal_for_any_number_of_lanes_and_threads()

    def test_a_lane_that_diverges_leaves_its_neighbours_alone(self) -> None:
        scenarios.a_lane_that_diverges_leaves_its_neighbours_alone()

    def test_reads_what_lanes_share_where_it_lies(self) -> None:
        scenarios.shared_inputs_are_read_where_they_lie()

    def test_carries_of_all_dtypes_that_swap_and_stay(self) -> None:
        scenarios.carries_of_all_dtypes_swap_and_stay()

    def test_a_carry_that_is_read_backwards_while_it_is_written(self) -> None:
        scenarios.a_carry_that_is_read_backwards_while_it_is_written_agrees()

    @pytest.mark.slow
    @pytest.mark.parametrize(("dtype", "shape"), [*scenarios.FLOATING_POINT, (torch.float32, (5, 37))])
    def test_floating_point_ops(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        scenarios.floating_point_ops_agree(dtype, shape)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_integer_ops(self, dtype: torch.dtype) -> None:
        scenarios.integer_ops_agree(dtype)

    def test_movement(self) -> None:
        scenarios.movement_agrees()

    @pytest.mark.slow
    def test_movement_of_what_all_lanes_share(self) -> None:
        scenarios.movement_of_what_all_lanes_share_agrees()


# Products.


def products(a: Tensor, b: Tensor, v: Tensor) -> dict[str, Tensor]:
    """All ways in which the factors of a product may lie: rows, columns, strided, overlapping, one row, one column."""
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    lefts = {"rows": a, "columns": a.T.contiguous().T, "every second": torch.cat([a, a], 1)[:, ::2][:, : k // 2]}
    found = {}
    for (left_name, left), way in itertools.product(lefts.items(), ("rows", "columns", "flipped")):
        right = {"rows": b, "columns": b.T.contiguous().T, "flipped": b.flip(1)}[way][: left.shape[1]]
        found[f"{left_name} {way}"] = left @ right
    found["batched"] = torch.stack([a, a + 1]) @ torch.stack([b, b - 1])
    found["a row"], found["a column"] = v[:k] @ b, a @ v[:k]
    found["a row by columns"] = v[:k] @ b.T.contiguous().T
    found["overlapping"] = v.unfold(0, k, 1)[:m] @ b
    found["a dot"], found["few columns"] = torch.dot(v[:k], v[:k]), a @ b[:, : min(n, 3)]
    found["integers"] = (a * 4).round().long() @ (b * 4).round().long()
    return found


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        *((dtype, sizes) for sizes in ((33, 37, 18), (6, 3, 5)) for dtype in (torch.float32, torch.float64)),
        (torch.float32, (17, 200, 150)),  # large: B in panels, or the rows of A in registers
    ],
)
def test_products(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    generator = torch.Generator().manual_seed(1)
    xs = tuple(torch.randn(2, 3, *shape, generator=generator, dtype=dtype) for shape in ((m, k), (k, n), (m + k,)))
    scan = make_lane_scan("scan", lambda c, x: (c + 1, products(*x)), torch.zeros(3), xs, shared=False)
    got, expected = native.run(scan, schedule="elements")[1], eager.run(scan)[1]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert {name: difference(got[name], expected[name]) for name in expected} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=tolerance
    )


# Random steps.


@pytest.mark.parametrize(
    ("seed", "dtype", "schedule"),
    [
        (0, torch.float32, "elements"),
        (1, torch.float64, "elements"),
        (2, torch.float32, "lanes"),
        *(
            pytest.param(seed, dtype, schedule, marks=pytest.mark.slow)
            for seed in range(3, 20)
            for dtype in (torch.float32, torch.float64)
            for schedule in SCHEDULES
        ),
    ],
)
def test_random_steps(seed: int, dtype: torch.dtype, schedule: str) -> None:
    scan = random_scan(seed, dtype)
    carry, ys = native.run(scan, schedule=schedule)
    assert difference((carry, ys), eager.run(scan)) < (1e-4 if dtype == torch.float32 else 1e-11)
    for lanes in ([0], [2, 5, 16], list(range(16))):
        alone = native.run(scenarios.part_of(scan, lanes), schedule=schedule)
        assert_bit_equal(alone, (pick(carry, lanes, 0), pick(ys, lanes, 1)))


# The choice.


def network_scan(width: int, batch: int, lanes: int) -> LaneScan:
    weight = torch.zeros(lanes, width, width)

    def step(weight: Any, x: Any) -> Any:
        gradient = torch.func.grad(lambda weight: torch.tanh(x @ weight).square().sum())(weight)
        return weight - 0.1 * gradient, ()

    return make_lane_scan("scan", step, weight, torch.zeros(2, batch, width), shared=True)


@pytest.mark.parametrize(
    ("width", "batch", "lanes", "schedule"),
    [
        (16, 1, 64, "lanes"),
        (16, 1, 1000, "lanes"),
        (16, 1, 1, "elements"),
        (64, 32, 1, "elements"),
        (64, 32, 1000, "elements"),
        (128, 1, 64, "elements"),
        (32, 1, 16, "elements"),  # on two threads, which share no block of 16 lanes
        (32, 1, 32, "lanes"),
    ],
)
def test_the_faster_schedule(
    width: int, batch: int, lanes: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured on an AVX-512 machine; the number of threads does not enter."""
    monkeypatch.setattr(cost_model, "register_bytes", lambda: 64)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            assert cost_model.faster_schedule(network_scan(width, batch, lanes).graph(), lanes) == schedule
        finally:
            torch.set_num_threads(threads)


def test_a_loop_takes_memory_once_and_computes_in_each_round() -> None:
    """Values of 20 megabytes in a block leave the cache, whether a loop has them or the step: then vectors win."""

    def counts(wide: int, rounds: int) -> cost_model.OperationCounts:
        def step(carry: Any, _: Any) -> Any:
            return scan(lambda c, _: (c * 0.5 + c.exp(), None), carry, length=rounds)[0], ()

        one = make_lane_scan("scan", step, torch.zeros(1, wide), None, length=1)
        return cost_model.OperationCounts.of(one.graph(), 64)

    few, many = counts(100, 3), counts(100, 3000)
    assert many.others == 1000 * few.others
    assert many.values == few.values
    for wide, spilling in ((1000, 1.0), (100_000, cost_model.SPILLING)):
        found = counts(wide, 3)
        one_block = cost_model.predict(found, 16, 1, 64).lanes
        assert one_block == pytest.approx(1e-9 * spilling * cost_model.CONSTANTS.lane_other * found.others)


def test_a_schedule_is_asked_for_by_an_object_or_as_text() -> None:
    step, _, _ = random_step(0)
    scan = random_scan(0, torch.float32)
    arguments = {"xs": scan.xs[0], "shared": False}
    results = [
        scan_lanes(step, scan.carry, engine=engine, **arguments)
        for engine in (Native(schedule="elements"), "native:elements")
    ]
    assert_bit_equal(results[0], results[1])
    assert_bit_equal(results[0], native.run(scan, schedule="elements"))
    shown = explain(step, scan.carry, engine=Native(schedule="elements"), **arguments)
    assert shown.engine == "native"
    assert "multiply<" in (shown.own_source or "")
    with pytest.raises(ValueError, match="`schedule` must be"):
        scan_lanes(step, scan.carry, engine="native:steam", **arguments)


def test_a_sweep_has_one_schedule_whatever_its_chunks_and_keeps_that_of_its_store(tmp_path: Path) -> None:
    """Of one lane alone the other schedule is the faster one."""
    found = [sweeps.run(**small_sweep.arguments(engine="native", chunk_size=size)) for size in (1, 4, 1000)]
    assert {one.attrs["engine"] for one in found} == {"native:lanes"}
    for one in found[1:]:
        assert one.equals(found[0])
    there = sweeps.run(**small_sweep.arguments(engine=Native(schedule="elements"), store=tmp_path / "sweep"))
    again = sweeps.run(**small_sweep.arguments(engine="native", store=tmp_path / "sweep"))
    assert there.attrs["engine"] == again.attrs["engine"] == "native:elements"
    assert again.attrs["lane_steps"] == 0


# Memory.


def test_buffers_share_memory_only_while_one_of_them_is_needed() -> None:
    scan = random_scan(1, torch.float64)
    plan = planned(scan, scan.graph())
    shared = share_memory(plan)
    taken = {new: old for new, old in shared.merged.items() if new not in plan.merged}
    assert len(taken) > 3
    lives: dict[Any, list[int]] = {}
    for index, nest in enumerate(plan.always):
        for statement in nest.statements:
            for buffer in (writes(statement), *(load.buffer for load in reads(statement))):
                lives.setdefault(buffer, []).append(index)
    for old in set(taken.values()):
        assert old not in taken
        users = sorted((min(lives[one]), max(lives[one])) for one in (old, *(n for n, o in taken.items() if o is old)))
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(users))
    assert all(new.dtype == old.dtype and new.numel <= old.numel for new, old in taken.items())
    assert {*shared.buffers, *taken} == set(plan.buffers)


# Carries that are written in part.


def insert(how: str, buffer: Tensor, at: Tensor, row: Tensor) -> Tensor:
    if how == "index_put":
        return buffer.index_put((at,), row)
    if how == "scatter":
        return buffer.scatter(0, at.expand(1, buffer.shape[1]), row[None])
    buffer = buffer.clone()
    if how == "slice":
        buffer[2:3] = row
    else:
        buffer[at] = row
    return buffer


def replay_scan(how: str, sample_first: bool, capacity: int) -> LaneScan:
    def step(carry: Any, x: Any) -> Any:
        buffer, count = carry
        picks = (torch.arange(5) * 7 + count) % capacity
        new = insert(how, buffer, count % capacity, x)
        rows = (buffer if sample_first else new)[picks]
        return (new, count + 1), (rows.sum(0) @ x, rows.T @ rows)

    generator = torch.Generator().manual_seed(2)
    carry = torch.randn(3, capacity, 4, generator=generator), torch.zeros(3, dtype=torch.int64)
    return make_lane_scan("scan", step, carry, torch.randn(40, 3, 4, generator=generator), shared=False)


@pytest.mark.parametrize("sample_first", [False, True])
@pytest.mark.parametrize("how", ["index_put", "scatter", "setitem", "slice"])
def test_a_replay_buffer_is_written_in_place(how: str, sample_first: bool) -> None:
    scan = replay_scan(how, sample_first, 500)
    plan = planned(scan, scan.graph())
    assert sum(old is plan.program.inputs[0] for old in plan.merged.values()) == 1
    reading = [
        load for nest in plan.always for part in nest.statements for load in reads(part) if load.buffer.numel > 400
    ]
    assert reading
    assert all(load.dynamic or load.is_whole for load in reading)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_replay_buffer_agrees_with_eager(schedule: str) -> None:
    for how, capacity in (("index_put", 30), ("setitem", 30)):
        scan = replay_scan(how, True, capacity)
        assert difference(native.run(scan, schedule=schedule), eager.run(scan)) < 1e-5


def test_a_read_that_depends_on_what_was_written_is_left_where_it_is() -> None:
    def step(buffer: Any, x: Any) -> Any:
        new = buffer.index_put((x.long() % 9,), x)
        return new, buffer[(new[3] * 2).long().abs() % 9]

    scan = make_lane_scan("scan", step, torch.randn(3, 9), torch.arange(12.0), shared=True)
    assert_bit_equal(native.run(scan, schedule="elements"), eager.run(scan))
