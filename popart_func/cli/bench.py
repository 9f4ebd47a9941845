"""``popart-func bench``: the speed of the engines beside JAX, and beside one PyTorch module per seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError

from popart_func.cli._parameters import Device, File, Picture, check_among, whole_number, words
from popart_func.display.table import make_table, print_table
from popart_func.engines import ENGINES
from popart_func.experiments.names import COMPETITORS, WORKLOAD_COMPETITORS, WORKLOAD_NAMES

if TYPE_CHECKING:
    from rich.console import Group

    from popart_func.experiments.bench import Result
    from popart_func.experiments.workload_bench import WorkloadResult

__all__ = ["bench"]

_MEASURED = tuple(dict.fromkeys((*ENGINES, *COMPETITORS, *WORKLOAD_COMPETITORS)))


def _check_measured(_: Any, names: Sequence[str] | None) -> None:
    check_among(names, _MEASURED)


def _check_workloads(_: Any, names: Sequence[str] | None) -> None:
    check_among(names, WORKLOAD_NAMES)


def bench(
    *,
    workloads: Annotated[
        tuple[str, ...] | None,
        words(
            validator=_check_workloads,
            help=f"Measure these instead, one or more of {', '.join(WORKLOAD_NAMES)}: on CPUs, beside JAX alone.",
        ),
    ] = None,
    lanes: Annotated[tuple[Annotated[int, whole_number(1)], ...] | None, words()] = None,
    engines: Annotated[
        tuple[str, ...] | None,
        words(
            validator=_check_measured,
            help=f"Which to measure, one or more of {', '.join(_MEASURED)}; by default all that run here.",
        ),
    ] = None,
    device: Device = "cpu",
    repeats: Annotated[int, whole_number(1)] = 5,
    json: File = None,
    plot: Picture = None,
) -> None:
    """Measure the speed of the engines beside JAX and PyTorch: Pop-Art on the paper's network, or other workloads.

    Measures every engine that runs here, JAX in two forms, JAX running the engines' own step (jax_traced), and one
    PyTorch module per seed in a Python loop: all in one run, and checked to compute the same. Prints nanoseconds per
    lane-step (one training step of one seed), the median of the repeats, without compiling. The slowest run a part of
    the stream of 5004 samples, and are marked.

    With --workloads, the sides of each size run in turn, and the table has their CPU time as well, arithmetic per
    second of it, and a mark at the engine that "auto" takes for 10,000 steps.

    Parameters
    ----------
    lanes
        How many seeds at once, one comparison each: 50 and 1000; with --workloads, those sizes that have so many, or
        all.
    device
        Where the engines run, and JAX if it has that device: cpu, cuda, cuda:1. One module per seed runs on the CPU.
    repeats
        How many timed runs, after a first one that compiles.
    json
        Also write the results to this file.
    plot
        Also measure the cost against lanes, steps, width and depth, and draw it to this file, such as costs.png.
    """
    import json as json_format

    from popart_func.display.progress import show_progress
    from popart_func.experiments import bench as benchmark

    if workloads is not None and (device != "cpu" or plot is not None):
        raise CycloptsError(msg="--workloads is measured on CPUs and has no picture: leave out --device and --plot.")
    here = (*ENGINES, *(COMPETITORS if workloads is None else WORKLOAD_COMPETITORS))
    if not set(engines or ()) <= set(here):
        beside = "without" if workloads is None else "with"
        raise CycloptsError(msg=f"--engines {beside} --workloads: choose from {', '.join(here)}.")
    results: Sequence[Result | WorkloadResult]
    with show_progress("results") as progress:
        if workloads is not None:
            from popart_func.experiments import workload_bench

            there = sorted({size["lanes"] for name in workloads for size in workload_bench.WORKLOADS[name].sizes})
            if not set(lanes or ()) <= set(there):
                raise CycloptsError(msg=f"--lanes: {', '.join(workloads)} run in {', '.join(map(str, there))} lanes.")
            results = workload_bench.compare_workloads(
                workloads,
                lanes=lanes,
                engines=engines,
                repeats=repeats,
                on_result=lambda result: progress.say(_result_line(result)),
                on_refusal=progress.say,
            )
            for workload in dict.fromkeys(workloads):
                print_table(_workload_table(workload, [row for row in results if row.workload == workload]))
        else:
            results = benchmark.compare(
                lanes or (50, 1000),
                engines=engines,
                device=device,
                repeats=repeats,
                on_result=lambda result: progress.say(_result_line(result)),
            )
            print_table(_table(results))
    if json is not None:
        json.write_text(json_format.dumps(benchmark.as_json(results), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {json}")
    if plot is not None:
        from popart_func.experiments import bench_plot, engine_costs

        bench_plot.costs(engine_costs.costs(device=device), plot)
        print(f"wrote {plot}")


def _result_line(result: Result | WorkloadResult) -> str:
    where = f"{result.workload}: {result.engine} on {result.device}, {result.lanes} lanes"
    return f"{where}: {result.ns_per_lane_step:,.0f} ns per lane-step"


def _table(results: Sequence[Result]) -> Group:
    sections = []
    for lanes in dict.fromkeys(result.lanes for result in results):
        rows = [result for result in results if result.lanes == lanes]
        jax = min((row.ns_per_lane_step for row in rows if row.engine in ("jax", "jax_lanes_last")), default=None)
        reference = min((row.ns_per_lane_step for row in rows if row.engine == "reference"), default=None)
        sections.append(
            [
                (
                    f"{row.lanes:,}",
                    row.engine + "*" * row.extrapolated,
                    row.device,
                    f"{row.ns_per_lane_step:,.{1 if row.ns_per_lane_step < 100 else 0}f}",
                    f"{row.spread:.0%}",
                    f"{row.compile_seconds:.1f}",
                    *(_times(other / row.ns_per_lane_step) if other else "" for other in (jax, reference)),
                )
                for row in rows
            ]
        )
    return make_table(
        ("lanes", "engine", "device", "ns", "spread", "compile", "vs JAX", "vs reference"),
        sections,
        words=("engine", "device"),
        title="Pop-Art on the paper's network: nanoseconds per lane-step, median",
        notes=[
            "x: how many times faster than the better JAX, than one module per seed",
            "spread: (slowest - fastest) / median; compile: seconds; * measured on a part",
        ],
    )


def _workload_table(workload: str, results: Sequence[WorkloadResult]) -> Group:
    from popart_func.experiments.workloads.peak import peak_flops

    sections = []
    for size, lanes in dict.fromkeys((row.size, row.lanes) for row in results):
        rows = [row for row in results if (row.size, row.lanes) == (size, lanes)]
        jax = [row for row in rows if row.engine in WORKLOAD_COMPETITORS]
        wall = min((row.ns_per_lane_step for row in jax), default=None)
        cpu = min((row.cpu_ns_per_lane_step for row in jax), default=None)
        section = [
            (
                row.engine + "*" * (row.engine == row.auto),
                _microseconds(row.ns_per_lane_step),
                _microseconds(row.cpu_ns_per_lane_step),
                f"{row.gflops:.3g}",
                _times(wall / row.ns_per_lane_step) if wall else "",
                _times(cpu / row.cpu_ns_per_lane_step) if cpu else "",
            )
            for row in rows
        ]
        heads = [(size, f"{lanes:,}"), *[("", "")] * (len(rows) - 1)]
        sections.append([(*head, *row) for head, row in zip(heads, section, strict=True)])
    return make_table(
        ("size", "lanes", "engine", "µs", "CPU µs", "GFLOP/s", "vs JAX", "CPU"),
        sections,
        words=("size", "engine"),
        wrapped="size",
        title=f"{workload}: microseconds per lane-step, median",
        notes=[
            "vs JAX, CPU: how many times faster than the better JAX, in wall time, in CPU time",
            f"GFLOP/s: for a second of CPU time; a core's peak is {1e-9 * peak_flops():.0f}",
            "*: what auto takes for 10,000 steps",
        ],
    )


def _microseconds(nanoseconds: float) -> str:
    value = 1e-3 * nanoseconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
