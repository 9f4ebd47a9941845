"""The native engine's CUDA half: that its source compiles, and what it computes.

Where there is no device, the very same source is compiled for the host; see `cuda_emulation`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import native_scenarios as scenarios
import op_families
import pytest
import torch
from cuda_emulation import SHARED, OnHost, emulated
from loop_programs import ON_NATIVE, PROGRAMS, close, in_one_step, random_programs, rows_of_all_lengths
from loop_programs import stacks_become_the_carry as stacks
from native_scenarios import LANES, assert_bit_equal, difference, make_scan
from ppo import ppo
from random_steps import random_scan
from torch import vmap
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_leaves, tree_map

import popart_func as pf
from popart_func import optim
from popart_func.engines import eager, native, scan_lanes
from popart_func.engines.compiler import compiler
from popart_func.engines.lane_scan import LaneScan, make_lane_scan
from popart_func.engines.native.cuda.nvrtc import OPTIONS, compile_cubin, why_no_nvrtc
from popart_func.engines.native.cuda.source import CudaSource
from popart_func.engines.native.cuda.target import CudaTarget
from popart_func.engines.native.engine import TARGETS
from popart_func.engines.native.target import Launch
from popart_func.learners import popart_learner
from popart_func.models import UnifiedModel, init_lanes, stateless
from popart_func.pop_art import popart

pytestmark = pytest.mark.usefixtures("unchecked")


def on_device(run: Callable[[LaneScan], Any], scan: LaneScan) -> Any:
    device = torch.device("cuda", torch.cuda.current_device())
    with device:  # what the step makes itself lies there too
        result = run(to(scan, device))
    assert all(leaf.device == device for leaf in tree_leaves(result[0]))
    return tree_map(torch.Tensor.cpu, result)


def to(scan: LaneScan, device: torch.device) -> LaneScan:
    parts = {name: tuple(leaf.to(device) for leaf in getattr(scan, name)) for name in ("carry", "xs", "hparams")}
    return dataclasses.replace(scan, device=device, **parts)


def ways(*names: str) -> list[Any]:
    """The names, of which each is a way on the host, and the same on a device."""
    return [*names, *(pytest.param(f"{name} on a device", marks=pytest.mark.gpu) for name in names)]


ROOM = {"thread": 1 << 21, "team": SHARED, "small team": 1000}
"""Bytes of shared memory that an emulated block has: enough for threads in all tests, next to none for a small team."""


def take(way: str, patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Has `native.run` run the CUDA kernel: on the host or on a device, a lane by a thread or by a team."""
    name = way.removesuffix(" on a device")
    if name != way:
        patch.setattr(CudaTarget, "variant", lambda self, scan, schedule: name.split()[-1])
        if name == "small team":
            patch.setattr("popart_func.engines.native.cuda.target.shared_memory", lambda device: ROOM[name])
        patch.setattr(native, "run", functools.partial(on_device, native.run))
    elif compiler() is None:
        pytest.skip("no C++ compiler to run the kernel on the host")
    else:
        build = functools.partial(emulated, directory=directory)
        patch.setitem(TARGETS, "cpu", OnHost(build, name != "thread", ROOM[name]))


@pytest.fixture(params=ways("thread", "team"))
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    take(request.param, monkeypatch, tmp_path)
    return request.param


# What the CPU's kernel must do, the CUDA kernel must.


