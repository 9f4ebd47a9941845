"""``lanes.zarr``: a sweep's results in zarr's format, one lane after the other, each array cut into chunks of lanes.

zarr writes each chunk of an array atomically, with a CRC-32C checksum inside it: whoever opens the array is told of a
damaged chunk. A chunk of lanes is one file for each variable. `write_chunk` writes ``diverged_at`` last, once the other
files are on the disk, so a chunk of lanes is done as soon as that file is there. zarr's metadata has no checksums: the
*labels*, that is, everything but the results, have theirs in ``labels.json``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from popart_func.sweeps.files import PARTIAL, digest, flush, read_sealed, write_sealed
from popart_func.sweeps.schema import DIVERGED, Arrays, Chunk, Schema, dimensions, fill_value

__all__ = [
    "LABELS",
    "LANES",
    "ChunkReader",
    "chunk_files",
    "consolidating",
    "labels_are_whole",
    "write_chunk",
    "write_labels",
]

LANES, LABELS = "lanes.zarr", "labels.json"
"""The results, and the checksums of all but the results, in a sweep's directory."""

_CODECS = (ZstdCodec(), Crc32cCodec())


def chunk_files(path: Path, chunk: Chunk, schema: Schema) -> dict[str, Path]:
    """The file of each variable of a chunk of lanes, `DIVERGED` first.

    Args:
        path: the sweep's directory.
        chunk: the chunk.
        schema: the sweep's.
    """
    names = sorted(schema.variables, key=lambda name: name != DIVERGED)
    return {
        name: (path / LANES / chunk.learner / name).joinpath(
            "c", str(chunk.number), *("0" for _ in schema.variables[name].shape)
        )
        for name in names
    }


def write_chunk(path: Path, chunk: Chunk, results: Arrays, schema: Schema) -> None:
    """Writes a chunk's results; when this returns they are on the disk.

    Args:
        path: the sweep's directory.
        chunk: the chunk.
        results: each variable, ``[lanes, ...]``.
        schema: the sweep's.
    """
    files = chunk_files(path, chunk, schema)
    others = [name for name in files if name != DIVERGED]
    for names in (others, [DIVERGED]):
        with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk that is all NaN is a file, too
            for name in names:
                array = zarr.open_array(path / LANES / chunk.learner / name, mode="r+")
                array[chunk.start : chunk.stop] = results[name]
        _flush(path, [files[name] for name in names])


class ChunkReader:
    """Reads chunks, whose labels must be whole.

    Args:
        path: the sweep's directory.
        schema: the sweep's.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._path, self._schema = path, schema
        self._arrays = {
            learner: {name: zarr.open_array(path / LANES / learner / name, mode="r") for name in schema.variables}
            for learner in schema.lanes.takes
        }

    def read(self, chunk: Chunk) -> Arrays | None:
        """A chunk's results, each variable ``[lanes, ...]``; None if they are not all there and whole."""
        if not all(file.is_file() for file in chunk_files(self._path, chunk, self._schema).values()):
            return None  # zarr would read a missing file as fill values
        arrays = self._arrays[chunk.learner]
        try:
            return {name: np.asarray(array[chunk.start : chunk.stop]) for name, array in arrays.items()}
        except (OSError, ValueError):  # a checksum does not match, or the file can't be read
            return None

    def state(self, chunk: Chunk) -> Literal["done", "damaged", "begun", "missing"]:
        """How much of a chunk is there; ``"begun"``: some files, but not the last one."""
        files = chunk_files(self._path, chunk, self._schema)
        if not files[DIVERGED].exists():
            return "begun" if any(file.exists() for file in files.values()) else "missing"
        return "damaged" if self.read(chunk) is None else "done"


def write_labels(path: Path, schema: Schema, attributes: Mapping[str, Any]) -> None:
    """Writes all of ``lanes.zarr`` but the results: made aside, moved file by file, then recorded in ``labels.json``.

    Args:
        path: the sweep's directory.
        schema: the sweep's.
        attributes: what each group says of the sweep.
    """
    aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path))
    root = zarr.create_group(aside, zarr_format=3, attributes=dict(attributes))
    learners = [learner for learner in schema.lanes.takes if learner]
    if learners:
        root.attrs["groups"] = learners
    for learner in schema.lanes.takes:
        _write_group(learner, root.create_group(learner, attributes=dict(attributes)) if learner else root, schema)
    with consolidating():
        for group in {"": None, **dict.fromkeys(schema.lanes.takes)}:
            zarr.consolidate_metadata(aside, path=group or None)
    files = []
    for file in sorted(one for one in aside.rglob("*") if one.is_file()):
        files.append(path / LANES / file.relative_to(aside))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, files[-1])
    shutil.rmtree(aside)
    _flush(path, files)
    sums = {file.relative_to(path).as_posix(): digest(file.read_bytes()) for file in files}
    write_sealed(path / LABELS, {"files": sums})


def labels_are_whole(path: Path) -> bool:
    """Whether all that `write_labels` wrote is there and unchanged."""
    content = read_sealed(path / LABELS)
    if content is None:
        return False
    try:
        return all(digest((path / file).read_bytes()) == expected for file, expected in content["files"].items())
    except OSError:
        return False


@contextmanager
def consolidating() -> Iterator[None]:
    """Silences zarr's warning that its version 3 does not specify consolidated metadata yet.

    Without consolidated metadata, `xarray.open_zarr` warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield


def _write_group(learner: str, group: zarr.Group, schema: Schema) -> None:
    """Writes one learner's coordinates, and its results as arrays without chunks."""
    named, coordinates = dimensions(schema.variables), schema.lanes.coordinates(learner)

    def write_coordinate(name: str, values: np.ndarray, dimension: str) -> None:
        group.create_array(name, data=values, chunks=values.shape, dimension_names=(dimension,), compressors=_CODECS)

    for name, values in coordinates.items():
        write_coordinate(name, values, "lane")
    for name, variable in schema.variables.items():
        if variable.samples is not None and named[name][0] not in group:
            write_coordinate(named[name][0], np.array(variable.samples, dtype=np.int64), named[name][0])
        group.create_array(
            name,
            shape=(schema.lanes.count(learner), *variable.shape),
            chunks=(schema.chunk_size, *variable.shape),
            dtype=variable.dtype,
            fill_value=fill_value(name, variable),
            dimension_names=("lane", *named[name]),
            attributes={"long_name": variable.description},
            compressors=_CODECS,
        )
    group.attrs["coordinates"] = " ".join(coordinates)


def _flush(path: Path, files: Iterable[Path]) -> None:
    """Waits until files, and their entries in the directories up to the sweep's, are on the disk."""
    files = list(files)
    for file in files:
        flush(file)
    for directory in {parent for file in files for parent in file.parents if parent.is_relative_to(path)}:
        flush(directory)
