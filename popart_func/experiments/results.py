"""Results of `regression.reproduce` on disk: a directory with the curves, a summary and the figure.

A directory appears complete or not at all: it is written under a hidden name beside its place, and renamed at the end.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from popart_func.experiments.plot import figure
from popart_func.sweeps import files
from popart_func.sweeps.lanes_zarr import consolidating
from popart_func.sweeps.statistics import percentiles

__all__ = ["FILES", "as_directory", "summary", "write"]

FILES = ("curves.zarr", "summary.json", "figure.png")
"""The files of a result directory. A directory that holds anything else is never overwritten."""


def write(dataset: xarray.Dataset, directory: str | Path, *, force: bool = False) -> list[Path]:
    """Writes ``curves.zarr`` (the whole dataset), ``summary.json`` (see `summary`) and ``figure.png``.

    Args:
        dataset: as `regression.reproduce` returns it.
        directory: the directory to write; it and its parents are made. It may exist if it is empty.
        force: replace earlier results once the new ones are complete.

    Returns:
        The paths written.

    Raises:
        FileExistsError: the directory holds results and ``force`` is False, or it holds something else.
        OSError: the directory can't be written.
    """
    directory = as_directory(directory, force=force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(directory) as partial:
        with consolidating():
            dataset.to_zarr(partial / "curves.zarr", mode="w-", zarr_format=3, consolidated=True)
        (partial / "summary.json").write_text(json.dumps(summary(dataset), allow_nan=False) + "\n", encoding="utf-8")
        figure(dataset, partial / "figure.png")
    return [directory / name for name in FILES]


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """The medians and percentiles over seeds as plain numbers for JSON, which has None for what is not finite.

    ``{"algorithms": {name: {"learning_rate", "step_size", "seconds", "rmse": {"sample", "median", "p10", "p90"}}}}``

    Args:
        dataset: as `regression.reproduce` returns it.
    """
    algorithms = {}
    for name in dataset["algorithm"].values:
        one = dataset.sel(algorithm=name)
        over_seeds = percentiles(one["rmse"])
        algorithms[str(name)] = {
            **{key: _plain(one[key].item()) for key in ("learning_rate", "step_size", "seconds")},
            "rmse": {
                "sample": [int(sample) for sample in one["sample"].values],
                **{key: [_plain(value) for value in np.ravel(line.values)] for key, line in over_seeds.items()},
            },
        }
    return {"algorithms": algorithms}


def as_directory(directory: str | Path, *, force: bool = False) -> Path:
    """A directory that `write` may write, as an absolute path without symbolic links; call it before a long run.

    With ``force``, a directory that holds only `FILES` may be replaced: nothing else is ever deleted.

    Raises:
        TypeError, ValueError: it is no path, or that of something that is not local.
        FileExistsError, NotADirectoryError, PermissionError, OSError: `write` may not write it; the message says why.
    """
    directory = files.as_directory("results.write", "directory", directory)
    if directory.exists():
        if not directory.is_dir():
            raise FileExistsError(f"{directory} is a file, not a directory for results.")
        if directory in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(directory):
            raise FileExistsError(
                f"{directory} is the current directory, one above it, or a mount point, and can't be replaced: "
                "name a directory in it."
            )
        entries = {entry.name for entry in directory.iterdir()}
        foreign = sorted(entries - set(FILES))
        if foreign:
            raise FileExistsError(
                f"{directory} holds {foreign[0]!r}, which is not part of a result, so it is never replaced: "
                "name another directory."
            )
        if entries and not force:
            raise FileExistsError(
                f"{directory} already holds results: name another directory, or overwrite it with --force."
            )
    ancestor = next(path for path in directory.parents if path.exists())
    if not ancestor.is_dir():
        raise NotADirectoryError(f"{directory} can't be made: {ancestor} is not a directory.")
    try:
        tempfile.TemporaryDirectory(dir=ancestor, prefix=".popart-func-").cleanup()
    except OSError as error:
        raise type(error)(f"{directory} can't be made: {ancestor} is not writable ({error.strerror}).") from None
    return directory


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A new directory that takes the place of the given one if the block succeeds, and is removed if it does not."""
    mark = secrets.token_hex(4)
    partial = directory.with_name(f".{directory.name}.{mark}.partial")
    old = directory.with_name(f".{directory.name}.{mark}.old")
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
    except BaseException:  # also an interrupt
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
