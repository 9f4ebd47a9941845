"""Benchmark of workloads: engines beside JAX on steps that people run, alternately in one process.

`compare_workloads` gives each engine and two forms in JAX the same first parameters and inputs, checks that their
outputs agree, runs each once to compile, and then all of them in turn. *Wall* is the time that passes, *CPU* the time
that all threads of the process work, which other work on the machine changes less; medians count. JAX runs as
``jit(vmap(scan))``, and as the same with its lanes sharded over as many devices as PyTorch has threads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from popart_func.engines import ENGINES, UnsupportedError, available_engines, scan_lanes
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.selection import choose_engines
from popart_func.experiments.names import WORKLOAD_COMPETITORS, WORKLOAD_NAMES
from popart_func.experiments.workloads import catch, conv, ensemble, gru, mlp, ppo, replay
from popart_func.experiments.workloads.case import Case

__all__ = ["AUTO_STEPS", "WORKLOADS", "Workload", "WorkloadResult", "compare_workloads"]


class Workload(NamedTuple):
    """A workload: what makes a case of it, and the sizes that are measured, each with its ``"lanes"``."""

    case: Callable[..., Case]
    sizes: tuple[Mapping[str, Any], ...]


WORKLOADS: dict[str, Workload] = {
    "regression": Workload(mlp.case, mlp.REGRESSION),
    "mlp": Workload(mlp.case, mlp.MLP),
    "catch": Workload(catch.case, catch.SIZES),
    "replay": Workload(replay.case, replay.SIZES),
    "ppo": Workload(ppo.case, ppo.SIZES),
    "ensemble": Workload(ensemble.case, ensemble.SIZES),
    "conv": Workload(conv.case, conv.SIZES),
    "gru": Workload(gru.case, gru.SIZES),
}
"""The workloads by the names that `names.WORKLOAD_NAMES` lists."""

AUTO_STEPS = 10_000
"""The number of steps for which `WorkloadResult.auto` is what ``engine="auto"`` takes."""

Run = Callable[[], np.ndarray]


class WorkloadResult(NamedTuple):
    """One measurement.

    Attributes:
        workload: one of `names.WORKLOAD_NAMES`.
        size: the sizes of network and batch, in words.
        lanes: the number of lanes.
        steps: the number of steps in a run.
        engine: one of the engines, or one of `names.WORKLOAD_COMPETITORS`.
        device: where it ran, ``"cpu"``.
        ns_per_lane_step: wall time, the median of the repeats, without compiling.
        cpu_ns_per_lane_step: the same in CPU time, of all threads.
        compile_seconds: how much longer the first run took than the median.
        spread: (slowest − fastest) / median of the repeats, wall time.
        gflops: 10⁹ additions and multiplications in matrix products for a second of CPU time.
        auto: the engine that ``engine="auto"`` takes first in a run of `AUTO_STEPS`.
    """

    workload: str
    size: str
    lanes: int
    steps: int
    engine: str
    device: str
    ns_per_lane_step: float
    cpu_ns_per_lane_step: float
    compile_seconds: float
    spread: float
    gflops: float
    auto: str


def compare_workloads(
    workloads: Iterable[str] = WORKLOAD_NAMES,
    *,
    lanes: Iterable[int] | None = None,
    engines: Iterable[str] | None = None,
    repeats: int = 5,
    on_result: Callable[[WorkloadResult], None] | None = None,
    on_refusal: Callable[[str], None] | None = None,
) -> list[WorkloadResult]:
    """Measures engines and JAX side by side on workloads, on CPUs.

    Args:
        workloads: their names.
        lanes: only the sizes with these numbers of lanes, each of which some size must have; by default all.
        engines: the names of engines and competitors; by default `native`, `inductor` and JAX where they run here.
        repeats: the number of timed runs, after a first one that compiles.
        on_result: called with each result as it comes.
        on_refusal: called with a sentence where an engine does not support a workload.

    Returns:
        The results, engine by engine for each size of each workload.

    Raises:
        ValueError: a workload or an engine is unknown, or no size has a number of lanes.
        ModuleNotFoundError: a competitor needs jax and optax, which are not installed.
        RuntimeError: two sides compute something else.
    """
    has_jax = all(importlib.util.find_spec(name) is not None for name in ("jax", "optax"))
    if engines is None:
        able = [name for name, reason in available_engines("cpu").items() if reason is None and name != "eager"]
        names = [*able, *(WORKLOAD_COMPETITORS if has_jax else ())]
    else:
        names = list(engines)
    for name in names:
        if name not in (*ENGINES, *WORKLOAD_COMPETITORS):
            allowed = [*ENGINES, *WORKLOAD_COMPETITORS]
            raise ValueError(f"compare_workloads: `engines` must be among {allowed}, got {name!r}.")
        if name in WORKLOAD_COMPETITORS and not has_jax:
            advice = "pip install 'popart-func[jax]' optax"
            raise ModuleNotFoundError(f"compare_workloads: {name!r} needs jax and optax: {advice}", name="jax")
    chosen = list(dict.fromkeys(workloads))
    for workload in chosen:
        if workload not in WORKLOADS:
            raise ValueError(f"compare_workloads: `workloads` must be among {list(WORKLOADS)}, got {workload!r}.")
    found = {size["lanes"] for workload in chosen for size in WORKLOADS[workload].sizes}
    wanted = found if lanes is None else set(lanes)
    if not wanted <= found:
        raise ValueError(
            f"compare_workloads: `lanes` must be among {sorted(found)}, which {', '.join(chosen)} have, got "
            f"{sorted(wanted - found)}."
        )
    _ask_for_devices(names)
    results = []
    for workload in chosen:
        make, sizes = WORKLOADS[workload]
        for size in sizes:
            if size["lanes"] in wanted:
                for result in _measure(workload, make(**size), names, repeats, on_refusal):
                    results.append(result)
                    if on_result is not None:
                        on_result(result)
    return results


class _Side:
    """One way to run a case, with the times of its runs."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run = name, run
        self.walls: list[float] = []
        self.cpus: list[float] = []
        started = time.perf_counter()
        self.output = run()
        self.first = time.perf_counter() - started

    def once(self) -> None:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        self.run()
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(_cpu_seconds() - cpu)


