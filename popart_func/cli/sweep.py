"""``popart-func sweep``: the Pop-Art paper's search for learning rates and step sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from popart_func.cli._parameters import (
    Algorithms,
    Device,
    Directory,
    Engine,
    check_float32,
    resumable,
    whole_number,
    words,
)
from popart_func.display.table import print_table
from popart_func.experiments.names import HALF_DECADES, Algorithm

__all__ = ["sweep"]


def _number_or_name(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() else text


def _check_workers(_: Any, text: str | None) -> None:
    from popart_func.sweeps.validation import as_workers

    try:
        as_workers(_number_or_name(text))
    except ValueError:
        raise ValueError("Choose a number of processes, at least 1, or ray, or ray://host:port.") from None


def _powers(values: tuple[float, ...]) -> str:
    return f"10^-5 10^-4.5 ... 1, {len(values)} values"


def sweep(
    *,
    algorithms: Algorithms = tuple(Algorithm),
    learning_rates: Annotated[
        tuple[Annotated[float, Parameter(validator=(Number(gt=0, lt=math.inf), check_float32))], ...],
        words(show_default=_powers),
    ] = HALF_DECADES,
    step_sizes: Annotated[
        tuple[Annotated[float, Parameter(validator=(Number(gt=0, lte=1), check_float32))], ...],
        words(show_default=_powers),
    ] = HALF_DECADES,
    seeds: Annotated[int, whole_number(2, 2**32)] = 50,
    chunk: Annotated[int, whole_number(1)] = 1024,
    workers: Annotated[str | None, Parameter(validator=_check_workers)] = None,
    engine: Engine = "auto",
    device: Device = "cpu",
    out: Directory = Path("sweep"),
    resume: bool = True,
) -> None:
    """Search learning rates and step sizes on the Pop-Art paper's online regression, by default the paper's own grid.

    Every setting and seed is a lane: 18,700 runs of 5004 samples. Prints each algorithm's best setting, with the
    interquartile mean of its seeds' final error and a 95 % interval, beside the paper's setting. After it was killed,
    the same command goes on from where it was; on a finished directory it only prints. Writes:

    * **lanes.zarr**: the results of every lane, for xarray.open_zarr with group="sgd", "art" and so on.
    * **heat_map.png**: the final error over the grid.
    * **summary.json**: what is printed, and more.

    For a quick look: popart-func sweep --algorithms popart --learning-rates 1e-3 1e-2 --seeds 10 --out quick

    Parameters
    ----------
    algorithms
        Which algorithms, one or more words. SGD has no step size. What is named twice counts once, here and below.
    learning_rates
        Which learning rates.
    step_sizes
        Which step sizes of the statistics.
    seeds
        How many seeds, from 2 on, since intervals are over seeds. They are numbered from 0.
    chunk
        How many lanes run together, and are written together.
    workers
        How many processes beside this one, or ray, or ray://host:port; by default this process alone.
    device
        Where to run: cpu, cuda, cuda:1.
    out
        The directory of the sweep.
    resume
        Go on with the sweep in the directory; with --no-resume, refuse if there is one.
    """
    from popart_func.experiments import search, search_report

    if not resume:
        search_report.check_new(out)
    with resumable(out):
        dataset = search.sweep_grid(
            [algorithm.value for algorithm in dict.fromkeys(algorithms)],
            list(dict.fromkeys(learning_rates)),
            list(dict.fromkeys(step_sizes)),
            range(seeds),
            chunk_size=chunk,
            engine=engine,
            device=device,
            store=out,
            workers=_number_or_name(workers),
        )
    summary, written = search_report.write(dataset, out)
    print_table(search_report.table(summary))
    speed = search_report.speed(dataset)
    if speed:
        print(speed)
    for path in written:
        print(f"wrote {path}")
