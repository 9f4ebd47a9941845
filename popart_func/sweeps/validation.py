"""What is asked of a sweep: its learners, its grid and its records, all checked before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsFloat

import numpy as np
import torch
import xarray
from torch import Tensor

from popart_func.learners import Learner
from popart_func.sweeps._checks import check_count_of, check_distinct, check_names, check_seeds, listed_names
from popart_func.sweeps.grid import DIVERGED, DONE, Grid, Variable, dimensions
from popart_func.sweeps.records import Record, as_record, every
from popart_func.sweeps.workers import Workers

__all__ = [
    "MakeLearner",
    "check_axis",
    "check_dimensions",
    "check_dtype",
    "check_learner_names",
    "check_values",
    "check_workers",
    "checked_records",
    "learners_and_grid",
]

MakeLearner = Callable[..., Learner]

_RESERVED = ("learner", "seed", "lane", "sample", DIVERGED, DONE)


def check_axis(name: str) -> None:
    """Raises unless a hyper-parameter can have this name."""
    if name in _RESERVED:
        raise ValueError(f"lanes: a hyper-parameter can't be called {name!r}, which is the sweep's own word.")
    if not name.isidentifier():
        raise ValueError(f"lanes: a hyper-parameter's name must be an identifier, got {name!r}.")


def check_values(caller: str, name: str, values: Iterable[SupportsFloat]) -> list[float]:
    """The values as a list, if they are some, real, finite and distinct."""
    try:
        given = list(values)
        if isinstance(values, str | bytes) or not all(map(_is_number, given)):
            raise TypeError
    except TypeError:
        raise TypeError(f"{caller}: `{name}` must be an iterable of numbers, got {values!r}.") from None
    if not given:
        raise ValueError(f"{caller}: `{name}` must hold at least one value, got none.")
    checked = [_as_float(value) for value in given]
    for value in checked:
        if not np.isfinite(value):
            raise ValueError(f"{caller}: `{name}` must be finite, got {value}.")
    check_distinct(caller, name, checked)
    return checked


def check_learner_names(caller: str, name: str, names: Iterable[str]) -> list[str]:
    """The names as a list, if they are some, distinct, and fit to name a file. One string is one name."""
    checked = listed_names(caller, name, names, "an iterable of names", "name")
    for one in checked:
        if not isinstance(one, str):
            raise TypeError(f"{caller}: the names in `{name}` must be strings, got {one!r}.")
        if not one.isidentifier():
            raise ValueError(f"{caller}: the names in `{name}` must be identifiers, got {one!r}.")
    check_distinct(caller, name, checked)
    return checked


def learners_and_grid(
    make_learner: MakeLearner | Mapping[str, MakeLearner], lanes: xarray.Dataset, dtype: torch.dtype
) -> tuple[dict[str, MakeLearner], Grid]:
    """The learners by name (empty, for one that has none), and their lanes."""
    values = _values(lanes)
    seeds = check_seeds("run", values.pop("seed"), "lanes.seed")
    axes = {name: tuple(check_values("run", f"lanes.{name}", values[name])) for name in values if name != "learner"}
    if isinstance(make_learner, Mapping):
        known = check_learner_names("run", "make_learner", make_learner)
        names = check_names("run", "lanes", values["learner"], known) if "learner" in values else known
        learners = {name: make_learner[name] for name in names}
    elif "learner" in values:
        raise ValueError("run: `lanes` name learners, so `make_learner` must be a mapping from these names.")
    else:
        learners = {"": make_learner}
    takes = {name: _takes(make, axes) for name, make in learners.items()}
    for axis in axes:
        if not any(axis in names for names in takes.values()):
            raise ValueError(f"run: `lanes` vary {axis!r}, which `make_learner` does not take.")
        _check_fits(axis, axes[axis], dtype)
    return learners, Grid(axes, tuple(seeds), takes)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises unless parameters can have this dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"run: `dtype` must be a torch.dtype of floats, such as torch.float32, got {dtype!r}.")


def checked_records(record: Mapping[str, Record | Callable[[Tensor], Tensor]] | None, grid: Grid) -> dict[str, Record]:
    """What is kept, by name."""
    if record is None:
        return {"error": every()}
    if not isinstance(record, Mapping) or not record:
        got = "none" if isinstance(record, Mapping) else type(record).__name__
        raise TypeError(f"run: `record` must be a mapping from at least one name to what is kept, got {got}.")
    for name in record:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"run: the names in `record` must be identifiers, got {name!r}.")
        if name in _RESERVED or name in grid.axes:
            whose = "the sweep's own word" if name in _RESERVED else "a hyper-parameter"
            raise ValueError(f"run: `record` can't use the name {name!r}, which is {whose}.")
    return {name: as_record(name, one) for name, one in record.items()}


def check_dimensions(variables: Mapping[str, Variable], grid: Grid) -> None:
    """Raises if a variable's own dimension, which is named after it, has the name of something else."""
    for name, dims in dimensions(variables).items():
        for dim in dims:
            if dim in variables or dim in grid.axes:
                whose = "another record's" if dim in variables else "a hyper-parameter's"
                raise ValueError(f"run: `record` {name!r} has a dimension {dim!r}, which is {whose} name: rename one.")


