"""``popart-func reproduce``: Figure 1a of the Pop-Art paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from popart_func.cli.parameters import Algorithm, Algorithms, Device, Engine, whole_number

if TYPE_CHECKING:
    import xarray
    from rich.console import Group

__all__ = ["reproduce"]


def reproduce(
    *,
    seeds: Annotated[int, whole_number(1, 2**32)] = 50,
    algorithms: Algorithms = tuple(Algorithm),
    engine: Engine = "auto",
    device: Device = "cpu",
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
        How many seeds: 0, 1, 2 and so on. Each draws its own numbers and its own first parameters.
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

    from popart_func.experiments import regression, results

    results.check_directory(out, force=force)
    names = [algorithm.value for algorithm in dict.fromkeys(algorithms)]
    with _progress(regression.LABELS, regression.STEPS) as on_progress:
        dataset = regression.reproduce(
            range(seeds), algorithms=names, engine=engine, device=device, on_progress=on_progress
        )
    console = Console()
    console.print(_table(dataset), highlight=False)
    for path in results.write(dataset, out, force=force):
        print(f"wrote {path}")


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
    from popart_func.sweeps.statistics import percentiles

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
