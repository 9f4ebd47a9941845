"""``popart-func reproduce``: Figure 1a of the Pop-Art paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from popart_func.cli._parameters import Algorithms, Device, Directory, Engine, whole_number
from popart_func.display.progress import show_progress
from popart_func.display.table import make_table, print_table
from popart_func.experiments.names import LABELS, Algorithm

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
    out: Directory = Path("results"),
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
        The directory to write. It appears once all is done.
    force
        Overwrite a directory that holds earlier results.
    """
    from popart_func.experiments import regression, results

    out = results.as_directory(out, force=force)
    names = [algorithm.value for algorithm in dict.fromkeys(algorithms)]
    with show_progress("samples") as progress:
        dataset = regression.reproduce(
            range(seeds),
            algorithms=names,
            engine=engine,
            device=device,
            on_progress=lambda algorithm, done: progress.show(LABELS[algorithm], done, regression.STEPS),
        )
    print_table(_table(dataset))
    for path in results.write(dataset, out, force=force):
        print(f"wrote {path}")


def _table(dataset: xarray.Dataset) -> Group:
    from popart_func.sweeps.statistics import percentiles

    over_seeds = percentiles(dataset["rmse"])
    names, seeds, steps = dataset["algorithm"].values, dataset.sizes["seed"], dataset.sizes["step"]
    errors = []
    for sample in (100, 900, 1000, 1900, 2000, 2900, 3900, 4900):
        at = over_seeds.sel(sample=sample)
        cells = [
            "{} ({}-{})".format(*(_short(float(at[key].sel(algorithm=name))) for key in ("median", "p10", "p90")))
            for name in names
        ]
        errors.append([f"{sample}{'*' if sample % 1000 == 0 else ' '}", *cells])
    seconds = dataset["seconds"].values
    times = [
        ["seconds", *(f"{value:.2f}" for value in seconds)],
        ["compile", *(f"{value:.2f}" for value in dataset["compile_seconds"].values)],
        ["Msteps/s", *(f"{seeds * steps / value / 1e6:.3g}" for value in seconds)],
    ]
    return make_table(
        ["sample", *(LABELS[name] for name in names)],
        [errors, times],
        title=f"RMSE over {seeds} seed{'s' * (seeds != 1)}: median (10th-90th percentile)",
        notes=["* with a 65535 in the average; Msteps/s: million seeds x steps per second"],
    )


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.3g}"
