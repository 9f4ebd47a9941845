"""A sweep on disk: a directory that survives being killed, and that others can read.

``configuration.json``
    What was asked, and a hash of it: only the same sweep is ever continued.
``lanes.zarr``
    The results, one lane after the other, with each lane's hyper-parameters and seed as coordinates: for
    `xarray.open_zarr`. A sweep of several learners has a group for each, ``open_zarr(path, group="sgd")``, and nothing
    at the root but its attributes, which name them.
``done``
    One small file for each chunk of lanes, with the checksums of its files in ``lanes.zarr``.

A chunk's files are written and flushed to the disk; then its file in ``done`` appears, in one atomic move. So a chunk
counts as done only if all of it is on the disk, and everything else is done again. The process that writes holds a
lock, which the operating system takes back however the process ends; a second one is refused. Nothing is pickled: no
code from a store is run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import xarray
import zarr

from popart_func.sweeps.files import (
    PARTIAL,
    canonical,
    check_directory,
    differences,
    digest,
    flush,
    read_sealed,
    write_sealed,
)
from popart_func.sweeps.grid import Chunk, Plan, Values, Variable, dimensions, missing

__all__ = ["CONFIGURATION", "LANES", "ChunkStore", "StoreError", "load", "read_configuration"]

CONFIGURATION, LANES, DONE, LOCK, LABELS = "configuration.json", "lanes.zarr", "done", ".lock", "labels"
FORMAT = 1


class StoreError(OSError):
    """A directory can't be used as asked; the message says why and what to do."""


