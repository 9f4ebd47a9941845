"""The native engine against eager, and what it promises beyond that: isolation, determinism, caching, messages."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from popart_func import optim, tree
from popart_func.engines import eager, native, scan_lanes
from popart_func.engines.compiler import compiler
from popart_func.engines.lane_scan import LaneScan, make_lane_scan
from popart_func.engines.native.build import build, cache_directory
from popart_func.engines.native.expressions import Op
from popart_func.engines.native.lower import lower
from popart_func.engines.native.statements import ArgReduce, Reduce, Scan
from popart_func.learners import art_learner, normalized_sgd_learner, popart_learner, sgd_learner
from popart_func.models import init_lanes, stateless
from popart_func.pop_art import art, init_state, popart, unnormalize

pytestmark = [
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("unchecked"),  # thousands of steps in eager
]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 4)
        self.output_linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_linear(torch.tanh(self.hidden(x)))


APPLY = stateless(Network())
LANES = 19  # two blocks, the last one not full

OPTIMIZERS: dict[str, Callable[[Any], optim.GradientTransformation]] = {
    "sgd": lambda rate: optim.sgd(rate),
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optim.sgd(rate, momentum=0.5, nesterov=True),
    "adam": lambda rate: optim.adam(rate),
}
LEARNERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda optimizer, beta: sgd_learner(APPLY, optimizer),
    "art": lambda optimizer, beta: art_learner(APPLY, optimizer, popart(1, beta)),
    "popart": lambda optimizer, beta: popart_learner(APPLY, optimizer, popart(1, beta)),
    "normalized_sgd": lambda optimizer, beta: normalized_sgd_learner(APPLY, optimizer, popart(1, beta)),
}


def make_step(learner: str, optimizer: str) -> Callable[..., Any]:
    def step(state: Any, xy: Any, hparams: Any) -> Any:
        state, info = LEARNERS[learner](OPTIMIZERS[optimizer](hparams["rate"]), hparams["beta"]).update(state, xy)
        return state, {"error": info.error, "loss": info.loss}

    return step


def make_scan(
    learner: str, optimizer: str, dtype: torch.dtype, *, steps: int = 200, lanes: int = LANES, step: Any = None
) -> LaneScan:
    generator = torch.Generator().manual_seed(5)
    params = {name: leaf.to(dtype) for name, leaf in init_lanes(Network, range(lanes)).items()}
    state = vmap(LEARNERS[learner](OPTIMIZERS[optimizer](0.1), 0.1).init)(params)
    x = torch.randn(steps, lanes, 5, generator=generator, dtype=dtype)
    y = x.sum(-1, keepdim=True) + 2 + torch.randn(steps, 1, 1, generator=generator, dtype=dtype) / 4
    hparams = {
        "rate": torch.linspace(1e-3, 3e-3, lanes, dtype=dtype),
        "beta": torch.linspace(0.05, 0.3, lanes, dtype=dtype),
    }
    return make_lane_scan("scan_lanes", step or make_step(learner, optimizer), state, (x, y), hparams, shared=False)


def difference(first: Any, second: Any) -> float:
    """The largest difference, relative to 1 + |value|."""
    return max(
        float(((a.double() - b.double()).abs() / (1 + b.double().abs())).max())
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_agrees_with_eager_in_float64(learner: str, optimizer: str) -> None:
    scan = make_scan(learner, optimizer, torch.float64)
    expected, got = eager.run(scan), native.run(scan)
    assert torch.isfinite(expected[1]["error"]).all()
    assert difference(got, expected) < 1e-12


@pytest.mark.parametrize(("learner", "optimizer"), [("popart", "adam"), ("normalized_sgd", "sgd")])
def test_agrees_with_eager_in_float32(learner: str, optimizer: str) -> None:
    scan = make_scan(learner, optimizer, torch.float32)
    # Sums of 5 products and vector functions of 4 ulp differ by about 1e-6 a step; training contracts it.
    assert difference(native.run(scan), eager.run(scan)) < 2e-4


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_agrees_on_batches_of_several_tasks(reduction: Any) -> None:
    tasks, batch, steps = 3, 4, 30
    generator = torch.Generator().manual_seed(7)

    def step(carry: Any, xyi: Any, beta: Any) -> Any:
        statistics, head = carry
        x, y, indices = xyi
        update = popart(tasks, beta, reduction=reduction, bias_correction=True).update
        head, statistics = update(head, statistics, y, indices)
        outputs = torch.softmax(x @ head["weight"].T + head["bias"], -1)
        return (statistics, head), unnormalize(statistics, outputs.gather(-1, indices[:, None])[:, 0], indices)

    head = {"weight": torch.randn(LANES, tasks, 5, generator=generator), "bias": torch.zeros(LANES, tasks)}
    carry = vmap(lambda head: (init_state(tasks, dtype=torch.float64), head))(tree_map(torch.Tensor.double, head))
    x = torch.randn(steps, LANES, batch, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(steps, LANES, batch, generator=generator, dtype=torch.float64) * 9 + 100
    indices = torch.randint(0, tasks, (steps, LANES, batch), generator=generator)
    betas = torch.linspace(0.01, 0.2, LANES, dtype=torch.float64)
    scan = make_lane_scan("scan_lanes", step, carry, (x, y, indices), betas, shared=False)
    assert difference(native.run(scan), eager.run(scan)) < 1e-12


def test_agrees_on_a_learner_with_its_environment_inside() -> None:
    """Q-learning with a replay memory on a walk: integers, comparisons, indices, writes in place, random bits."""
    cells, memory = 6, 8

    def step(carry: Any, _: Any, rate: Any) -> Any:
        q, place, seed, replay, count = carry
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        explore = ((seed >> 16) & 3) != 0
        action = torch.where(explore, (seed >> 20) & 1, q[place].argmax())
        after = (place + 2 * action - 1).clamp(0, cells - 1)
        done = after == cells - 1
        replay = replay.clone()
        replay[count % memory] = torch.stack([place, action, after, done.long()])
        old, did, new, end = replay[(seed >> 8) % torch.minimum(count + 1, torch.tensor(memory))].unbind()
        target = end + torch.where(end == 1, 0.0, 0.9 * q[new].max())
        q = q.index_put((old, did), q[old, did] + rate * (target - q[old, did]))
        return (q, torch.where(done, 0, after), seed, replay, count + 1), (action, done, F.one_hot(after, cells))

    carry = (
        torch.zeros(LANES, cells, 2, dtype=torch.float64),
        torch.zeros(LANES, dtype=torch.int64),
        torch.arange(LANES),
        torch.zeros(LANES, memory, 4, dtype=torch.int64),
        torch.zeros(LANES, dtype=torch.int64),
    )
    rates = torch.linspace(0.1, 0.5, LANES, dtype=torch.float64)
    scan = make_lane_scan("scan_lanes", step, carry, None, rates, length=300)
    expected, got = eager.run(scan), native.run(scan)
    assert torch.equal(got[1][0], expected[1][0])
    assert expected[1][1].sum() > 10
    assert difference(got, expected) < 1e-12


def test_keeps_the_statistics_where_float32_is_short() -> None:
    """Targets c ± 1: re-associated sums would lose the residue."""
    lanes, steps = 12, 20_000
    centres = torch.tensor([1e2, 1e3, 1e4, 1e5, 1e6, 1e7], dtype=torch.float64).repeat(2)
    betas = torch.tensor([1e-2, 1e-4], dtype=torch.float32).repeat_interleave(6)
    signs = torch.randint(0, 2, (steps, lanes), generator=torch.Generator().manual_seed(3)) * 2 - 1
    targets = (centres + signs).float()  # exact

    def step(state: Any, y: Any, beta: Any) -> Any:
        return art(state, y[None], step_size=beta), y

    def run(dtype: torch.dtype) -> Any:
        start = init_state(1, dtype=dtype)._replace(shift=torch.zeros(1, dtype=dtype))
        state = vmap(lambda centre: start._replace(shift=start.shift + centre))(centres.to(dtype))
        scan = make_lane_scan("scan_lanes", step, state, targets.to(dtype), betas.to(dtype), shared=False)
        return native.run(scan)[0]

    narrow, wide = run(torch.float32), run(torch.float64)
    assert ((narrow.scale - wide.scale).abs() / wide.scale).max() < 1e-4
    mean = (narrow.shift.double() - wide.shift) + (narrow.residue.double() - wide.residue)
    assert (mean.abs() / wide.scale).max() < 1e-5


def test_lanes_are_bit_equal_for_any_number_of_lanes_and_threads() -> None:
    step = make_step("popart", "adam")
    scan = make_scan("popart", "adam", torch.float32, lanes=50, step=step)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native.run(scan))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_bit_equal(other, results[0])
    for lane in (0, 17, 49):  # alone, it stands first in a block of its own
        alone = native.run(part_of(scan, [lane]))
        assert_bit_equal(alone, (pick(results[0][0], lane, 0), pick(results[0][1], lane, 1)))


def test_a_lane_that_diverges_leaves_its_neighbours_alone() -> None:
    scan = make_scan("popart", "adam", torch.float32, lanes=20, step=(step := make_step("popart", "adam")))
    calm_carry, calm_ys = native.run(scan)
    for bad in (float("nan"), float("inf"), -1e38):
        y = scan.xs[1].clone()
        y[3, 5] = bad
        carry, ys = native.run(dataclasses.replace(scan, step=step, xs=(scan.xs[0], y)))
        others = [lane for lane in range(20) if lane != 5]
        assert_bit_equal(
            (pick(carry, others, 0), pick(ys, others, 1)), (pick(calm_carry, others, 0), pick(calm_ys, others, 1))
        )
        assert not torch.equal(ys["error"][3:, 5], calm_ys["error"][3:, 5])


def test_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def step(carry: Any, x: Any, rate: Any) -> Any:
        calls.append("trace")
        return carry + rate * x, carry * 2

    monkeypatch.setattr(native, "build", lambda source: calls.append("build") or build(source))
    for lanes, steps in ((3, 5), (40, 7), (1, 1)):
        carry, xs = torch.zeros(lanes, 2), torch.ones(steps, 2)
        scan = make_lane_scan("scan_lanes", step, carry, xs, torch.arange(float(lanes)), shared=True)
        carry, ys = native.run(scan)
        assert torch.equal(carry, steps * torch.arange(float(lanes))[:, None].expand(lanes, 2))
        assert ys.shape == (steps, lanes, 2)
    assert sorted(calls) == ["build", "trace"]


def test_a_kernel_on_disk_serves_the_next_process(tmp_path: Path) -> None:
    program = """
