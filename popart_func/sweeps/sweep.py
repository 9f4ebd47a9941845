"""`run`: every hyper-parameter is a lane, so a whole grid of settings and seeds is one run, in chunks of lanes.

It runs any learner and any network. With ``store`` a sweep survives being killed: the same call goes on where it ended,
and its result is that of an uninterrupted run, bit for bit. With ``workers`` other processes, or a Ray cluster, do the
computing: the numbers and the store are the same. What is kept of each lane is chosen by `records`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xarray
from torch import Tensor

from popart_func.display.progress import show_progress
from popart_func.engines import ENGINES, EngineLike, Native, UnsupportedError, load_engine, resolve_engine
from popart_func.engines.engine import name_and_options
from popart_func.engines.tracing.source_lines import TraceError
from popart_func.sweeps._checks import as_count, as_device, check_function
from popart_func.sweeps.configuration import CONFIGURATION, StoreError, attributes, provenance, read_configuration
from popart_func.sweeps.files import as_directory
from popart_func.sweeps.fingerprint import fingerprint
from popart_func.sweeps.grid import Grid
from popart_func.sweeps.growth import in_order_of, part_of, stored_chunk_size
from popart_func.sweeps.inputs import Inputs
from popart_func.sweeps.job import Job
from popart_func.sweeps.lanes_zarr import LABELS
from popart_func.sweeps.records import Record
from popart_func.sweeps.schema import Arrays, Chunk, Schema
from popart_func.sweeps.store import Store, load
from popart_func.sweeps.validation import (
    MakeLearner,
    as_learners_and_lanes,
    as_records,
    as_workers,
    check_dimensions,
    check_dtype,
)
from popart_func.sweeps.workers import Workers, run_chunks
from popart_func.tree import PyTree

__all__ = ["CHUNK_SIZE", "run"]

CHUNK_SIZE = 1024
"""The number of lanes in a chunk by default: 64 blocks of the 16 lanes that a vector register holds."""


def run(
    make_learner: MakeLearner | Mapping[str, MakeLearner],
    data: PyTree | Callable[[int], PyTree],
    init: Callable[[int], PyTree],
    lanes: Grid,
    *,
    record: Mapping[str, Record | Callable[[Tensor], Tensor]] | None = None,
    chunk_size: int = CHUNK_SIZE,
    engine: EngineLike = "auto",
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
            Several learners are a mapping from their names. A learner does not run again for the values of a
            hyper-parameter that is not in its signature. Its ``update(state, x)`` gets one sample of ``data``.
        data: what all lanes learn from, a tree of tensors ``[time, ...]``; or ``data(seed)``, such a tree for each
            seed, all of one length.
        init: ``init(seed) -> params``, a tree of tensors: what a learner's ``init`` takes.
        lanes: the grid, as `lanes` builds it.
        record: what is kept, by name; see `records`. By default ``{"error": every()}``, the full curves.
        chunk_size: the number of lanes that run together. Each worker holds one chunk's inputs and series in memory.
        engine: one of `popart_func.engines.ENGINES`, an object with its options, or ``"auto"``. A store keeps what
            ``"auto"`` chose, and the schedule that ``"native"`` chose for the lanes of the whole grid.
        device: where the lanes run.
        dtype: of parameters that are floats, and of hyper-parameters.
        store: a directory. If it holds a part of this sweep, the rest runs; if it holds all, nothing runs. If the sweep
            there has fewer seeds, values or steps, it grows, see `growth`. Sweeps are the same if their arguments are
            and, since functions can't be compared, if these compute the same: each seed's data and parameters, each
            learner's first three steps in up to 64 lanes of the grid, what a record keeps of one series. A change that
            shows in none of them, such as in a learner's fourth step, is not noticed: name another directory.
        workers: None for this process; a number of processes beside it; a `concurrent.futures.Executor`, or anything
            with its ``submit``, such as submitit's for Slurm, of which each chunk is a job; or ``"ray"``: the cluster
            that this process is connected to, else the one that `ray.init` finds (``RAY_ADDRESS`` names it);
            ``"ray://host:port"`` connects as Ray's client.
        quiet: show neither progress (a bar on a terminal, elsewhere a line now and then) nor messages on what a store
            held.

    Returns:
        A dataset with the dimensions of ``lanes`` (and ``sample``, for curves). Its variables are those of ``record``;
        ``diverged_at``, the first sample at which something recorded is not finite, or -1; and ``done``, which is False
        only for lanes that `load` finds missing. Attributes: ``lane_steps`` and ``seconds``, the steps that this call
        ran in all its lanes and how long it took; ``all_lane_steps``, the steps that the sweep has.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
        EngineUnavailableError, UnsupportedError: the engine can't run here, or not this learner.
        ConnectionError: there is no such Ray cluster.
        ChildProcessError: worker processes keep dying, or an executor has broken.
        StoreError: another process writes to the store, or it holds another sweep (the message lists the differences),
            or the disk is full, or can't be read back.
    """
    started = time.perf_counter()
    device = as_device("run", device)
    check_dtype(dtype)
    check_function("run", "init", init, "seed")
    if callable(data):
        check_function("run", "data", data, "seed")
    workers, chunk_size = as_workers(workers), as_count("run", "chunk_size", chunk_size)
    path = None if store is None else as_directory("run", "store", store)
    learners, lane_axes = as_learners_and_lanes(make_learner, lanes, dtype)
    records = as_records(record, lane_axes)
    there = None if path is None else _stored(path)
    chunk_size = stored_chunk_size(chunk_size, lane_axes, there)
    job = Job(learners, Inputs(init, data, device, dtype), lane_axes, records, chunk_size, str(engine))
    variables = job.variables()
    check_dimensions(variables, lane_axes)
    job = in_order_of(_with_engine(job, there), there)
    schema, configuration = Schema(job.lanes, chunk_size, variables), _configuration(job)
    started_by = provenance()
    if path is None:
        memory = _Memory(schema)
        lane_steps = _run_missing(job, memory, schema, workers, quiet)
        described = attributes({**schema.as_json(), **configuration}, started_by)
        dataset = schema.dataset(memory.results).assign_attrs(described, complete=1)
    else:
        part = part_of(job, there)
        before = None if part is None else {**_schema(part).as_json(), **_configuration(part)}
        with Store(path, schema, configuration, started_by, grows_from=before) as on_disk:
            lane_steps = _run_missing(job, on_disk, schema, workers, quiet)
        dataset = load(path)
        if not dataset.attrs["complete"]:
            raise StoreError(f"{path} can't be read back as it was written: the same call runs again what is damaged.")
    all_lane_steps = job.steps() * sum(map(lane_axes.count, learners))
    seconds = time.perf_counter() - started
    return dataset.assign_attrs(lane_steps=lane_steps, all_lane_steps=all_lane_steps, seconds=seconds)