@pytest.mark.parametrize(("dtype", "shape"), scenarios.FLOATING_POINT)
def test_floating_point_ops(engine: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    scenarios.floating_point_ops_agree(dtype, shape)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_ops(engine: str, dtype: torch.dtype) -> None:
    scenarios.integer_ops_agree(dtype)


def test_movement(engine: str) -> None:
    scenarios.movement_agrees()
    scenarios.movement_of_what_all_lanes_share_agrees()


def test_agrees_with_eager_in_float64(engine: str) -> None:
    cases = [("popart", "adam"), ("normalized_sgd", "nesterov"), ("art", "momentum"), ("sgd", "sgd")]
    scenarios.learners_agree_with_eager(cases, torch.float64, 1e-12)


def test_agrees_with_eager_in_float32(engine: str) -> None:
    scenarios.learners_agree_in_float32()


def test_agrees_on_the_papers_network(engine: str) -> None:
    scan = paper_scan(torch.float64)
    assert captured(lambda: native.run(scan)).shared == 8 * 32 * (16 * 10 + 3 * 10 * 10), "its matrices are shared"
    assert difference(native.run(scan), eager.run(scan)) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_agrees_on_batches_of_several_tasks(engine: str, reduction: str) -> None:
    scenarios.batches_of_several_tasks_agree(reduction)


def test_agrees_on_a_learner_with_its_environment_inside(engine: str) -> None:
    scenarios.a_learner_with_its_environment_inside_agrees()


def test_keeps_the_statistics_where_float32_is_short(engine: str) -> None:
    scenarios.the_statistics_are_kept_where_float32_is_short()


def test_lanes_are_bit_equal_for_any_number_of_lanes(engine: str) -> None:
    scenarios.lanes_are_bit_equal_for_any_number_of_lanes_and_threads()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to run the kernel on the host")
def test_threads_and_teams_compute_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = []
    for team in (False, True):
        monkeypatch.setitem(TARGETS, "cpu", OnHost(functools.partial(emulated, directory=tmp_path), team))
        results.append(native.run(paper_scan()))
    assert_bit_equal(*results)


def test_a_lane_that_diverges_leaves_its_neighbours_alone(engine: str) -> None:
    scenarios.a_lane_that_diverges_leaves_its_neighbours_alone()


def test_reads_inputs_through_their_strides(engine: str) -> None:
    scenarios.shared_inputs_are_read_where_they_lie()


def test_carries_of_all_dtypes_that_swap_and_stay(engine: str) -> None:
    scenarios.carries_of_all_dtypes_swap_and_stay()


def test_a_carry_that_is_read_backwards_while_it_is_written(engine: str) -> None:
    scenarios.a_carry_that_is_read_backwards_while_it_is_written_agrees()


def test_does_not_change_its_inputs(engine: str) -> None:
    scenarios.inputs_are_not_changed()


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda c, x: (c + c[x.long() + 3], c), IndexError, r"out of range.*test_native_cuda.py:\d+"),
        (lambda c, x: (c, c[:1] + 3 // x.int()), ZeroDivisionError, r"divided by zero.*test_native_cuda.py:\d+"),
    ],
)
def test_says_what_is_wrong_and_where(engine: str, step: Any, error: type[Exception], message: str) -> None:
    scan = make_lane_scan("scan_lanes", step, torch.zeros(2, 2), torch.zeros(3), shared=True)
    with pytest.raises(error, match=message):
        native.run(scan)


def test_a_team_runs_what_is_too_large_for_threads_and_has_global_memory_for_the_rest() -> None:
    def source_of(size: int) -> CudaSource:
        step = lambda c, x: (c + x, x)  # noqa: E731
        scan = make_lane_scan("scan_lanes", step, torch.zeros(2, size), torch.zeros(3), shared=True)
        return captured(lambda: native.run(scan))

    assert not source_of(1000).team
    assert source_of(2000).team
    assert not source_of(2000).scratch
    assert source_of(100_000).scratch == 400_000
    assert source_of(100_000).shared == 16


def loops_of_programs(names: tuple[str, ...]) -> LaneScan:
    step, carry = in_one_step({name: PROGRAMS[name] for name in names})
    return make_lane_scan("scan", step, carry, None, length=1)


