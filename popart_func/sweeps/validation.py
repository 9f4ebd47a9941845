"""Validation of what `run` is asked: learners, records, dtype and workers, before anything is computed.

The grid needs no validation of its own: `lanes` has checked it. What is checked here is whether learners and grid fit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from popart_func.learners import Learner
from popart_func.sweeps._checks import as_count, as_identifiers, as_names
from popart_func.sweeps.grid import Grid
from popart_func.sweeps.records import Record, as_record, every
from popart_func.sweeps.schema import RESERVED, LaneAxes, Variable, dimensions
from popart_func.sweeps.workers import Executor, Workers

__all__ = [
    "MakeLearner",
    "as_learners_and_lanes",
    "as_records",
    "as_workers",
    "check_dimensions",
    "check_dtype",
]

MakeLearner = Callable[..., Learner]
"""``make_learner(**hparams) -> Learner``."""


def as_learners_and_lanes(
    make_learner: MakeLearner | Mapping[str, MakeLearner], grid: Grid, dtype: torch.dtype
) -> tuple[dict[str, MakeLearner], LaneAxes]:
    """The learners by name, and the lanes of each; a learner without a name has the empty one."""
    if not isinstance(grid, Grid):
        raise TypeError(f"run: `lanes` must be a grid that `lanes` has built, got {type(grid).__name__}.")
    if isinstance(make_learner, Mapping):
        known = as_identifiers("run", "make_learner", make_learner)
        names = known if grid.learners is None else as_names("run", "lanes.learner", grid.learners, known)
        learners = {name: make_learner[name] for name in names}
    elif grid.learners is not None:
        raise ValueError("run: `lanes` name learners, so `make_learner` must be a mapping from these names.")
    else:
        learners = {"": make_learner}
    takes = {name: _hyper_parameters_of(make, grid) for name, make in learners.items()}
    for axis, values in grid.axes.items():
        if not any(axis in names for names in takes.values()):
            raise ValueError(f"run: `lanes` vary {axis!r}, which `make_learner` does not take.")
        _check_range(axis, values, dtype)
    return learners, LaneAxes(grid.axes, grid.seeds, takes)


def as_records(record: Mapping[str, Record | Callable[[Tensor], Tensor]] | None, lanes: LaneAxes) -> dict[str, Record]:
    """Records by name; by default the full curve of the error."""
    if record is None:
        return {"error": every()}
    if not isinstance(record, Mapping) or not record:
        got = "none" if isinstance(record, Mapping) else type(record).__name__
        raise TypeError(f"run: `record` must be a mapping from at least one name to what is kept, got {got}.")
    for name in record:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"run: the names in `record` must be identifiers, got {name!r}.")
        if name in RESERVED or name in lanes.axes:
            whose = "the sweep's own word" if name in RESERVED else "a hyper-parameter"
            raise ValueError(f"run: `record` can't use the name {name!r}, which is {whose}.")
    return {name: as_record(name, one) for name, one in record.items()}


def as_workers(workers: Workers) -> Workers:
    """Workers, a number of them as Python's own integer."""
    if isinstance(workers, type):
        raise TypeError(f"run: `workers` must be an executor, got its class: write {workers.__name__}(...).")
    if isinstance(workers, Executor):
        return workers
    if isinstance(workers, str):
        host, _, port = workers.removeprefix("ray://").rpartition(":")
        if workers != "ray" and not (workers.startswith("ray://") and host and port.isdigit()):
            raise ValueError(
                f"run: `workers` must be None, a number, an executor, 'ray' or 'ray://host:port', got {workers!r}."
            )
        return workers
    return None if workers is None else as_count("run", "workers", workers)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises unless parameters can have this dtype."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"run: `dtype` must be a torch.dtype of floats, such as torch.float32, got {dtype!r}.")


def check_dimensions(variables: Mapping[str, Variable], lanes: LaneAxes) -> None:
    """Raises if a variable's own dimension, which is named after it, has the name of something else."""
    for name, dims in dimensions(variables).items():
        for dim in dims:
            if dim in variables or dim in lanes.axes:
                whose = "another record's" if dim in variables else "a hyper-parameter's"
                raise ValueError(f"run: `record` {name!r} has a dimension {dim!r}, which is {whose} name: rename one.")


def _hyper_parameters_of(make: MakeLearner, grid: Grid) -> tuple[str, ...]:
    """The grid's hyper-parameters that the signature of a learner's maker names."""
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
        if parameter in by_name and parameter.default is parameter.empty and parameter.name not in grid.axes:
            raise ValueError(f"run: `make_learner` takes {parameter.name!r}, for which `lanes` have no values.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return tuple(grid.axes)
    named = {parameter.name for parameter in by_name}
    return tuple(axis for axis in grid.axes if axis in named)


def _check_range(axis: str, values: tuple[float, ...], dtype: torch.dtype) -> None:
    """Raises if the lanes' dtype can't hold a value: it would become infinite or zero."""
    for value, held in zip(values, torch.tensor(values, dtype=dtype).tolist(), strict=True):
        if not math.isfinite(held) or (held == 0) != (value == 0):
            raise ValueError(f"run: `lanes.{axis}` must be within the range of {dtype}, got {value}.")