def _stored(path: Path) -> dict[str, Any] | None:
    """The configuration of the sweep that a directory holds; None where it holds none."""
    try:
        if not any((path / name).exists() for name in (CONFIGURATION, LABELS)):
            return None
    except OSError:  # a path that can be no directory, as `Store` then says
        return None
    found: dict[str, Any] = read_configuration(path)["configuration"]
    return found


def _schema(job: Job) -> Schema:
    return Schema(job.lanes, job.chunk_size, job.variables())


def _configuration(job: Job) -> dict[str, Any]:
    """What is compared of a sweep besides its schema."""
    return {
        "steps": job.steps(),
        "engine": job.engine,
        "device": job.device.type,
        "dtype": str(job.inputs.dtype).removeprefix("torch."),
        "versions": job.environment(),
        "fingerprint": fingerprint(job),
    }


class _Memory:
    """Holds the results of a sweep without a store; has the attributes and the ``write`` of `Store`."""

    def __init__(self, schema: Schema) -> None:
        self.results = {learner: schema.empty(learner) for learner in schema.lanes.takes}
        self.done: set[Chunk] = set()
        self.messages: list[str] = []

    def write(self, chunk: Chunk, results: Arrays) -> None:
        for name, values in results.items():
            self.results[chunk.learner][name][chunk.start : chunk.stop] = values


def _run_missing(job: Job, kept: _Memory | Store, schema: Schema, workers: Workers, quiet: bool) -> int:
    """Runs the chunks that are not done yet; returns the number of their lane-steps."""
    missing, done = [chunk for chunk in schema.chunks() if chunk not in kept.done], 0
    lane_steps = job.steps() * sum(chunk.stop - chunk.start for chunk in missing)
    with show_progress("M lane-steps", rate=10**6, quiet=quiet) as progress:
        for message in kept.messages:
            progress.say(message)
        if missing:
            progress.show("sweep", 0, lane_steps)
        for chunk, results in run_chunks(job, missing, workers):
            kept.write(chunk, results)
            done += job.steps() * (chunk.stop - chunk.start)
            progress.show("sweep", done, lane_steps)
    return lane_steps


def _with_engine(job: Job, there: Mapping[str, Any] | None) -> Job:
    """Replaces an engine that leaves a choice by what the store was begun with, else by what suits the whole grid.

    ``"auto"`` becomes the first engine that can run the job, and ``"native"`` the schedule for all lanes of the grid:
    a lane's bits must not depend on the chunks.

    Args:
        job: the sweep.
        there: the store's configuration; None for a new sweep.
    """
    steps = job.steps()

    def resolved(engine: EngineLike) -> Job:
        return replace(job, engine=resolve_engine(engine, job.device, steps, caller="run"))

    if there is not None and job.engine in ("auto", "native"):
        begun = there["engine"]
        if job.engine == "auto" or name_and_options(begun)[0] == "native":
            return resolved(begun)
    chosen = resolved(job.engine)
    while chosen.engine != "eager":
        try:
            if chosen.engine == "native" and job.device.type == "cpu":
                chosen = replace(chosen, engine=str(Native(chosen.faster_schedule())))
            if job.engine == "auto":
                chosen.try_engine()
            break
        except (TraceError, UnsupportedError) as error:
            if job.engine != "auto":
                raise
            # What can't be traced runs on no compiled engine.
            place = ENGINES.index(name_and_options(chosen.engine)[0])
            after = ENGINES[-1:] if isinstance(error, TraceError) else ENGINES[place + 1 :]
            other = next(name for name in after if _pays_off(name, job.device, steps))
            warnings.warn(f"engine 'auto': {error} Going on with {other}.", stacklevel=3)
            chosen = replace(job, engine=other)
    return chosen


def _pays_off(engine: str, device: torch.device, steps: int) -> bool:
    """Whether an engine can run on a device and runs fast enough to earn back its compilation."""
    found = load_engine(engine)
    return steps >= found.pays_off_after and found.why_not(device) is None
