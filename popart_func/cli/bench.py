"""``popart-func bench``: the engines measured against what others would write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from popart_func.cli.parameters import Device, File, Picture, check_among, whole_number, words
from popart_func.engines import ENGINES

if TYPE_CHECKING:
    from rich.console import Group

    from popart_func.experiments.bench import Result

__all__ = ["bench"]

_BENCHED = (*ENGINES, "jax", "jax_traced", "jax_lanes_last", "reference")
_BENCHED_HELP = f"Which to measure, one or more of {', '.join(_BENCHED)}; by default all that run here."


def _check_benched(_: Any, names: Sequence[str] | None) -> None:
    check_among(names, _BENCHED)


def bench(
    *,
    lanes: Annotated[
        tuple[Annotated[int, whole_number(1)], ...],
        words(),
    ] = (50, 1000),
    engines: Annotated[
        tuple[str, ...] | None,
        words(validator=_check_benched, help=_BENCHED_HELP),
    ] = None,
    device: Device = "cpu",
    repeats: Annotated[int, whole_number(1)] = 5,
    json: File = None,
    plot: Picture = None,
) -> None:
    """Measure the engines against what others would write: Pop-Art on the paper's network, streams of 5004 samples.

    Every engine that runs here, JAX in two forms, JAX running the engines' own step (jax_traced), and one PyTorch
    module per seed in a Python loop, all in this run and checked to compute the same. Prints nanoseconds per lane-step
    (one training step of one seed), the median of the repeats, compile time apart. The slowest are measured on a part,
    and marked.

    Parameters
    ----------
    lanes
        How many seeds at once, one comparison each.
    device
        Where the engines run, and JAX if it has that device: cpu, cuda, cuda:1. One module per seed runs on the CPU.
    repeats
        How many runs after the first.
    json
        Also write the results to this file.
    plot
        Also measure the cost against lanes, steps, width and depth, and draw it to this file, such as costs.png.
    """
    import json as json_format

    from rich.console import Console

    from popart_func.experiments import bench as benchmark

    console, progress = Console(), Console(stderr=True)
    results = benchmark.compare(
        lanes,
        engines=engines,
        device=device,
        repeats=repeats,
        on_result=lambda result: progress.print(_result_line(result), highlight=False),
    )
    console.print(_table(results), highlight=False)
    if json is not None:
        json.write_text(json_format.dumps(benchmark.as_json(results), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {json}")
    if plot is not None:
        from popart_func.experiments.plot import costs

        costs(benchmark.costs(device=device), plot)
        print(f"wrote {plot}")


def _result_line(result: Result) -> str:
    return f"{result.engine} on {result.device}, {result.lanes} lanes: {result.ns_per_lane_step:,.0f} ns per lane-step"


def _table(results: Sequence[Result]) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("lanes", "engine", "device", "ns", "spread", "compile", "vs JAX", "vs reference"):
        table.add_column(name, justify="left" if name in ("engine", "device") else "right", no_wrap=True)
    for lanes in dict.fromkeys(result.lanes for result in results):
        rows = [result for result in results if result.lanes == lanes]
        jax = min((row.ns_per_lane_step for row in rows if row.engine in ("jax", "jax_lanes_last")), default=None)
        reference = min((row.ns_per_lane_step for row in rows if row.engine == "reference"), default=None)
        for row in rows:
            table.add_row(
                f"{row.lanes:,}",
                row.engine + "*" * row.extrapolated,
                row.device,
                f"{row.ns_per_lane_step:,.{1 if row.ns_per_lane_step < 100 else 0}f}",
                f"{row.spread:.0%}",
                f"{row.compile_seconds:.1f}",
                *(_times(peer / row.ns_per_lane_step) if peer else "" for peer in (jax, reference)),
                end_section=row is rows[-1],
            )
    return Group(
        "Pop-Art on the paper's network: nanoseconds per lane-step, median",
        table,
        "x: how many times faster than the better JAX, than one module per seed",
        "spread: (slowest - fastest) / median; compile: seconds; * measured on a part",
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