import sys, torch
from popart_func.engines import native
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native import build
if sys.argv[1] == "no compiler":
    build._compile = None
scan = make_lane_scan("scan_lanes", lambda c, x: (c + x, c), torch.zeros(3), torch.arange(4.0))
print(native.run(scan)[0].tolist())
"""
    environment = {**os.environ, "POPART_FUNC_CACHE": str(tmp_path / "cache")}
    for argument in ("a compiler", "no compiler"):
        command = [sys.executable, "-c", program, argument]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == "[6.0, 6.0, 6.0]\n"
    (library,) = (tmp_path / "cache").glob("*.so")
    assert library.suffix == ".so"
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path))
    with pytest.raises(PermissionError, match="only you may write to it"):
        cache_directory()


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


@pytest.mark.parametrize("damage", ["truncated", "empty", "zeros"])
def test_a_damaged_kernel_is_built_anew(damage: str, tmp_path: Path) -> None:
    """In a process of its own: loading it would be the end of this one."""
    program = (
        "import torch; from popart_func import scan\n"
        "print(scan(lambda c, x: (c + x, c), torch.tensor(0.0), torch.ones(3), engine='native')[0].item())"
    )
    tmp_path.chmod(0o700)
    environment = {**os.environ, "POPART_FUNC_CACHE": str(tmp_path)}

    def output() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert output() == "3.0"
    (kernel,) = tmp_path.glob("*.so")
    content = kernel.read_bytes()
    half = len(content) // 2
    kernel.write_bytes({"truncated": content[:4096], "empty": b"", "zeros": content[:half] + bytes(half)}[damage])
    assert output() == "3.0"
    assert len(kernel.read_bytes()) > half


def test_says_that_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "set CXX" in (native.why_not(torch.device("cpu")) or "")
    assert "not on meta" in (native.why_not(torch.device("meta")) or "")


def test_the_compiler_that_is_asked_for_is_taken_or_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    found = compiler()
    assert found is not None
    monkeypatch.setenv("CXX", f"{found[0]} -DEXTRA")
    assert compiler() == (found[0], "-DEXTRA")
    assert scan_lanes(lambda c, x: (c + 1, c), torch.zeros(1), length=1, engine="native")[0] == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX is 'no-such-compiler', which was not found" in (native.why_not(torch.device("cpu")) or "")


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path / name))
        with pytest.raises(native.BuildError, match="POPART_FUNC_CACHE must name a directory that can be made"):
            cache_directory()


def test_a_cache_that_can_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(native.UnsupportedError, match=r"no kernel can be kept in .*Read-only.*Set POPART_FUNC_CACHE"):
        scan_lanes(lambda c, x: (c + 23, c), torch.zeros(2), length=1, engine="native")


def test_a_loss_that_no_one_looks_at_is_not_computed() -> None:
    """The graph of its gradient has it nevertheless: for its shape."""

    def step(c: Any, x: Any) -> Any:
        return c - 0.1 * torch.func.grad(lambda c: (c * x).exp().sum())(c), ()

    scan = make_lane_scan("scan", step, torch.ones(3, 4), torch.ones(2), shared=True)
    graph = scan.graph()
    assert graph.operations["sum"] == 1
    assert not any(isinstance(part, Reduce) for part in lower(graph, 1, (False, True)).statements)
    assert difference(native.run(scan), eager.run(scan)) < 1e-6


def test_what_is_reduced_is_computed_in_a_loop_of_its_own_unless_it_is_short() -> None:
    def step(c: Any, x: Any) -> Any:
        deep = c
        for _ in range(12):
            deep = deep * 0.5 + x
        return c, (deep.sum(), deep.argmax(), (deep * 2).cumsum(0), (c * x).sum())

    scan = make_lane_scan("scan", step, torch.rand(3, 4), torch.ones(2), shared=True)
    statements = lower(scan.graph(), 1, (False, True)).statements
    reduced = [part.value for part in statements if isinstance(part, Reduce | ArgReduce | Scan)]
    assert [isinstance(value, Op) for value in reduced] == [False, False, True, True]
    assert all(value.depth <= 8 for value in reduced if isinstance(value, Op))
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


def test_reads_what_lanes_share_where_it_lies() -> None:
    """Inputs that all lanes share are neither copied nor spread; an expanded lane axis isn't either."""

    def step(carry: Any, x: Any) -> Any:
        shared, expanded, strided = x
        return carry + shared.sum() * expanded[0] - strided, carry.sum()

    time = torch.arange(6.0)
    expanded = time[:, None, None].expand(6, 21, 2)
    strided = torch.randn(21, 12)[:, ::2].T  # per lane, time last in memory
    xs = (torch.randn(6, 3), expanded, strided)
    scan = make_lane_scan("scan_lanes", step, torch.zeros(21, 2), xs, shared=(True, False, False))
    assert difference(native.run(scan), eager.run(scan)) < 1e-5


