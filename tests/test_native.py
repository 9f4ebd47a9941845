"""The native engine on a CPU against eager, and what it promises beyond that: isolation, determinism, messages."""

from __future__ import annotations

import functools
from typing import Any

import native_scenarios as scenarios
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from native_scenarios import LEARNERS, OPTIMIZERS, assert_bit_equal, difference
from torch import nn

from popart_func import tree
from popart_func.engines import eager, native, scan_lanes
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native import engine
from popart_func.engines.native.cpu import target as cpu
from popart_func.engines.native.cpu.compile import build
from popart_func.engines.native.expressions import Operation
from popart_func.engines.native.lower import lower
from popart_func.engines.native.statements import ArgReduce, Cumulate, Reduce
from popart_func.engines.native.target import Target

pytestmark = [
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("unchecked"),  # thousands of steps in eager
]


@pytest.fixture(autouse=True)
def lanes_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """This schedule for any number of lanes; `test_native_elements` has the other one."""
    monkeypatch.setattr(native, "run", functools.partial(native.run, schedule="lanes"))


def test_targets_have_one_shape() -> None:
    assert all(isinstance(target, Target) for target in engine.TARGETS.values())
    assert set(engine.TARGETS) == {"cpu", "cuda"}


@pytest.mark.parametrize("learner", LEARNERS)
def test_agrees_with_eager_in_float64(learner: str) -> None:
    scenarios.learners_agree_with_eager([(learner, optimizer) for optimizer in OPTIMIZERS], torch.float64, 1e-12)


def test_agrees_with_eager_in_float32() -> None:
    scenarios.learners_agree_in_float32()


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_agrees_on_batches_of_several_tasks(reduction: Any) -> None:
    scenarios.batches_of_several_tasks_agree(reduction)


def test_agrees_on_a_learner_with_its_environment_inside() -> None:
    scenarios.a_learner_with_its_environment_inside_agrees()


def test_keeps_the_statistics_where_float32_is_short() -> None:
    scenarios.the_statistics_are_kept_where_float32_is_short()


def test_lanes_are_bit_equal_for_any_number_of_lanes_and_threads() -> None:
    scenarios.lanes_are_bit_equal_for_any_number_of_lanes_and_threads()


def test_a_lane_that_diverges_leaves_its_neighbours_alone() -> None:
    scenarios.a_lane_that_diverges_leaves_its_neighbours_alone()


def test_reads_what_lanes_share_where_it_lies() -> None:
    scenarios.shared_inputs_are_read_where_they_lie()


def test_carries_of_all_dtypes_that_swap_and_stay() -> None:
    scenarios.carries_of_all_dtypes_swap_and_stay()


def test_a_carry_that_is_read_backwards_while_it_is_written() -> None:
    scenarios.a_carry_that_is_read_backwards_while_it_is_written_agrees()


def test_does_not_change_its_inputs() -> None:
    scenarios.inputs_are_not_changed()


