"""Store: a sweep's directory, which survives being killed, and which other programs can read.

``configuration.json``
    What was asked, and a hash of it: only the same sweep is ever continued. The attributes of ``lanes.zarr`` are a copy
    of it, from which it is mended.
``lanes.zarr``
    The results, one lane after the other, with each lane's hyper-parameters and seed as coordinates: for
    `xarray.open_zarr`. A sweep of several learners has a group for each, ``open_zarr(path, group="sgd")``, and nothing
    at the root but its attributes, which name them.
``labels.json``
    The checksums of all of ``lanes.zarr`` but the results, which have checksums of their own.

A chunk counts as done only if all its files are there and their checksums match; everything else runs again. The
process that writes holds a lock, which the operating system takes back however the process ends; a second process is
refused. Nothing is pickled, and no code from a store is run: an array is opened only if its metadata has the dtype and
codecs that are written here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import xarray

from popart_func.sweeps.configuration import CONFIGURATION, FORMAT, StoreError, attributes, read_configuration
from popart_func.sweeps.files import PARTIAL, as_directory, differences, flush, read_sealed, write_sealed
from popart_func.sweeps.lanes_zarr import LABELS, LanesZarr
from popart_func.sweeps.schema import DIVERGED, NOT_RUN, Arrays, Chunk, Schema

__all__ = ["Store", "load"]

LOCK = ".lock"


class Store:
    """One sweep's directory, open for writing and locked inside a ``with`` block.

    Args:
        path: the directory; it is made.
        schema: what the results look like.
        configuration: what else was asked, plain data. A directory with another configuration is refused.
        provenance: who ran it, plain data; written down, not compared.
        grows_from: the schema and configuration of a smaller sweep, plain data; where the directory holds that one, it
            grows.

    Attributes:
        done: the chunks that need not run.
        messages: what the directory held when it was opened, one sentence each.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        configuration: Mapping[str, Any],
        provenance: Mapping[str, Any],
        *,
        grows_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.done: set[Chunk] = set()
        self.messages: list[str] = []
        self._schema, self._lanes = schema, LanesZarr(path, schema)
        self._chunks = schema.chunks()
        self._configuration = {"format": FORMAT, **schema.as_json(), **configuration}
        self._provenance = dict(provenance)
        self._grows_from = None if grows_from is None else {"format": FORMAT, **grows_from}
        # On a file system without locks this fails, rather than fall back on a lock that outlives a killed process.
        self._lock = filelock.FileLock(self.path / LOCK, fallback_to_soft=False)

    def __enter__(self) -> Store:
        """Locks the directory, compares configurations and verifies the chunks that are there.

        Raises:
            StoreError: another process has locked it, or it holds another sweep, or something else.
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
            self.__exit__()
            if isinstance(error, OSError) and not isinstance(error, StoreError):
                raise self._broken("opened", error) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # All is on the disk: where unlocking fails, the operating system does it once this process ends.
        with contextlib.suppress(OSError):
            self._lock.release()

    def write(self, chunk: Chunk, results: Arrays) -> None:
        """Writes a chunk's results; when this returns they are on the disk.

        Raises:
            StoreError: they can't be written, as on a full disk; everything written before stays.
        """
        try:
            self._lanes.write(chunk, results)
        except OSError as error:
            for file in self._lanes.files(chunk).values():
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            raise self._broken("written to", error, f"The {len(self.done)} chunks of {len(self._chunks)}") from error
        self.done.add(chunk)

    def _broken(self, what: str, error: OSError, chunks: str = "All chunks") -> StoreError:
        return StoreError(
            f"{self.path} can't be {what}: {error.strerror or error}. {chunks} that are done are safe: once that is "
            f"mended, the same sweep goes on from there."
        )

    def _check_ours(self) -> None:
        """Raises if the directory holds something else: nothing is put beside it, not even a lock."""
        names = sorted(os.listdir(self.path))
        foreign = [name for name in names if name != LOCK and not name.startswith(PARTIAL)]
        if foreign and CONFIGURATION not in names and LABELS not in names:
            raise StoreError(f"{self.path} holds {foreign[0]!r} and no sweep: name another directory.")

    def _open(self) -> None:
        if not (self.path / CONFIGURATION).exists() and not (self.path / LABELS).exists():
            content = {"configuration": self._configuration, "provenance": self._provenance}
            write_sealed(self.path / CONFIGURATION, content)
            flush(self.path.parent)
        there = read_configuration(self.path)
        if self._grows_from is not None and not differences(there["configuration"], self._grows_from):
            there = self._grow(there)
        lines = differences(there["configuration"], self._configuration)
        # Another grid also computes other things: the hashes are worth telling only where nothing else differs.
        lines = [line for line in lines if not line.startswith("fingerprint.")] or lines
        if lines:
            raise StoreError(
                f"{self.path} holds another sweep: name another directory, or ask for the same.\n  "
                + "\n  ".join(lines)
            )
        if read_sealed(self.path / CONFIGURATION) is None:
            self.messages.append(f"{CONFIGURATION} was damaged: it is written again.")
            write_sealed(self.path / CONFIGURATION, there)
        for leftover in (*self.path.rglob(f"{PARTIAL}*"), *self.path.rglob("*.partial")):
            # A leftover inside a leftover has gone with it.
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if not self._lanes.has_labels():
            if (self.path / LABELS).exists():
                self.messages.append("The labels were damaged: they are written again.")
            self._lanes.write_labels(attributes(self._configuration, there["provenance"]))
        self._verify()

    def _grow(self, there: dict[str, Any]) -> dict[str, Any]:
        """Makes the larger sweep of the smaller one that is there, and returns what `read_configuration` now would.

        Whatever ends this halfway leaves the smaller sweep or, from the moment that the configuration is replaced, the
        larger one. Either lacks its labels then, which `_open` writes.
        """
        before = Schema.from_json(there["configuration"])
        fewer, steps = there["configuration"]["steps"], self._configuration["steps"]
        if fewer != steps:
            growth = f"{fewer} to {steps} steps: all lanes run again"
            # What was kept of fewer steps must never pass for what is kept of more.
            LanesZarr(self.path, before).remove(before.chunks())
        else:
            lanes = [sum(map(axes.count, axes.takes)) for axes in (before.lanes, self._schema.lanes)]
            growth = f"{lanes[0]} to {lanes[1]} lanes"
        (self.path / LABELS).unlink(missing_ok=True)
        flush(self.path)
        now = {"configuration": self._configuration, "provenance": there["provenance"]}
        write_sealed(self.path / CONFIGURATION, now)
        self.messages.append(f"The sweep grows from {growth}.")
        return now

    def _verify(self) -> None:
        """Finds out which chunks are done, and removes what there is of the others."""
        damaged, begun = [], 0
        for chunk in self._chunks:
            state = self._lanes.state(chunk)
            if state == "done":
                self.done.add(chunk)
                continue
            if state == "damaged":
                damaged.append(f"{chunk.learner}-{chunk.number:05}" if chunk.learner else f"{chunk.number:05}")
            begun += state == "begun"
            self._lanes.remove([chunk])
        if self.done or damaged or begun:
            self.messages.append(f"{len(self.done)} of {len(self._chunks)} chunks are done and whole.")
        if damaged:
            self.messages.append(f"Damaged, to be run again: {', '.join(damaged)}.")
        if begun:
            self.messages.append(f"Begun but not done, to be run again: {begun}.")


def load(path: str | Path) -> xarray.Dataset:
    """Reads a sweep from its directory, finished or not, and checks it against its checksums.

    Args:
        path: as given to `sweeps.run`.

    Returns:
        As `sweeps.run` returns it. In ``done``, lanes that are missing or damaged are False. Such a lane has -2 in
        ``diverged_at`` (a lane that did not diverge has -1), NaN in floats and complex numbers, and 0 in integers and
        booleans. Statistics take NaN for a lane that diverged: give them only lanes that are done. The attribute
        ``complete`` is 1 where all lanes are done.

    Raises:
        TypeError: the path is none.
        StoreError: there is no sweep, or its labels are damaged, or its configuration and the copy of it, or a file
            can't be read.
    """
    path = as_directory("load", "path", path)
    content = read_configuration(path)
    schema, complete = Schema.from_json(content["configuration"]), True
    lanes = LanesZarr(path, schema)
    if not lanes.has_labels():
        raise StoreError(f"{path}: the labels are not there or damaged: run the same sweep again, which mends them.")
    results = {learner: schema.empty(learner) for learner in schema.lanes.takes}
    for chunk in schema.chunks():
        try:
            found = lanes.read(chunk)
        except OSError as error:
            raise StoreError(f"{path} can't be read: {error.strerror or error}.") from error
        complete = complete and found is not None and not (found[DIVERGED] == NOT_RUN).any()
        for name, values in (found or {}).items():
            results[chunk.learner][name][chunk.start : chunk.stop] = values
    dataset = schema.dataset(results)
    return dataset.assign_attrs(attributes(content["configuration"], content["provenance"]), complete=int(complete))