def test_carries_of_all_dtypes_that_swap_and_stay() -> None:
    def step(carry: Any, x: Any) -> Any:
        a, b, count, flag, same, ring = carry
        ring = torch.cat([ring[1:], a[None]])
        return (b, a + x, count + 1, ~flag, same, ring.scatter(0, count[None] % 4, b[None])), (a, flag, same, ring)

    carry = (
        torch.randn(18),
        torch.randn(18),
        torch.zeros(18, dtype=torch.int64),
        torch.arange(18) % 2 == 0,
        torch.randn(18, 3, dtype=torch.float64),
        torch.randn(18, 4),
    )
    scan = make_lane_scan("scan_lanes", step, carry, torch.randn(7), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def test_a_carry_of_no_elements() -> None:
    def step(c: Any, x: Any) -> Any:
        return (c[0] * 2, c[1] + x), (c[0].sum(), torch.cat([c[0], x[None]]))

    scan = make_lane_scan("scan", step, (torch.ones(3, 0, 2), torch.ones(3, 2)), torch.ones(4, 2), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def test_does_not_change_its_inputs() -> None:
    scan = make_scan("popart", "momentum", torch.float64, steps=3)
    before = [leaf.clone() for leaf in (*scan.carry, *scan.xs, *scan.hparams)]
    native.run(scan)
    assert_bit_equal([*scan.carry, *scan.xs, *scan.hparams], before)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
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


def part_of(scan: LaneScan, lanes: list[int]) -> LaneScan:
    return dataclasses.replace(
        scan,
        carry=tuple(leaf[lanes] for leaf in scan.carry),
        xs=tuple(leaf[:, lanes] for leaf in scan.xs),
        hparams=tuple(leaf[lanes] for leaf in scan.hparams),
        lanes=len(lanes),
    )


def pick(tree: Any, lanes: int | list[int], axis: int) -> Any:
    lanes = lanes if isinstance(lanes, list) else [lanes]
    return tree_map(lambda leaf: leaf.index_select(axis, torch.tensor(lanes)), tree)


def assert_bit_equal(first: Any, second: Any) -> None:
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert ((a == b) | ((a != a) & (b != b))).all()