def test_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def step(carry: Any, x: Any, rate: Any) -> Any:
        calls.append("trace")
        return carry + rate * x, carry * 2

    monkeypatch.setattr(cpu, "build", lambda source: calls.append("build") or build(source))
    for lanes, steps in ((3, 5), (40, 7), (1, 1)):
        carry, xs = torch.zeros(lanes, 2), torch.ones(steps, 2)
        scan = make_lane_scan("scan_lanes", step, carry, xs, torch.arange(float(lanes)), shared=True)
        carry, ys = native.run(scan)
        assert torch.equal(carry, steps * torch.arange(float(lanes))[:, None].expand(lanes, 2))
        assert ys.shape == (steps, lanes, 2)
    assert sorted(calls) == ["build", "trace"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_looks_up_by_an_index_that_comes_from_a_bool(dtype: torch.dtype) -> None:
    """GCC 12 miscompiles it where the table has no lane axis and both stand in one loop."""
    table = torch.tensor([0, 1, 0, 1], dtype=dtype)

    def step(carry: Any, x: Any) -> Any:
        shared, each = x
        by_sign, by_bool = (each > 0).long(), torch.where(each > 0, 3, 2)
        looked_up = (table[by_sign], table[(~(each > 0)).long() + 1], table[by_bool], shared[by_sign])
        rows = F.embedding((each > 0).to(torch.uint8).long(), table[:, None])
        return carry + (each > 0).any().long(), (*looked_up, rows, table.gather(0, by_sign[None]))

    xs = (torch.arange(8).reshape(2, 4).to(dtype), torch.randn(2, 18))
    carry = torch.zeros(18, dtype=torch.int64)
    options = {"shared": (True, False)}
    expected = scan_lanes(step, carry, xs, engine="eager", **options)
    got = scan_lanes(step, carry, xs, engine="native", **options)
    assert tree.max_difference(got, expected) == 0


def test_division_by_the_greatest_uint8() -> None:
    def step(carry: Any, x: Any) -> Any:
        return carry, (
            x % carry,
            x // carry,
            torch.fmod(x, carry),
            x // 255,
            torch.div(x, carry, rounding_mode="trunc"),
        )

    carry, x = torch.full((5,), 255, dtype=torch.uint8), torch.tensor([[0, 2, 254, 255, 128]], dtype=torch.uint8)
    expected = scan_lanes(step, carry, x, engine="eager", shared=False)
    assert tree.max_difference(scan_lanes(step, carry, x, engine="native", shared=False), expected) == 0


def test_any_of_uint8_is_0_or_1() -> None:
    carry = torch.tensor([[2, 248, 0], [0, 0, 0]], dtype=torch.uint8)
    _, ys = scan_lanes(lambda c, x: (c, c.any(0)), carry, length=1, engine="native")
    assert ys[0].tolist() == [1, 0]
    assert ys.dtype == torch.uint8


def test_bits_seen_as_another_dtype_are_refused() -> None:
    with pytest.raises(native.UnsupportedError, match=r"'view'.*the bits of torch.float32 seen as torch.int32"):
        scan_lanes(lambda c, x: (c, c.view(torch.int32)), torch.ones(2, 3), length=1, engine="native")


def test_a_loss_that_no_one_looks_at_is_not_computed() -> None:
    """The graph of its gradient has it nevertheless: for its shape."""

    def step(c: Any, x: Any) -> Any:
        return c - 0.1 * torch.func.grad(lambda c: (c * x).exp().sum())(c), ()

    scan = make_lane_scan("scan", step, torch.ones(3, 4), torch.ones(2), shared=True)
    graph = scan.graph()
    assert graph.operations["sum"] == 1
    assert not any(isinstance(part, Reduce) for part in lower(graph, 1, 1, (False, True)).statements)
    assert difference(native.run(scan), eager.run(scan)) < 1e-6


def test_what_is_reduced_is_computed_in_a_loop_of_its_own_unless_it_is_short() -> None:
    def step(c: Any, x: Any) -> Any:
        deep = c
        for _ in range(12):
            deep = deep * 0.5 + x
        return c, (deep.sum(), deep.argmax(), (deep * 2).cumsum(0), (c * x).sum())

    scan = make_lane_scan("scan", step, torch.rand(3, 4), torch.ones(2), shared=True)
    statements = lower(scan.graph(), 1, 1, (False, True)).statements
    reduced = [part.value for part in statements if isinstance(part, Reduce | ArgReduce | Cumulate)]
    assert [isinstance(value, Operation) for value in reduced] == [False, False, True, True]
    assert all(value.depth <= 8 for value in reduced if isinstance(value, Operation))
    assert difference(native.run(scan), eager.run(scan)) < 1e-6


def test_reads_tensors_that_are_negated_lazily() -> None:
    table = torch._neg_view(torch.tensor([3.0, 4.0]))
    carry, xs = (torch._neg_view(torch.ones(*shape)) for shape in ((2, 2), (1, 2)))
    scan = make_lane_scan("scan_lanes", lambda c, x: (c * 2 + table, x), carry, xs, shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_of_nothing(axis: int) -> None:
    def step(carry: Any, x: Any) -> Any:
        return carry, (torch.softmax(torch.zeros(0, 3) + carry, axis), torch.log_softmax(torch.zeros(3, 0), axis))

    _, ys = scan_lanes(step, torch.zeros(2), length=1, engine="native")
    assert [tuple(y.shape) for y in ys] == [(1, 2, 0, 3), (1, 2, 3, 0)]


def test_sums_of_nothing_that_was_computed() -> None:
    def step(carry: Any, x: Any) -> Any:
        nothing = carry[:0, None] @ x[None]
        taken = x[torch.zeros(0, dtype=torch.int64)]
        return carry, (nothing.sum(0), nothing.prod(), taken.sum(), taken.mean())

    scan = make_lane_scan("scan", step, torch.ones(2, 3), torch.ones(4, 2), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def test_a_module_is_traced_anew_in_another_mode() -> None:
    class Step(nn.Module):
        def forward(self, carry: Any, x: Any) -> Any:
            return carry + (1 if self.training else 10), x

    step = Step()
    assert scan_lanes(step, torch.zeros(2), length=1, engine="native")[0].tolist() == [1, 1]
    step.eval()
    assert scan_lanes(step, torch.zeros(2), length=1, engine="native")[0].tolist() == [10, 10]


def test_a_carry_of_no_elements() -> None:
    def step(c: Any, x: Any) -> Any:
        return (c[0] * 2, c[1] + x), (c[0].sum(), torch.cat([c[0], x[None]]))

    scan = make_lane_scan("scan", step, (torch.ones(3, 0, 2), torch.ones(3, 2)), torch.ones(4, 2), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def test_writes_to_several_computed_places() -> None:
    def step(c: Any, x: Any) -> Any:
        c, i, j = c.clone(), x.long(), x.long() - 2
        c[i, j] = x + 1
        c[:, i, j] = c[0, :, 0] + x
        c[i, :, j] += x
        c[j, :, i] = c[i, :, j].double() / 3
        c[i, j, i] = 7
        return c, c.sum()

    scan = make_lane_scan("scan", step, torch.rand(3, 2, 2, 2), torch.tensor([0.0, 1.0]), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def writes_outside(c: Any, x: Any) -> Any:
    table = torch.zeros(2, 2)
    table[x.long() + 3, x.long()] = 1
    return c + table.sum(), c


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (writes_outside, IndexError, r"out of range.*test_native.py:\d+: `table"),
        (lambda c, x: (c + c[x.long() + 3], c), IndexError, r"out of range.*test_native.py:\d+: `\(lambda c, x"),
        (lambda c, x: (c, c[:1] + 3 // x.int()), ZeroDivisionError, r"divided by zero.*test_native.py:\d+"),
        (
            lambda c, x: (c, torch.linalg.svdvals(c[None])),
            native.UnsupportedError,
            r"no op '_?linalg_svd'.*test_native.py:\d+",
        ),
        (lambda c, x: (c, c.bfloat16()), native.UnsupportedError, r"bfloat16.*test_native.py:\d+"),
    ],
)
def test_says_what_is_wrong_and_where(step: Any, error: type[Exception], message: str) -> None:
    scan = make_lane_scan("scan_lanes", step, torch.zeros(2, 2), torch.zeros(3), shared=True)
    with pytest.raises(error, match=message):
        native.run(scan)