def _measure(
    workload: str, case: Case, names: Iterable[str], repeats: int, on_refusal: Callable[[str], None] | None
) -> Iterator[WorkloadResult]:
    sides = []
    for name in names:
        if name == "jax_sharded" and not _shards(case.lanes):
            continue
        try:
            sides.append(_Side(name, _runner(case, name)))
        except UnsupportedError as error:
            if on_refusal is not None:
                on_refusal(f"{workload}, {case.size}: {name} refuses it: {error}")
    for side in sides[1:]:
        _check_same(workload, case, sides[0], side)
    for _ in range(repeats):
        for side in sides:
            side.once()
    auto, lane_steps = _auto(case), case.lanes * case.steps
    for side in sides:
        wall, cpu = statistics.median(side.walls), statistics.median(side.cpus)
        yield WorkloadResult(
            workload=workload,
            size=case.size,
            lanes=case.lanes,
            steps=case.steps,
            engine=side.name,
            device="cpu",
            ns_per_lane_step=1e9 * wall / lane_steps,
            cpu_ns_per_lane_step=1e9 * cpu / lane_steps,
            compile_seconds=max(0.0, side.first - wall),
            spread=(max(side.walls) - min(side.walls)) / wall,
            gflops=1e-9 * case.flops * lane_steps / cpu,
            auto=auto,
        )


def _runner(case: Case, name: str) -> Run:
    if name in WORKLOAD_COMPETITORS:
        return _jax_runner(case, torch.get_num_threads() if name == "jax_sharded" else 1)
    return lambda: scan_lanes(case.step, case.start, case.xs, length=case.steps, shared=False, engine=name)[1].numpy()


def _jax_runner(case: Case, devices: int) -> Run:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    form = case.jax()
    run = jax.jit(jax.vmap(form.one_lane, in_axes=(0, 1)))
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), ("lanes",))
    start = jax.device_put(form.start, NamedSharding(mesh, PartitionSpec("lanes")))
    xs = jax.device_put(form.xs, NamedSharding(mesh, PartitionSpec(None, "lanes")))

    def run_once() -> np.ndarray:
        outputs = jax.block_until_ready(run(start, xs))
        return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs).T

    return run_once


def _ask_for_devices(names: Iterable[str]) -> None:
    """Asks JAX for as many CPU devices as there are threads, if it has not begun to run; `_shards` sees what came."""
    if "jax_sharded" in names:
        import jax

        try:
            jax.config.update("jax_num_cpu_devices", torch.get_num_threads())
        except RuntimeError:  # JAX runs already
            return


def _shards(lanes: int) -> bool:
    import jax

    threads = torch.get_num_threads()
    return 1 < threads <= len(jax.devices("cpu")) and lanes % threads == 0


def _check_same(workload: str, case: Case, one: _Side, other: _Side) -> None:
    """Raises unless two sides give the same outputs, up to rounding that has grown for some steps."""
    first, second = one.output[: case.checked], other.output[: case.checked]
    difference = float(np.abs(first - second).max() / np.abs(first).max())
    if not difference < 1e-3:
        raise RuntimeError(
            f"compare_workloads: {workload}, {case.size}: {other.name} must compute what {one.name} does, got a "
            f"relative difference of {difference:.2g}."
        )


def _auto(case: Case) -> str:
    scan = make_lane_scan("compare_workloads", case.step, case.start, case.xs, length=case.steps, shared=False)
    return choose_engines(dataclasses.replace(scan, steps=AUTO_STEPS)).engines[0]


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