def loops_over_stacks() -> LaneScan:
    """Over stacks of the carry, of xs and of constants, for two steps; a new carry that loops give."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(8))
    x, rows, before = draw(2, 3, 7, 20), (draw(3, 5), draw(3, 20)), tuple(draw(3, 5) for _ in range(4))

    def step(c: Any, x: Any, hparams: Any) -> Any:
        rows, ys = rows_of_all_lengths(c[0], x, hparams)
        return (rows, stacks(c[1], x[0, 0])[0]), ys

    return make_lane_scan("scan", step, (rows, before), x, torch.tensor([0.5, 1.1, 2.0]), shared=False)


@pytest.mark.parametrize("way", [*ways("thread"), pytest.param("team", marks=pytest.mark.slow), ways("team")[1]])
def test_loops_inside_a_step(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take(way, monkeypatch, tmp_path)
    scan = loops_of_programs(ON_NATIVE)
    close(native.run(scan), eager.run(scan))


@pytest.mark.parametrize("way", ways("thread", "team", "small team"))
def test_loops_over_stacks(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take(way, monkeypatch, tmp_path)
    scan = loops_over_stacks()
    close(native.run(scan), eager.run(scan), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(8))
def test_all_programs_with_loops(engine: str, first: int) -> None:
    scan = loops_of_programs(tuple(PROGRAMS)[first::8])
    close(native.run(scan), eager.run(scan))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 300, 5))
def test_random_programs_with_loops(engine: str, first: int) -> None:
    step, carry = in_one_step(random_programs(range(first, first + 5)))
    scan = make_lane_scan("scan", step, carry, None, length=1)
    close(native.run(scan), eager.run(scan), 1e-8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted", "ignore:index_reduce")
@pytest.mark.parametrize("family", op_families.FAMILIES)
def test_families(engine: str, family: str) -> None:
    scenarios.families_agree([family], torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("way", ways("thread", "team", "small team"))
def test_random_steps(way: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take(way, monkeypatch, tmp_path)
    scan = random_scan(seed, torch.float64, lanes=5)
    assert difference(native.run(scan), eager.run(scan)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("way", ["team", "small team"])
def test_an_update_of_ppo_and_a_gradient_through_time(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scans = [ppo_scan(), gated_scan(60)]
    expected = [native.run(scan) for scan in scans]  # of the CPU: `test_ppo` and `test_loops` compare it with eager
    take(way, monkeypatch, tmp_path)
    for scan, result in zip(scans, expected, strict=True):
        assert difference(native.run(scan), result) < 1e-5


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to run the kernel on the host")
def test_the_emulation_notices_a_team_that_does_not_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_meetings(source: CudaSource) -> Launch:
        return emulated(source._replace(text=source.text.replace("MEET;", "")), tmp_path)

    step = lambda c, x: (torch.tanh(c.flip(0).cumsum(0)) + x, c.sum())  # noqa: E731
    scan = make_lane_scan("scan", step, torch.randn(4, 40), torch.randn(9), shared=True)
    monkeypatch.setitem(TARGETS, "cpu", OnHost(without_meetings, team=True))
    assert difference(native.run(scan), eager.run(scan)) > 0.1


# That the source compiles for a device.


class Captured(Exception):  # noqa: N818
    def __init__(self, source: CudaSource) -> None:
        self.source = source


def captured(run: Callable[[], Any], team: bool = False, shared: int = SHARED) -> CudaSource:
    """The source of the kernel that a run would need."""

    def build(source: CudaSource) -> Launch:
        raise Captured(source)

    with pytest.MonkeyPatch.context() as patch:
        for device in TARGETS:  # where there is one, on the device
            patch.setitem(TARGETS, device, OnHost(build, team, shared))
        try:
            run()
        except Captured as caught:
            return caught.source
    raise AssertionError("no kernel was asked for")


def paper_scan(dtype: torch.dtype = torch.float32) -> LaneScan:
    """Pop-Art on the paper's network, 16-10-10-10-10-1."""
    make = functools.partial(UnifiedModel, 16, 10, 1)
    learner = popart_learner(stateless(make()), optim.sgd(10**-2.5), popart(1, 10**-0.5))
    state = vmap(learner.init)({name: leaf.to(dtype) for name, leaf in init_lanes(make, range(LANES)).items()})

    def step(state: Any, x: Any) -> Any:
        state, info = learner.update(state, (x, x.sum(-1, keepdim=True)))
        return state, info.error

    generator = torch.Generator().manual_seed(2)
    return make_lane_scan("scan_lanes", step, state, torch.randn(9, LANES, 16, generator=generator, dtype=dtype))


def ppo_scan() -> LaneScan:
    """An update of PPO: four loops, two of them nested."""
    init, update = ppo(1.0, with_popart=True, updates=200)
    carry = tree_map(lambda *leaves: torch.stack(leaves), *map(init, range(3)))
    return make_lane_scan("scan", update, carry, torch.zeros(1), shared=True)


def gated_scan(length: int) -> LaneScan:
    """Gradient descent through time on a gated recurrent cell."""
    cell = torch.nn.GRUCell(3, 8)

    def step(params: Any, xs: Any) -> Any:
        def loss(params: Any) -> Any:
            def one(h: Any, x: Any) -> Any:
                h = functional_call(cell, params, (x, h))
                return h, h.square().sum()

            return pf.scan(one, torch.zeros(8), xs)[1].mean()

        slopes, value = grad_and_value(loss)(params)
        return {name: leaf - 0.1 * slopes[name] for name, leaf in params.items()}, value

    params = init_lanes(functools.partial(torch.nn.GRUCell, 3, 8), range(3))
    xs = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(9))
    return make_lane_scan("scan", step, params, xs, shared=True)


