"""Sweeps: every hyper-parameter is a lane, so a whole grid of settings and seeds is one run, in chunks of lanes.

`lanes` builds the grid, `run` runs it, for any learner and any network; `popart_func.experiments.load` reads what a run
has written. With ``store`` a run survives being killed: the same call goes on where it ended, and its result is that of
an uninterrupted run, bit for bit. With ``workers`` other processes, or a Ray cluster, do the work: the numbers and the
store are the same. What is kept is chosen by `records`.
"""

from __future__ import annotations

import inspect
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray
from torch import Tensor

from popart_func._checks import check_count
from popart_func.engines import ENGINES, PAYS_OFF, UnsupportedError, resolve_engine
from popart_func.experiments._checks import check_device, check_names, check_seeds
from popart_func.experiments.chunks import CONFIGURATION, ChunkStore, attributes, load, read_configuration
from popart_func.experiments.grid import DIVERGED, Chunk, Grid, Plan, Values
from popart_func.experiments.progress import reporting
from popart_func.experiments.records import Record, as_record, every
from popart_func.experiments.work import Work
from popart_func.experiments.workers import Workers, completed
from popart_func.learners import Learner
from popart_func.tree import PyTree

__all__ = ["CHUNK_SIZE", "lanes", "run"]

CHUNK_SIZE = 1024
"""How many lanes run together by default: 64 blocks of a vector register's 16."""

MakeLearner = Callable[..., Learner]
RESERVED = ("learner", "seed", "lane", "sample", DIVERGED)


def lanes(
    seeds: Iterable[SupportsIndex], *, learner: Iterable[str] | None = None, **hyper_parameters: Iterable[SupportsFloat]
) -> xarray.Dataset:
    """A grid of lanes: each combination of seed, hyper-parameters and, if given, learner is one training run.

    Args:
        seeds: distinct integers in [0, 2**32).
        learner: names, for a sweep of several learners.
        **hyper_parameters: for each its values, distinct finite numbers, under the names that ``make_learner`` takes.

    Returns:
        A dataset without variables, whose coordinates are the grid: print it, or take a part of it with ``sel``.

    Raises:
        TypeError, ValueError: bad seeds, names or values.

    >>> dict(lanes(range(3), learning_rate=[0.1, 0.01]).sizes)
    {'learning_rate': 2, 'seed': 3}
    """
    coordinates: dict[str, Any] = {}
    if learner is not None:
        names = [learner] if isinstance(learner, str) else list(learner)
        coordinates["learner"] = np.array(check_names("lanes", "learner", names, names), dtype=object)
    for name, values in hyper_parameters.items():
        if name in RESERVED:
            raise ValueError(f"lanes: a hyper-parameter can't be called {name!r}, which is the sweep's own word.")
        coordinates[name] = np.array(_checked_values(name, values), dtype=np.float64)
    coordinates["seed"] = np.array(check_seeds("lanes", seeds), dtype=np.int64)
    return xarray.Dataset(coords=coordinates)


