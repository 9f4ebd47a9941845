"""Sweeps: every hyper-parameter is a lane, so a whole grid of settings and seeds is one run, in chunks of lanes.

`lanes` builds the grid, `run` runs it, for any learner and any network; `popart_func.experiments.load` reads what a run
has written. With ``store`` a run survives being killed: the same call goes on where it ended, and its result is that of
an uninterrupted run, bit for bit. With ``workers`` other processes, or a Ray cluster, do the work: the numbers and the
store are the same. What is kept is chosen by `records`.
"""

from __future__ import annotations

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

from popart_func.display.progress import reporting
from popart_func.engines import ENGINES, UnsupportedError, load_engine, resolve_engine
from popart_func.sweeps._checks import check_count_of, check_device, check_function, check_seeds
from popart_func.sweeps.files import check_directory
from popart_func.sweeps.grid import Chunk, Plan, Values
from popart_func.sweeps.inputs import Starts
from popart_func.sweeps.job import Work
from popart_func.sweeps.records import Record
from popart_func.sweeps.store import CONFIGURATION, ChunkStore, attributes, load, read_configuration
from popart_func.sweeps.validation import (
    MakeLearner,
    check_axis,
    check_dimensions,
    check_dtype,
    check_learner_names,
    check_values,
    check_workers,
    checked_records,
    learners_and_grid,
)
from popart_func.sweeps.workers import Workers, completed
from popart_func.tree import PyTree

__all__ = ["CHUNK_SIZE", "lanes", "run"]

CHUNK_SIZE = 1024
"""How many lanes run together by default: 64 blocks of a vector register's 16."""


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
        coordinates["learner"] = np.array(check_learner_names("lanes", "learner", learner), dtype=object)
    for name, values in hyper_parameters.items():
        check_axis(name)
        coordinates[name] = np.array(check_values("lanes", name, values), dtype=np.float64)
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
        store: a directory. If it holds a part of this sweep, the rest is run; if all, nothing is. Whether it is this
            sweep is told by its arguments and, for functions, by what they compute: each seed's data and parameters,
            each learner's first three steps in up to 64 lanes of the grid, what a record keeps of one series. A change
            that shows nowhere there, such as in a learner's fourth step, is not noticed: name another directory.
        workers: None for this process, a number of processes beside it, or ``"ray"``: the cluster that this process is
            connected to, else the one that `ray.init` finds (``RAY_ADDRESS`` names it); ``"ray://host:port"`` connects
            as Ray's client.
        quiet: no progress bar (which is drawn on a terminal only) and no word on what a store held.

    Returns:
        A dataset with the dimensions of ``lanes`` (and ``sample``, for curves): what ``record`` asked for,
        ``diverged_at``, the first sample at which something recorded is not finite, -1 if there is none, and ``done``,
        which is False only for lanes that `load` finds missing. The attributes ``lane_steps`` and ``seconds`` say how
        many steps this call ran, in all its lanes, and how long it took; ``all_lane_steps``, how many the sweep has.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
        EngineUnavailableError, UnsupportedError: the engine can't run here, or not this learner.
        ConnectionError: there is no such Ray cluster.
        ChildProcessError: worker processes keep dying.
        StoreError: another process writes to the store, or it holds another sweep (the message lists the differences),
            or the disk is full.
    """
    started = time.perf_counter()
    device = check_device("run", device)
    check_dtype(dtype)
    check_function("run", "init", init, "seed")
    if callable(data):
        check_function("run", "data", data, "seed")
    workers, chunk_size = check_workers(workers), check_count_of("run", "chunk_size", chunk_size)
    store = None if store is None else check_directory("run", "store", store)
    learners, grid = learners_and_grid(make_learner, lanes, dtype)
    records = checked_records(record, grid)
    chunk_size = min(chunk_size, max(grid.lanes(name) for name in learners))
    work = Work(learners, Starts(init, data, device, dtype), grid, records, chunk_size, engine)
    variables = work.variables()
    check_dimensions(variables, grid)
    work = _with_engine(work, store)
    plan = Plan(grid, chunk_size, variables)
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
    all_lane_steps = configuration["steps"] * sum(map(grid.lanes, learners))
    seconds = time.perf_counter() - started
    return dataset.assign_attrs(lane_steps=lane_steps, all_lane_steps=all_lane_steps, seconds=seconds)


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
            kept.write(chunk, values)
            report.advance(steps * (chunk.stop - chunk.start))
    return lane_steps


def _with_engine(work: Work, store: Path | None) -> Work:
    """Settles what ``"auto"`` means: what the store was begun with, else the first engine that can do it."""
    steps = work.steps()
    if work.engine != "auto":
        return replace(work, engine=resolve_engine(work.engine, work.device, steps, caller="run"))
    if store is not None and (store / CONFIGURATION).exists():
        there = read_configuration(store)["configuration"]["engine"]
        return replace(work, engine=resolve_engine(there, work.device, steps, caller="run"))
    work = replace(work, engine=resolve_engine("auto", work.device, steps, caller="run"))
    if work.engine == "native":
        try:
            work.try_engine()
        except UnsupportedError as error:
            other = next(name for name in ENGINES if name != "native" and steps >= load_engine(name).pays_off_after)
            warnings.warn(f"engine 'auto': {error} Going on with {other}.", stacklevel=3)
            work = replace(work, engine=resolve_engine(other, work.device, steps, caller="run"))
    return work


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