def check_workers(workers: Workers) -> Workers:
    """The workers, a number of them as Python's own integer."""
    if isinstance(workers, str):
        host, _, port = workers.removeprefix("ray://").rpartition(":")
        if workers != "ray" and not (workers.startswith("ray://") and host and port.isdigit()):
            raise ValueError(f"run: `workers` must be None, a number, 'ray' or 'ray://host:port', got {workers!r}.")
        return workers
    return None if workers is None else check_count_of("run", "workers", workers)


def _values(lanes: xarray.Dataset) -> dict[str, list[Any]]:
    """The grid's coordinates, with one value each where `sel` has chosen it."""
    if not isinstance(lanes, xarray.Dataset):
        raise TypeError(f"run: `lanes` must be a grid that `lanes` has built, got {type(lanes).__name__}.")
    if "seed" not in lanes.coords:
        raise ValueError("run: `lanes` must be a grid that `lanes` has built, with a coordinate 'seed'.")
    for name, coordinate in lanes.coords.items():
        if coordinate.dims not in ((), (name,)):
            raise ValueError(
                f"run: `lanes` must be a grid that `lanes` has built, each coordinate an axis of its own, got {name!r} "
                f"along {coordinate.dims}."
            )
    return {str(name): np.atleast_1d(lanes[name].values).tolist() for name in lanes.coords}


def _takes(make: MakeLearner, axes: Mapping[str, tuple[float, ...]]) -> tuple[str, ...]:
    """The hyper-parameters that a learner's signature names."""
    if not callable(make):
        raise TypeError(f"run: `make_learner` must be a function, got {type(make).__name__}.")
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:
        raise TypeError(f"run: `make_learner` must be a function with a signature, got {make!r}.") from None
    by_name = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"run: `make_learner` must take its arguments by name, got {parameter.name!r} before '/'.")
        if parameter in by_name and parameter.default is parameter.empty and parameter.name not in axes:
            raise ValueError(f"run: `make_learner` takes {parameter.name!r}, of which `lanes` have no values.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return tuple(axes)
    named = {parameter.name for parameter in by_name}
    return tuple(axis for axis in axes if axis in named)


def _check_fits(axis: str, values: tuple[float, ...], dtype: torch.dtype) -> None:
    """Raises if a value is beyond what the lanes' dtype holds: they would run with another one."""
    for value, held in zip(values, torch.tensor(values, dtype=dtype).tolist(), strict=True):
        if not np.isfinite(held) or (held == 0) != (value == 0):
            raise ValueError(f"run: `lanes.{axis}` must be within the range of {dtype}, got {value}.")


def _is_number(value: Any) -> bool:
    boolean = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == torch.bool
    return (
        isinstance(value, SupportsFloat)
        and not isinstance(value, str)
        and not boolean
        and getattr(value, "ndim", 0) == 0
    )


def _as_float(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
