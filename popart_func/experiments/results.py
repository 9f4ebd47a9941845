"""Results on disk: a directory with the curves, a summary and the figure.

A directory appears complete or not at all: it is written beside its place, under a hidden name, and renamed at the end.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from popart_func.experiments.plot import figure
from popart_func.sweeps.statistics import percentiles

__all__ = ["FILES", "check_directory", "summary", "write"]

FILES = ("curves.zarr", "summary.json", "figure.png")
"""What a result directory holds, and all that it may hold to be overwritten."""


def write(dataset: xarray.Dataset, directory: str | Path, *, force: bool = False) -> list[Path]:
    """Writes ``curves.zarr`` (the whole dataset), ``summary.json`` (see `summary`) and ``figure.png``.

    Args:
        dataset: as `regression.reproduce` returns it.
        directory: where to; its parents are made. An empty one may be there already.
        force: replace a result directory once the new one is complete.

    Returns:
        The paths written.

    Raises:
        FileExistsError: there is something already, and no ``force``, or something that is no result directory.
        OSError: the place can't be written to.
    """
    directory = check_directory(directory, force=force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(directory) as partial:
        _write_zarr(dataset, partial / "curves.zarr")
        (partial / "summary.json").write_text(json.dumps(summary(dataset), allow_nan=False) + "\n", encoding="utf-8")
        figure(dataset, partial / "figure.png")
    return [directory / name for name in FILES]


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """The medians and percentiles over seeds as plain numbers, fit for JSON. What is not finite becomes None.

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


def check_directory(directory: str | Path, *, force: bool = False) -> Path:
    """Raises unless `write` may write there; call it before computing what is to be written.

    With ``force``, a directory may be replaced that holds nothing but `FILES`: nothing else is ever deleted.

    Returns:
        The directory, absolute, without symbolic links.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, OSError: it may not, and why.
    """
    directory = Path(directory).expanduser().resolve()
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


def _write_zarr(dataset: xarray.Dataset, path: Path) -> None:
    with warnings.catch_warnings():
        # Version 3 of the format does not specify consolidated metadata yet; without, `xarray.open_zarr` warns.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        dataset.to_zarr(path, mode="w-", zarr_format=3, consolidated=True)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A new directory beside the given one, which takes its place if the block succeeds, and else is removed."""
    mark = secrets.token_hex(4)
    partial = directory.with_name(f".{directory.name}.{mark}.partial")
    old = directory.with_name(f".{directory.name}.{mark}.old")
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
    except BaseException:  # an interrupt too
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