KERNELS: dict[str, Callable[[], Any]] = {
    "paper": lambda: native.run(paper_scan()),
    "adam_float64": lambda: native.run(make_scan(("popart", "adam"), dtype=torch.float64)),
    "environment": scenarios.a_learner_with_its_environment_inside_agrees,
    "floating_point": lambda: scenarios.floating_point_ops_agree(torch.float32, (3, 4)),
    "double": lambda: scenarios.floating_point_ops_agree(torch.float64, (5, 1)),
    "integers": lambda: scenarios.integer_ops_agree(torch.int64),
    "movement": scenarios.movement_agrees,
    "loops": lambda: native.run(loops_of_programs(ON_NATIVE)),
}
SLOW: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: scenarios.families_agree([name], torch.float32) for name in op_families.FAMILIES},
    "stacks": lambda: native.run(loops_over_stacks()),
    "ppo": lambda: native.run(ppo_scan()),
    "gated": lambda: native.run(gated_scan(60)),
    **{f"programs {n}": lambda n=n: native.run(loops_of_programs(tuple(PROGRAMS)[n::8])) for n in range(8)},
}
TABLES = ("floating_point", "double", "integers", "movement", "loops", *SLOW)
"""Kernels of many ops, whose speed says nothing: nvcc optimizes them less, in a quarter of the time."""

NVCC, NO_NVRTC = shutil.which("nvcc"), why_no_nvrtc()


def test_lists_the_source_of_a_device() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "cpu", OnHost(lambda source: pytest.fail("nothing is built"), team=True))
        shown = native.listing(paper_scan())
    assert (shown.language, shown.variant) == ("CUDA C++", "team on the host, 232448 bytes")
    assert "run_lanes(const __grid_constant__ KernelArguments run)" in shown.source
    state = paper_scan().carry
    assert shown.state_bytes == 4 * sum(leaf[0].numel() for leaf in state) == 4 * 517


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("kernel", "team"),
    [
        *((kernel, False) for kernel in KERNELS),
        *((kernel, True) for kernel in ("paper", "integers", "movement")),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("loops", True), *product(SLOW, (False, True)))),
    ],
)
def test_nvcc_compiles(kernel: str, team: bool, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    source = captured({**KERNELS, **SLOW}[kernel], team, ROOM["team" if team else "thread"])
    (tmp_path / "kernel.cu").write_text(source.text)
    command = ["nvcc", *OPTIONS, "-arch=sm_90", "-Xptxas", "-v", "-Werror", "all-warnings", "-diag-suppress", "177"]
    command += ["-Xcicc", "-O1", "-Xptxas", "-O1"] if kernel in TABLES else []
    command += ["-cubin", "-o", str(tmp_path / "kernel.cubin"), str(tmp_path / "kernel.cu")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    used = {
        name: int(number)
        for name, pattern in {
            "registers": r"Used (\d+) reg",
            "stack": r"(\d+) bytes stack",
            "spills": r"(\d+) bytes spill s",
        }.items()
        for number in re.findall(pattern, result.stderr)[:1]
    }
    record_property("kernel", f"{kernel}, {source.shared} bytes of shared memory: {used}")
    print(f"{kernel}: {source.threads} threads, {source.shared} bytes of shared memory, {used}")
    assert used["registers"] <= 255
    if kernel == "paper":
        assert used["stack"] <= 64  # the state in shared memory and in registers


@pytest.mark.skipif(NO_NVRTC is not None, reason=str(NO_NVRTC))
@pytest.mark.parametrize("kernel", ["paper", "adam_float64", "movement"] if NVCC else KERNELS)
def test_nvrtc_compiles(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path / "cache"))
    source = captured(KERNELS[kernel])
    image = compile_cubin(source.text, "sm_90")
    assert image.startswith(b"\x7fELF")
    (kept,) = (tmp_path / "cache").glob("*.cubin")
    assert kept.read_bytes() == image
    assert kept.with_suffix(".cu").read_text() == source.text
    kept.write_bytes(b"kept")
    assert compile_cubin(source.text, "sm_90") == b"kept"


@pytest.mark.skipif(NO_NVRTC is not None, reason=str(NO_NVRTC))
def test_nvrtc_says_what_it_refuses() -> None:
    with pytest.raises(native.BuildError, match=r"(?s)NVRTC .*sm_90.* failed:.*nonsense"):
        compile_cubin("nonsense;", "sm_90")


def test_reads_of_neighbouring_threads_are_neighbours() -> None:
    """A [time, lanes] input and output: the address of a lane is its number, so that a warp touches one line."""
    xs = torch.zeros(4, LANES)
    source = captured(
        lambda: native.run(make_lane_scan("scan_lanes", lambda c, x: (c + x, c), torch.zeros(LANES), xs, shared=False))
    )
    assert "first * run.lane_strides[1]" in source.text
    assert "(time * run.lanes + first) * 1" in source.text
    assert not source.shared
    assert not source.checked


# Where it can't run, it says why.


def test_says_why_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.why_not(device) == "this build of PyTorch has no CUDA."
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not(device) == "PyTorch finds no CUDA device."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert native.why_not(torch.device("cuda", 1)) == "there is no cuda:1."
    monkeypatch.setattr("popart_func.engines.native.cuda.nvrtc._library", lambda: None)
    assert "pip install nvidia-cuda-nvrtc" in str(native.why_not(device))


# On a device.


@pytest.mark.gpu
def test_is_available_where_a_device_is() -> None:
    """The loud one: PyTorch's CUDA builds bring NVRTC along, and it is found."""
    assert native.why_not(torch.device("cuda")) is None


@pytest.mark.gpu
def test_scan_lanes_runs_on_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())

    def step(carry: Any, x: Any, hparams: Any) -> Any:
        own, common = x
        weight = carry["weight"] * (1 - hparams["rate"]) + torch.outer(own, common) * hparams["rate"]
        return {"weight": weight}, {"norm": weight.square().sum().sqrt(), "argmax": weight.flatten().argmax()}

    for lanes in (1, 33, 1000, 20_000):
        own = torch.randn(50, lanes, 5, dtype=torch.float64, device=device)
        common = torch.randn(50, 7, dtype=torch.float64, device=device)
        rates = {"rate": torch.linspace(0.01, 0.5, lanes, dtype=torch.float64, device=device)}
        carry = {"weight": torch.randn(lanes, 5, 7, dtype=torch.float64, device=device)}
        arguments = (step, carry, (own, common))
        expected = scan_lanes(*arguments, hparams=rates, shared=(False, True), engine="eager")
        got = scan_lanes(*arguments, hparams=rates, shared=(False, True), engine="native")
        again = scan_lanes(*arguments, hparams=rates, shared=(False, True), engine="native")
        assert all(leaf.device == device for leaf in tree_leaves(got))
        assert difference(got, expected) < 1e-12
        assert_bit_equal(got, again)