def run(
    make_learner: MakeLearner | Mapping[str, MakeLearner],
    data: PyTree | Callable[[int], PyTree],
    init: Callable[[int], PyTree],
    lanes: xarray.Dataset,
    *,
    record: Mapping[str, Record | Callable[[Tensor], Tensor]] | None = None,
    chunk_size: int = CHUNK_SIZE,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    store: str | Path | None = None,
    workers: Workers = None,
    quiet: bool = False,
) -> xarray.Dataset:
    """Runs every lane of a grid, in chunks of `chunk_size` lanes.

    A lane's bits depend on its seed and hyper-parameters, the engine, `chunk_size`, the versions of this library and of
    PyTorch and the kind of processor; not on the number of workers or threads, nor on when a run was interrupted.

    Args:
        make_learner: ``make_learner(**hparams) -> Learner``, pure; it is called inside the step, with 0-d tensors.
            Several learners go by name, and a learner is not run again for the values of a hyper-parameter that is not
            in its signature. A learner's ``update(state, x)`` gets one sample of ``data``.
        data: what all lanes learn from, a tree of tensors ``[time, ...]``; or ``data(seed)``, such a tree for each
            seed, of one length.
        init: ``init(seed) -> params``, a tree of tensors: what a learner's ``init`` takes.
        lanes: as `lanes` builds it.
        record: what is kept, by name; see `records`. By default ``{"error": every()}``, the full curves.
        chunk_size: lanes that run together. Memory is one chunk's inputs and series in each worker.
        engine: one of `popart_func.engines.ENGINES`, or ``"auto"``, which is settled once for a store.
        device: where the lanes run.
        dtype: of parameters that are floats, and of hyper-parameters.
        store: a directory. If it holds a part of this sweep, the rest is run; if all, nothing is.
        workers: None for this process, a number of processes beside it, or ``"ray"``: the cluster that this process is
            connected to, else the one that `ray.init` finds (``RAY_ADDRESS`` names it); ``"ray://host:port"`` connects
            as Ray's client.
        quiet: no progress bar (which is drawn on a terminal only) and no word on what a store held.

    Returns:
        A dataset with the dimensions of ``lanes`` (and ``sample``, for curves): what ``record`` asked for, and
        ``diverged_at``, the first sample at which something recorded is not finite, -1 if there is none. The attributes
        ``lane_steps`` and ``seconds`` say how many steps this call ran, in all lanes, and how long it took.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
        EngineUnavailableError, UnsupportedError: the engine can't run here, or not this learner.
        StoreError: another process writes to the store, or it holds another sweep (the message lists the differences),
            or the disk is full.
    """
    started = time.perf_counter()
    device = check_device("run", device)
    _check_workers(workers)
    check_count("run", "chunk_size", chunk_size)
    learners, grid = _learners_and_grid(make_learner, lanes)
    if record is not None and (not isinstance(record, Mapping) or not record):
        got = "none" if isinstance(record, Mapping) else type(record).__name__
        raise TypeError(f"run: `record` must be a mapping from at least one name to what is kept, got {got}.")
    records = {name: as_record(name, one) for name, one in ({"error": every()} if record is None else record).items()}
    for name in records:
        if name in (*RESERVED, *grid.axes) or not name.isidentifier():
            raise ValueError(f"run: `record` can't use the name {name!r}.")
    chunk_size = min(chunk_size, max(grid.lanes(name) for name in learners))
    work = Work(learners, data, init, grid, records, chunk_size, engine, device, dtype)
    work = _with_engine(work, store)
    plan = Plan(grid, chunk_size, work.variables())
    configuration: dict[str, Any] = {
        "steps": work.steps(),
        "engine": work.engine,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": work.environment(),
        "fingerprint": work.fingerprint(),
    }
    provenance = _provenance()
    if store is None:
        memory = _Memory(plan)
        lane_steps = _run_missing(work, memory, plan, configuration["steps"], workers, quiet)
        said = attributes({**plan.as_json(), **configuration}, provenance)
        dataset = plan.dataset(memory.values).assign_attrs(said, complete=1)
    else:
        with ChunkStore(store, plan, configuration, provenance) as on_disk:
            lane_steps = _run_missing(work, on_disk, plan, configuration["steps"], workers, quiet)
        dataset = load(store)
    return dataset.assign_attrs(lane_steps=lane_steps, seconds=time.perf_counter() - started)


class _Memory:
    """Where results go without a store."""

    def __init__(self, plan: Plan) -> None:
        self.values = {learner: plan.empty(learner) for learner in plan.grid.takes}
        self.done: set[Chunk] = set()
        self.found: list[str] = []

    def write(self, chunk: Chunk, values: Values) -> None:
        for name, value in values.items():
            self.values[chunk.learner][name][chunk.start : chunk.stop] = value


def _run_missing(work: Work, kept: _Memory | ChunkStore, plan: Plan, steps: int, workers: Workers, quiet: bool) -> int:
    """Runs what is not done yet; returns how many steps of lanes that were."""
    missing = [chunk for chunk in plan.chunks() if chunk not in kept.done]
    lane_steps = steps * sum(chunk.stop - chunk.start for chunk in missing)
    with reporting(quiet) as start:
        report = start("sweep", lane_steps)
        for sentence in kept.found:
            report.say(sentence)
        for chunk, values in completed(work, missing, workers):
            _check_fits(plan, chunk, values)
            kept.write(chunk, values)
            report.advance(steps * (chunk.stop - chunk.start))
    return lane_steps


def _check_fits(plan: Plan, chunk: Chunk, values: Values) -> None:
    """Learners are asked for what they keep one by one: here they must agree."""
    for name, variable in plan.variables.items():
        shape, dtype = values[name].shape[1:], values[name].dtype
        if (shape, dtype) != (variable.shape, variable.dtype):
            raise ValueError(
                f"run: all learners must keep the same under one name: {name!r} is {variable.dtype} {variable.shape}, "
                f"but {dtype} {shape} for {chunk.learner!r}."
            )


