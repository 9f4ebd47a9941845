"""``popart-func bench``: the speed of the engines beside JAX and one PyTorch module per seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from popart_func.cli._parameters import Device, File, Picture, check_among, whole_number, words
from popart_func.display.table import make_table, print_table
from popart_func.engines import ENGINES
from popart_func.experiments.names import COMPETITORS

if TYPE_CHECKING:
    from rich.console import Group

    from popart_func.experiments.bench import Result

__all__ = ["bench"]

_MEASURED = (*ENGINES, *COMPETITORS)


def _check_measured(_: Any, names: Sequence[str] | None) -> None:
    check_among(names, _MEASURED)


def bench(
    *,
    lanes: Annotated[
        tuple[Annotated[int, whole_number(1)], ...],
        words(),
    ] = (50, 1000),
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
    """Measure the speed of the engines beside JAX and PyTorch: Pop-Art on the paper's network, streams of 5004 samples.

    Measures every engine that runs here, JAX in two forms, JAX running the engines' own step (jax_traced), and one
    PyTorch module per seed in a Python loop: all in one run, and checked to compute the same. Prints nanoseconds per
    lane-step (one training step of one seed), the median of the repeats, without compiling. The slowest run a part of
    the stream, and are marked.

    Parameters
    ----------
    lanes
        How many seeds at once, one comparison each.
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

    with show_progress("results") as progress:
        results = benchmark.compare(
            lanes,
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


def _result_line(result: Result) -> str:
    return f"{result.engine} on {result.device}, {result.lanes} lanes: {result.ns_per_lane_step:,.0f} ns per lane-step"


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


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