@pytest.mark.gpu
def test_few_lanes_are_bit_equal_to_the_first_of_many() -> None:
    """Teams run the few, threads the many."""
    scan = to(paper_scan(), torch.device("cuda", torch.cuda.current_device()))
    repeat = torch.arange(20_000, device=scan.device) % LANES
    carry, xs = tuple(leaf[repeat] for leaf in scan.carry), tuple(leaf[:, repeat] for leaf in scan.xs)
    many = native.run(dataclasses.replace(scan, carry=carry, xs=xs, lanes=20_000))
    assert_bit_equal((tree_map(lambda leaf: leaf[:LANES], many[0]), many[1][:, :LANES]), native.run(scan))


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    scan = to(paper_scan(), torch.device("cuda", torch.cuda.current_device()))
    expected = native.run(scan)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        xs = tuple(leaf.clone() for leaf in scan.xs)
        got = native.run(dataclasses.replace(scan, xs=xs))
    torch.cuda.synchronize()
    assert_bit_equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [10, 24, 64])
def test_agrees_for_lanes_of_any_size(width: int) -> None:
    """Teams of one warp and of several."""
    device = torch.device("cuda", torch.cuda.current_device())

    def step(weight: Any, x: Any) -> Any:
        y = torch.tanh(weight @ x)
        return weight * 0.99 + torch.outer(y, x) / width, y.sum()

    weight = torch.randn(300, width, width, dtype=torch.float64, device=device) / width
    x = torch.randn(40, width, dtype=torch.float64, device=device)
    scan = make_lane_scan("scan_lanes", step, weight, x, shared=True)
    assert difference(native.run(scan), eager.run(scan)) < 1e-12


def test_kernels_take_no_type_but_eight_bytes_each() -> None:
    """`pack` relies on it."""
    source = captured(lambda: native.run(paper_scan())).text
    (members,) = re.findall(r"struct KernelArguments \{(.*?)\};", source, re.DOTALL)
    types = {line.split()[0] for line in members.strip().splitlines()}
    assert types <= {"const", "void*", "int64_t", "int32_t*", "char*"}