def _with_engine(work: Work, store: str | Path | None) -> Work:
    """Settles what ``"auto"`` means: what the store was begun with, else the first engine that can do it."""
    steps = work.steps()
    if work.engine != "auto":
        return replace(work, engine=resolve_engine(work.engine, work.device, steps))
    if store is not None and (Path(store).expanduser() / CONFIGURATION).exists():
        there = read_configuration(Path(store).expanduser())["configuration"]["engine"]
        return replace(work, engine=resolve_engine(there, work.device, steps))
    work = replace(work, engine=resolve_engine("auto", work.device, steps))
    if work.engine == "native":
        try:
            work.try_engine()
        except UnsupportedError as error:
            other = next(name for name in ENGINES if name != "native" and steps >= PAYS_OFF[name])
            warnings.warn(f"engine 'auto': {error} Going on with {other}.", stacklevel=3)
            work = replace(work, engine=resolve_engine(other, work.device, steps))
    return work


def _learners_and_grid(
    make_learner: MakeLearner | Mapping[str, MakeLearner], lanes: xarray.Dataset
) -> tuple[dict[str, MakeLearner], Grid]:
    if "seed" not in lanes.coords:
        raise ValueError("run: `lanes` must be a grid that `lanes` has built, with a coordinate 'seed'.")
    values = {str(name): tuple(np.atleast_1d(lanes[name].values).tolist()) for name in lanes.coords}
    seeds = values.pop("seed")
    axes = {name: values[name] for name in values if name != "learner"}
    if isinstance(make_learner, Mapping):
        known = list(make_learner)
        names = check_names("run", "lanes", values["learner"], known) if "learner" in values else known
        learners = {name: make_learner[name] for name in names}
    elif "learner" in values:
        raise ValueError("run: `lanes` name learners, so `make_learner` must be a mapping from these names.")
    else:
        learners = {"": make_learner}
    takes = {name: _takes(name, make, axes) for name, make in learners.items()}
    for axis in axes:
        if not any(axis in names for names in takes.values()):
            raise ValueError(f"run: `lanes` vary {axis!r}, which `make_learner` does not take.")
    return learners, Grid(axes, seeds, takes)


def _takes(name: str, make: MakeLearner, axes: Mapping[str, tuple[float, ...]]) -> tuple[str, ...]:
    """The hyper-parameters that a learner's signature names."""
    if name and not name.isidentifier():
        raise ValueError(f"run: the names in `make_learner` must be identifiers, got {name!r}.")
    if not callable(make):
        raise TypeError(f"run: `make_learner` must be a function, got {type(make).__name__}.")
    parameters = inspect.signature(make).parameters.values()
    for parameter in parameters:
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not optional and parameter.name not in axes:
            raise ValueError(f"run: `make_learner` takes {parameter.name!r}, of which `lanes` have no values.")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return tuple(axes)
    named = {parameter.name for parameter in parameters}
    return tuple(axis for axis in axes if axis in named)


def _checked_values(name: str, values: Iterable[SupportsFloat]) -> list[float]:
    try:
        checked = [float(value) for value in values]
    except TypeError:
        raise TypeError(f"lanes: `{name}` must be an iterable of numbers, got {values!r}.") from None
    if not checked:
        raise ValueError(f"lanes: `{name}` must hold at least one value, got none.")
    for value in checked:
        if not np.isfinite(value):
            raise ValueError(f"lanes: `{name}` must be finite, got {value}.")
        if checked.count(value) > 1:
            raise ValueError(f"lanes: `{name}` must be distinct, got {value} more than once.")
    return checked


def _check_workers(workers: Workers) -> None:
    if isinstance(workers, str):
        if workers != "ray" and not workers.startswith("ray://"):
            raise ValueError(f"run: `workers` must be None, a number, 'ray' or 'ray://host:port', got {workers!r}.")
    elif workers is not None:
        check_count("run", "workers", workers)


def _provenance() -> dict[str, Any]:
    """Who ran a sweep, where and when; written down with it, not compared."""
    found: dict[str, Any] = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
    revision = _git("rev-parse", "HEAD")
    if revision:
        found["git_revision"] = revision + "-modified" * bool(_git("status", "--porcelain"))
    return found


def _git(*words: str) -> str:
    """What git says of the current directory; nothing where there is no git or no repository."""
    try:
        result = subprocess.run(["git", *words], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