class ChunkStore:
    """One sweep's directory, open for writing and locked as long as it is entered.

    Args:
        path: the directory; it is made.
        plan: the lanes, and what is kept of each.
        configuration: what else was asked, plain data; another one than that in the directory is refused.
        provenance: who ran it, plain data; written down, not compared.

    Attributes:
        done: the chunks that need not be run.
        found: what was there at the start, one sentence each.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan,
        configuration: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> None:
        self.path = check_directory("ChunkStore", "path", path)
        self.done: set[Chunk] = set()
        self.found: list[str] = []
        self._plan = plan
        self._chunks = plan.chunks()
        self._configuration = {"format": FORMAT, **plan.as_json(), **configuration}
        self._provenance = dict(provenance)
        # Where a file system has no locks, this fails rather than falling back on one that outlives a killed process.
        self._lock = filelock.FileLock(self.path / LOCK, fallback_to_soft=False)

    def __enter__(self) -> ChunkStore:
        """Locks the directory, compares configurations and verifies what is there.

        Raises:
            StoreError: another process is at it, or it holds another sweep, or something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_ours()
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StoreError(
                f"{self.path} is in use by another process: wait until it ends, or name another directory."
            ) from None
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.path} can't be a sweep's directory: {error.strerror or error}. Name another one."
            ) from error
        try:
            self._open()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise self._broken("opened", error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def write(self, chunk: Chunk, values: Values) -> None:
        """Writes a chunk's results; when this returns they are on the disk.

        Raises:
            StoreError: they can't be written, as on a full disk; everything written before stays.
        """
        group, files = self.path / LANES / chunk.learner, _files(self.path, chunk, self._plan.variables)
        try:
            with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk that is all NaN is a file, too
                for name, value in values.items():
                    zarr.open_array(group / name, mode="r+")[chunk.start : chunk.stop] = value
            self._record(_name(chunk), files)
        except OSError as error:
            for file in files:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            raise self._broken("written to", error, f"The {len(self.done)} chunks of {len(self._chunks)}") from error
        self.done.add(chunk)

    def _broken(self, what: str, error: OSError, chunks: str = "All chunks") -> StoreError:
        return StoreError(
            f"{self.path} can't be {what}: {error.strerror or error}. {chunks} that are done are safe: with that "
            f"mended, the same sweep goes on from there."
        )

    def _check_ours(self) -> None:
        """Raises if the directory holds something else: nothing is put beside it, not even a lock."""
        names = sorted(os.listdir(self.path))
        foreign = [name for name in names if name != LOCK and not name.startswith(PARTIAL)]
        if foreign and CONFIGURATION not in names:
            raise StoreError(f"{self.path} holds {foreign[0]!r} and no sweep: name another directory.")

    def _open(self) -> None:
        if not (self.path / CONFIGURATION).exists():
            content = {"configuration": self._configuration, "provenance": self._provenance}
            write_sealed(self.path / CONFIGURATION, content)
            flush(self.path.parent)
        (self.path / DONE).mkdir(exist_ok=True)
        there = read_configuration(self.path)
        self._provenance = there["provenance"]
        lines = differences(there["configuration"], self._configuration)
        # Another grid computes other things, too: hashes only tell where nothing else does.
        lines = [line for line in lines if not line.startswith("fingerprint.")] or lines
        if lines:
            raise StoreError(
                f"{self.path} holds another sweep: name another directory, or ask for the same.\n  "
                + "\n  ".join(lines)
            )
        for leftover in (*self.path.rglob(f"{PARTIAL}*"), *self.path.rglob("*.partial")):
            # It may have gone with the directory that it was in.
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if not _has_labels(self.path):
            if (self.path / DONE / f"{LABELS}.json").exists():
                self.found.append("The labels were damaged: they are written again.")
            self._write_labels()
        self._verify()

    def _verify(self) -> None:
        """Finds out which chunks are done, and removes what there is of the others."""
        damaged, begun = [], 0
        for chunk in self._chunks:
            state = _state(self.path, chunk, self._plan.variables)
            if state == "done":
                self.done.add(chunk)
                continue
            if state == "damaged":
                damaged.append(_name(chunk))
            begun += state == "begun"
            (self.path / DONE / f"{_name(chunk)}.json").unlink(missing_ok=True)
            for file in _files(self.path, chunk, self._plan.variables):
                file.unlink(missing_ok=True)
        if self.done or damaged or begun:
            self.found.append(f"{len(self.done)} of {len(self._chunks)} chunks are done and whole.")
        if damaged:
            self.found.append(f"Damaged, to be run again: {', '.join(damaged)}.")
        if begun:
            self.found.append(f"Begun but not done, to be run again: {begun}.")

    def _write_labels(self) -> None:
        """All of ``lanes.zarr`` but the results: made aside, moved file by file, then recorded."""
        aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.path))
        said = attributes(self._configuration, self._provenance)
        root = zarr.create_group(aside, zarr_format=3, attributes=said)
        learners = [learner for learner in self._plan.grid.takes if learner]
        if learners:
            root.attrs["groups"] = learners
        for learner in self._plan.grid.takes:
            self._write_group(learner, root.create_group(learner, attributes=said) if learner else root)
        with warnings.catch_warnings():
            # Version 3 of the format does not specify consolidated metadata yet; without, `xarray.open_zarr` warns.
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            for group in {"": None, **dict.fromkeys(self._plan.grid.takes)}:
                zarr.consolidate_metadata(aside, path=group or None)
        places = []
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            places.append(self.path / LANES / file.relative_to(aside))
            places[-1].parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, places[-1])
        shutil.rmtree(aside)
        self._record(LABELS, places)

    def _write_group(self, learner: str, group: zarr.Group) -> None:
        named = dimensions(self._plan.variables)
        for name, values in self._plan.grid.coordinates(learner).items():
            group.create_array(name, data=values, chunks=values.shape, dimension_names=("lane",))
        for name, variable in self._plan.variables.items():
            if variable.samples is not None and named[name][0] not in group:
                samples = np.array(variable.samples, dtype=np.int64)
                group.create_array(named[name][0], data=samples, chunks=samples.shape, dimension_names=named[name][:1])
            group.create_array(
                name,
                shape=(self._plan.grid.lanes(learner), *variable.shape),
                chunks=(self._plan.chunk_size, *variable.shape),
                dtype=variable.dtype,
                fill_value=missing(name, variable),
                dimension_names=("lane", *named[name]),
                attributes={"long_name": variable.description},
            )
        group.attrs["coordinates"] = " ".join(self._plan.grid.coordinates(learner))

    def _record(self, name: str, files: list[Path]) -> None:
        """Flushes files to the disk, and then records them with their checksums."""
        for file in files:
            flush(file)
        for directory in {parent for file in files for parent in file.parents if parent.is_relative_to(self.path)}:
            flush(directory)
        found = {file.relative_to(self.path).as_posix(): digest(file.read_bytes()) for file in files}
        write_sealed(self.path / DONE / f"{name}.json", {"files": found})


