"""The command ``popart-func``: parse, call, print; nothing else.

Exit status: 0 if everything was written and every check passed, 2 for a bad value on the command line, 1 for any other
failure, 130 when interrupted.
"""

from __future__ import annotations

import enum
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import popart_func

try:
    import popart_func.experiments  # says which extra is missing, if one is
except ModuleNotFoundError as error:
    raise SystemExit(f"popart-func: {error}") from None

from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.validators import Number

from popart_func.engines import ENGINES, EngineUnavailableError, available_engines
from popart_func.experiments._checks import check_device

if TYPE_CHECKING:
    import xarray
    from rich.console import Group

    from popart_func.experiments.bench import Result

__all__ = ["main"]

app = App(
    name="popart-func",
    help="Functional Pop-Art for PyTorch: learn targets of any magnitude.",
    version=popart_func.__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)

_ENGINE_NAMES = ("auto", *ENGINES)


class Algorithm(enum.Enum):
    """The four algorithms of `experiments.regression`, which takes long to import."""

    sgd = "sgd"
    art = "art"
    popart = "popart"
    normalized_sgd = "normalized_sgd"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    Args:
        arguments: the words after the program's name; by default those of this process.

    >>> main(["--version"])
    0.1.0
    0
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"popart-func: {message}", file=sys.stderr)
            status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(error, 2)
    except (EngineUnavailableError, ModuleNotFoundError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; nothing was written.", 130)
    return status if isinstance(status, int) else 0


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    """A whole number; left to itself, cyclopts rounds 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


def _check_engine(_: Any, name: str) -> None:
    if name not in _ENGINE_NAMES:
        raise ValueError(f"Choose from: {', '.join(_ENGINE_NAMES)}.")


def _check_device(_: Any, name: str) -> None:
    try:
        check_device("reproduce", name)
    except ValueError as error:  # without the function's name: on a command line nobody called one
        raise ValueError(str(error).partition(": ")[2]) from None


_BENCHED = (*ENGINES, "jax", "jax_traced", "jax_lanes_last", "reference")
_BENCHED_HELP = f"Which to measure, one or more of {', '.join(_BENCHED)}; by default all that run here."


def _check_file(_: Any, path: Path | None) -> None:
    """That a file can be written there: before the work, not after it."""
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder.")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}.")


def _check_picture(_: Any, path: Path | None) -> None:
    _check_file(_, path)
    if path is not None and path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"A picture ends in .png, .pdf or .svg, got {path.name}.")


def _check_benched(_: Any, names: Sequence[str] | None) -> None:
    for name in names or ():
        if name not in _BENCHED:
            raise ValueError(f"Choose from: {', '.join(_BENCHED)}.")


def _check_workers(_: Any, workers: str | None) -> None:
    if workers and not ((workers.isdigit() and int(workers) > 0) or workers == "ray" or workers.startswith("ray://")):
        raise ValueError("Choose a number of processes, at least 1, or ray, or ray://host:port.")


_HALF_DECADES = tuple(10 ** (power / 2) for power in range(-10, 1))


def _powers(values: tuple[float, ...]) -> str:
    return f"10^-5 10^-4.5 ... 1, {len(values)} values"


def _names(algorithms: tuple[Algorithm, ...]) -> str:
    return " ".join(algorithm.value.replace("_", "-") for algorithm in algorithms)


@app.command
def reproduce(
    *,
    seeds: Annotated[int, Parameter(converter=_whole, validator=Number(gte=1, lte=2**32))] = 50,
    algorithms: Annotated[
        tuple[Algorithm, ...],
        Parameter(consume_multiple=(1, None), negative=(), show_default=_names),
    ] = tuple(Algorithm),
    engine: Annotated[
        str, Parameter(validator=_check_engine, help=f"What runs it: {', '.join(_ENGINE_NAMES)}.")
    ] = "auto",
    device: Annotated[str, Parameter(validator=_check_device)] = "cpu",
    out: Path = Path("results"),
    force: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Reproduce Figure 1a of the Pop-Art paper: online regression on numbers up to 1023 and, now and then, 65535.

    A small network learns numbers from their 16 bits, one at a time, in one pass over 5004 of them. All seeds of an
    algorithm run at once. Prints a table and writes three files:

    * **figure.png**: the error of each algorithm over the stream, median and 10th to 90th percentile of the seeds.
    * **summary.json**: the same curves as plain numbers.
    * **curves.zarr**: the error of every seed at every step, for xarray.open_zarr.

    For a quick look: popart-func reproduce --seeds 10 --algorithms sgd popart --out quick

    Parameters
    ----------
    seeds
        How many seeds, 0 and up. Each draws its own numbers and its own first parameters.
    algorithms
        Which algorithms, one or more words.
    device
        Where to run: cpu, cuda, cuda:1.
    out
        The directory to write. It appears when all is done, complete.
    force
        Overwrite a directory that holds earlier results.
    """
    from rich.console import Console

    from popart_func.experiments import regression, store

    store.check_directory(out, force=force)
    names = [algorithm.value for algorithm in dict.fromkeys(algorithms)]
    with _progress(regression.LABELS, regression.STEPS) as on_progress:
        dataset = regression.reproduce(
            range(seeds), algorithms=names, engine=engine, device=device, on_progress=on_progress
        )
    console = Console()
    console.print(_table(dataset), highlight=False)
    for path in store.write(dataset, out, force=force):
        print(f"wrote {path}")


@app.command
def sweep(
    *,
    algorithms: Annotated[
        tuple[Algorithm, ...],
        Parameter(consume_multiple=(1, None), negative=(), show_default=_names),
    ] = tuple(Algorithm),
    learning_rates: Annotated[
        tuple[Annotated[float, Parameter(validator=Number(gt=0, lt=math.inf))], ...],
        Parameter(consume_multiple=(1, None), negative=(), show_default=_powers),
    ] = _HALF_DECADES,
    step_sizes: Annotated[
        tuple[Annotated[float, Parameter(validator=Number(gt=0, lte=1))], ...],
        Parameter(consume_multiple=(1, None), negative=(), show_default=_powers),
    ] = _HALF_DECADES,
    seeds: Annotated[int, Parameter(converter=_whole, validator=Number(gte=2, lte=2**32))] = 50,
    chunk: Annotated[int, Parameter(converter=_whole, validator=Number(gte=1))] = 1024,
    workers: Annotated[str | None, Parameter(validator=_check_workers)] = None,
    engine: Annotated[
        str, Parameter(validator=_check_engine, help=f"What runs it: {', '.join(_ENGINE_NAMES)}.")
    ] = "auto",
    device: Annotated[str, Parameter(validator=_check_device)] = "cpu",
    out: Path = Path("sweep"),
    resume: bool = True,
) -> None:
    """Search learning rates and step sizes on the Pop-Art paper's online regression, by default the paper's own grid.

    Every setting and seed is a lane: 18,700 runs of 5004 samples. Prints each algorithm's best setting, with the
    interquartile mean of its seeds' final error and a 95 % interval, beside the paper's setting. Killed at any
    moment, the same command goes on from where it was; on a finished directory it only prints. Writes:

    * **lanes.zarr**: the results of every lane, for xarray.open_zarr.
    * **heat_map.png**: the final error over the grid.
    * **summary.json**: what is printed, and more.

    For a quick look: popart-func sweep --algorithms popart --learning-rates 1e-3 1e-2 --seeds 10 --out quick

    Parameters
    ----------
    algorithms
        Which algorithms, one or more words. SGD has no step size.
    learning_rates
        Which learning rates.
    step_sizes
        Which step sizes of the statistics.
    seeds
        How many seeds, 0 and up.
    chunk
        How many lanes run at once, and are written at once.
    workers
        How many processes beside this one, or ray, or ray://host:port; by default this one alone.
    device
        Where to run: cpu, cuda, cuda:1.
    out
        The directory of the sweep.
    resume
        Go on with the sweep in the directory; with --no-resume, refuse if there is one.
    """
    from rich.console import Console

    from popart_func.experiments import search, search_report

    if not resume:
        search_report.check_new(out)
    try:
        dataset = search.sweep_grid(
            [algorithm.value for algorithm in dict.fromkeys(algorithms)],
            list(dict.fromkeys(learning_rates)),
            list(dict.fromkeys(step_sizes)),
            range(seeds),
            chunk_size=chunk,
            engine=engine,
            device=device,
            store=out,
            workers=int(workers) if workers and workers.isdigit() else workers,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on with what is done, in {out}.") from None
    summary, written = search_report.write(dataset, out)
    Console().print(search_report.table(summary), highlight=False)
    if dataset.attrs["lane_steps"]:
        lane_steps, seconds = dataset.attrs["lane_steps"], dataset.attrs["seconds"]
        print(search_report.speed(lane_steps, seconds, search.reference_seconds()))
    for path in written:
        print(f"wrote {path}")


@app.command
def bench(
    *,
    lanes: Annotated[
        tuple[Annotated[int, Parameter(converter=_whole, validator=Number(gte=1))], ...],
        Parameter(consume_multiple=(1, None), negative=()),
    ] = (50, 1000),
    engines: Annotated[
        tuple[str, ...] | None,
        Parameter(validator=_check_benched, consume_multiple=(1, None), negative=(), help=_BENCHED_HELP),
    ] = None,
    device: Annotated[str, Parameter(validator=_check_device)] = "cpu",
    repeats: Annotated[int, Parameter(converter=_whole, validator=Number(gte=1))] = 5,
    json: Annotated[Path | None, Parameter(validator=_check_file)] = None,
    plot: Annotated[Path | None, Parameter(validator=_check_picture)] = None,
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
    console.print(_bench_table(results), highlight=False)
    if json is not None:
        json.write_text(json_format.dumps(benchmark.as_json(results), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {json}")
    if plot is not None:
        from popart_func.experiments.plot import costs

        costs(benchmark.costs(device=device), plot)
        print(f"wrote {plot}")


def _check_checks(_: Any, names: Sequence[str] | None) -> None:
    from popart_func.verify import CHECKS

    for name in names or ():
        if name not in CHECKS:
            raise ValueError(f"Choose from: {', '.join(CHECKS)}.")


@app.command
def verify(
    *,
    seeds: Annotated[int, Parameter(converter=_whole, validator=Number(gte=1, lte=2**32))] = 1000,
    seed: Annotated[int | None, Parameter(converter=_whole, validator=Number(gte=0, lt=2**32))] = None,
    check: Annotated[
        tuple[str, ...] | None, Parameter(validator=_check_checks, consume_multiple=(1, None), negative=())
    ] = None,
    dtype: Literal["float32", "float64"] = "float32",
    device: Annotated[str, Parameter(validator=_check_device)] = "cpu",
    engine: Annotated[
        str, Parameter(validator=_check_engine, help=f"What is held against eager: {', '.join(_ENGINE_NAMES)}.")
    ] = "auto",
    json: Annotated[Path | None, Parameter(validator=_check_file)] = None,
    plot: Annotated[Path | None, Parameter(validator=_check_picture)] = None,
) -> int:
    """Check the claims of the papers and of this library on random networks, data and statistics of any magnitude.

    Each check computes one thing in two ways, by the library and independently of it, for all seeds at once, and
    measures how far apart they are against what rounding allows. Prints a table; the exit status is 1 if a check fails,
    or if one that was asked for by name can't run here.

    To see a failure again: popart-func verify --check NAME --seed SEED

    Parameters
    ----------
    seeds
        How many seeds, 0 and up.
    seed
        This seed alone.
    check
        Which checks, one or more names as in the table; by default all.
    dtype
        What the library computes in. Both are held against float64.
    device
        Where to run: cpu, cuda, cuda:1.
    json
        Also write the results to this file.
    plot
        Also draw the errors of all seeds, check by check, to this file, such as errors.png.
    """
    import json as json_format

    import torch
    from rich.console import Console

    from popart_func.verify import CHECKS, report, run

    reason = None if engine == "auto" else available_engines(device)[engine]
    if reason is not None:
        raise EngineUnavailableError(f"the engine {engine!r} can't run on {device}: {reason}")
    numbers = range(seeds) if seed is None else [seed]
    with report.progress(check or list(CHECKS)) as on_progress:
        outcomes = run(
            check,
            seeds=numbers,
            dtype=getattr(torch, dtype),
            device=device,
            engine=engine,
            on_progress=on_progress,
        )
    Console(width=report.WIDTH).print(report.table(outcomes), highlight=False)
    if json is not None:
        content = report.as_json(outcomes, dtype=dtype, device=device, engine=engine)
        json.write_text(json_format.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {json}")
    if plot is not None and any(outcome.seeds for outcome in outcomes):
        from popart_func.verify.plot import errors

        errors(outcomes, plot)
        print(f"wrote {plot}")
    return int(any(outcome.passed is False or (check and outcome.skipped) for outcome in outcomes))


def _result_line(result: Result) -> str:
    return f"{result.engine} on {result.device}, {result.lanes} lanes: {result.ns_per_lane_step:,.0f} ns per lane-step"


def _bench_table(results: Sequence[Result]) -> Group:
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


@contextmanager
def _progress(labels: dict[str, str], steps: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar for each algorithm on stderr, if that is a terminal; it moves before the first steps are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {}

        def on_progress(algorithm: str, done: int) -> None:
            if algorithm not in tasks:
                tasks[algorithm] = progress.add_task(labels[algorithm], total=None)
            if done:
                progress.update(tasks[algorithm], completed=done, total=steps)

        yield on_progress


def _table(dataset: xarray.Dataset) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    from popart_func.experiments.regression import LABELS
    from popart_func.experiments.statistics import percentiles

    over_seeds = percentiles(dataset["rmse"])
    names, seeds, steps = dataset["algorithm"].values, dataset.sizes["seed"], dataset.sizes["step"]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("sample", justify="right", no_wrap=True)
    for name in names:
        table.add_column(LABELS[name], justify="right", no_wrap=True)
    for sample in (100, 900, 1000, 1900, 2000, 2900, 3900, 4900):
        at = over_seeds.sel(sample=sample)
        cells = [
            "{} ({}-{})".format(*(_short(float(at[key].sel(algorithm=name))) for key in ("median", "p10", "p90")))
            for name in names
        ]
        table.add_row(f"{sample}{'*' if sample % 1000 == 0 else ' '}", *cells, end_section=sample == 4900)
    seconds = dataset["seconds"].values
    table.add_row("seconds", *(f"{value:.2f}" for value in seconds))
    table.add_row("compile", *(f"{value:.2f}" for value in dataset["compile_seconds"].values))
    table.add_row("Msteps/s", *(f"{seeds * steps / value / 1e6:.3g}" for value in seconds))
    return Group(
        f"RMSE over {seeds} seed{'s' * (seeds != 1)}: median (10th-90th percentile)",
        table,
        "* with a 65535 in the average; Msteps/s: million seeds x steps per second",
    )


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _fail(reason: object, status: int) -> int:
    print(f"popart-func: {reason}", file=sys.stderr)
    return status