def load(path: str | Path) -> xarray.Dataset:
    """A sweep from its directory, finished or not, checked against its checksums.

    Args:
        path: as given to `sweeps.run`.

    Returns:
        As `sweeps.run` returns it. In ``done``, lanes that are missing or damaged are False: then there is -2 in
        ``diverged_at`` (not -1, as of a lane that did not diverge), NaN in floats and complex numbers, which is no sign
        of divergence, and 0 in integers and booleans, which is no result. The attribute ``complete`` is 1 where all are
        done. Statistics take NaN for a lane that diverged: give them what is done alone.

    Raises:
        TypeError: the path is none.
        StoreError: there is no sweep, or what it says of itself is damaged.
    """
    path = check_directory("load", "path", path)
    content = read_configuration(path)
    if not _has_labels(path):
        raise StoreError(f"{path}: the labels are not there or damaged: run the same sweep again, which mends them.")
    plan = Plan.from_json(content["configuration"])
    values = {learner: plan.empty(learner) for learner in plan.grid.takes}
    complete = True
    for chunk in plan.chunks():
        if _state(path, chunk, plan.variables) != "done":
            complete = False
            continue
        for name, kept in values[chunk.learner].items():
            array = zarr.open_array(path / LANES / chunk.learner / name, mode="r")
            kept[chunk.start : chunk.stop] = array[chunk.start : chunk.stop]
    dataset = plan.dataset(values)
    return dataset.assign_attrs(attributes(content["configuration"], content["provenance"]), complete=int(complete))


def attributes(configuration: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of itself: the configuration as text, its hash, and the rest as plain entries."""
    text = canonical(configuration)
    plain = {name: configuration[name] for name in ("engine", "device", "dtype")}
    return {**provenance, **plain, "configuration": text, "configuration_sha256": digest(text.encode())}


def read_configuration(path: Path) -> dict[str, Any]:
    """What ``configuration.json`` holds.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    content = read_sealed(path / CONFIGURATION)
    if content is None:
        if not path.is_dir():
            raise StoreError(f"{path} is {'a file' if path.exists() else 'not there'}: no sweep.")
        reason = "is damaged: move the directory away" if (path / CONFIGURATION).exists() else "is not there: no sweep"
        raise StoreError(f"{path / CONFIGURATION} {reason}.")
    if content["configuration"]["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {content['configuration']['format']}, and this version of popart_func reads {FORMAT}."
        )
    return content


def _name(chunk: Chunk) -> str:
    return f"{chunk.learner}-{chunk.number:05}" if chunk.learner else f"{chunk.number:05}"


def _files(path: Path, chunk: Chunk, variables: Mapping[str, Variable]) -> list[Path]:
    """Where a chunk's results lie: one file for each variable."""
    return [
        (path / LANES / chunk.learner / name).joinpath("c", str(chunk.number), *("0" for _ in variable.shape))
        for name, variable in variables.items()
    ]


def _state(path: Path, chunk: Chunk, variables: Mapping[str, Variable]) -> str:
    """``"done"``, ``"damaged"``, ``"begun"`` or ``"missing"``."""
    files = _files(path, chunk, variables)
    if not (path / DONE / f"{_name(chunk)}.json").exists():
        return "begun" if any(file.exists() for file in files) else "missing"
    recorded = _recorded(path, _name(chunk))
    if recorded is None or recorded.keys() != set(files):
        return "damaged"
    return "done" if all(_is_whole(file, expected) for file, expected in recorded.items()) else "damaged"


def _has_labels(path: Path) -> bool:
    """Whether all but the results is there and whole."""
    labels = _recorded(path, LABELS)
    return labels is not None and all(_is_whole(file, expected) for file, expected in labels.items())


def _recorded(path: Path, name: str) -> dict[Path, str] | None:
    """The files that were recorded under a name, with their checksums, or None."""
    content = read_sealed(path / DONE / f"{name}.json")
    return None if content is None else {path / file: expected for file, expected in content["files"].items()}


def _is_whole(file: Path, expected: str) -> bool:
    try:
        return digest(file.read_bytes()) == expected
    except OSError:
        return False
