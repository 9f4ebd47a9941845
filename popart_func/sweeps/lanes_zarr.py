"""``lanes.zarr``: a sweep's results in zarr's format, one lane after the other, each array cut into chunks of lanes.

zarr writes each chunk of an array atomically, with a CRC-32C checksum inside it: reading a damaged chunk raises, in any
program. A chunk of lanes is one file for each variable. ``diverged_at`` is written last, once the other files are on
the disk, so a chunk of lanes is done as soon as that file is there. zarr's metadata has no checksums: the *labels*,
that is, everything but the results, have theirs in ``labels.json``.

Opening an array runs no code, whatever a store holds: zarr is asked for its format 3 alone, and only after
`LanesZarr.has_labels` has read the array's metadata and found the dtype, shape and codecs that this module writes.
"""

from __future__ import annotations

import functools
import json
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
from popart_func.sweeps.schema import DIVERGED, NOT_RUN, Arrays, Chunk, Schema, Variable, dimensions, fill_value

__all__ = ["LABELS", "LANES", "LanesZarr", "consolidating"]

LANES, LABELS = "lanes.zarr", "labels.json"
"""The results, and the checksums of all but the results, in a sweep's directory."""

_CODECS = (ZstdCodec(), Crc32cCodec())


class LanesZarr:
    """A sweep's results and labels in its directory.

    Args:
        directory: the sweep's.
        schema: what the results look like.
    """

    def __init__(self, directory: Path, schema: Schema) -> None:
        self._directory, self._schema = directory, schema

    def files(self, chunk: Chunk) -> dict[str, Path]:
        """The file of each variable of a chunk, `DIVERGED` first."""
        variables = sorted(self._schema.variables.items(), key=lambda item: item[0] != DIVERGED)
        arrays = self._directory / LANES / chunk.learner
        return {name: arrays.joinpath(name, "c", str(chunk.number), *"0" * len(one.shape)) for name, one in variables}

    def write(self, chunk: Chunk, results: Arrays) -> None:
        """Writes a chunk's results, each variable ``[lanes, ...]``; when this returns they are on the disk."""
        files = self.files(chunk)
        for names in ([name for name in files if name != DIVERGED], [DIVERGED]):
            with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk that is all NaN is a file, too
                for name in names:
                    array = zarr.open_array(self._directory / LANES / chunk.learner / name, mode="r+", zarr_format=3)
                    array[chunk.start : chunk.stop] = results[name]
            self._flush(files[name] for name in names)

    def read(self, chunk: Chunk) -> Arrays | None:
        """A chunk's results, each variable ``[lanes, ...]``; None if they are not all there and whole."""
        if not all(file.is_file() for file in self.files(chunk).values()):
            return None  # zarr would read a missing file as fill values
        arrays = self._arrays[chunk.learner]
        try:
            return {name: np.asarray(array[chunk.start : chunk.stop]) for name, array in arrays.items()}
        except (OSError, ValueError):  # the file can't be read, or its checksum does not match
            return None

    def remove(self, chunks: Iterable[Chunk]) -> None:
        """Removes what there is of chunks; when this returns, nothing of them comes back with a crash."""
        for chunk in chunks:
            removed = [file for file in self.files(chunk).values() if file.exists()]
            for file in removed:
                file.unlink()
            for folder in {file.parent for file in removed}:
                flush(folder)

    def state(self, chunk: Chunk) -> Literal["done", "damaged", "begun", "missing"]:
        """How much of a chunk is there.

        ``"begun"``: some files, but not the one that is written last; or only the lanes that a smaller sweep had.
        """
        files = self.files(chunk)
        if not files[DIVERGED].exists():
            return "begun" if any(file.exists() for file in files.values()) else "missing"
        found = self.read(chunk)
        if found is None:
            return "damaged"
        return "begun" if (found[DIVERGED] == NOT_RUN).any() else "done"

    def write_labels(self, attributes: Mapping[str, Any]) -> None:
        """Writes all but the results: makes it aside, moves it file by file, then records it in ``labels.json``.

        Args:
            attributes: of each group: what the sweep says of itself.
        """
        aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self._directory))
        root = zarr.create_group(aside, zarr_format=3, attributes=dict(attributes))
        learners = [learner for learner in self._schema.lanes.takes if learner]
        if learners:
            root.attrs["groups"] = learners
        for learner in self._schema.lanes.takes:
            group = root.create_group(learner, attributes=dict(attributes)) if learner else root
            self._write_group(learner, group)
        with consolidating():
            for path in ("", *learners):
                zarr.consolidate_metadata(aside, path=path or None)
        files = []
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            files.append(self._directory / LANES / file.relative_to(aside))
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, files[-1])
        shutil.rmtree(aside)
        self._flush(files)
        checksums = {file.relative_to(self._directory).as_posix(): digest(file.read_bytes()) for file in files}
        write_sealed(self._directory / LABELS, {"files": checksums})

    def has_labels(self) -> bool:
        """Whether all that `write_labels` wrote is there and unchanged, and no array would run foreign code if opened.

        A checksum shows damage, not intent: whoever changes a file can change its checksum, too. So what decides how
        zarr reads an array is compared with what this module writes, before zarr sees it.
        """
        try:
            content = read_sealed(self._directory / LABELS)
            return (
                content is not None
                and all(digest((self._directory / name).read_bytes()) == sha for name, sha in content["files"].items())
                and all(
                    self._is_ours(learner, name, variable)
                    for learner in self._schema.lanes.takes
                    for name, variable in self._schema.variables.items()
                )
            )
        except (OSError, ValueError):
            return False

    def _is_ours(self, learner: str, name: str, variable: Variable) -> bool:
        """Whether the metadata of an array of results has the dtype, shape, chunks and codecs that are written here."""
        metadata = json.loads((self._directory / LANES / learner / name / "zarr.json").read_bytes())
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *(codec.to_dict() for codec in _CODECS)]
        if variable.dtype.itemsize == 1:
            codecs[0] = {"name": "bytes"}
        expected = {
            "zarr_format": 3,
            "node_type": "array",
            "data_type": variable.dtype.name,
            "shape": [self._schema.lanes.count(learner), *variable.shape],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self._schema.chunk_size, *variable.shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs,
            "storage_transformers": [],
        }
        described = {"attributes", "dimension_names", "fill_value"}  # data that decides nothing
        return (
            variable.dtype.kind in "biufc"
            and isinstance(metadata, dict)
            and {key: value for key, value in metadata.items() if key not in described} == expected
        )

    @functools.cached_property
    def _arrays(self) -> dict[str, dict[str, zarr.Array[Any]]]:
        """The results of each learner, open for reading; only after `has_labels` has said that they are ours."""
        lanes = self._directory / LANES
        return {
            learner: {
                name: zarr.open_array(lanes / learner / name, mode="r", zarr_format=3)
                for name in self._schema.variables
            }
            for learner in self._schema.lanes.takes
        }

    def _write_group(self, learner: str, group: zarr.Group) -> None:
        """Writes a learner's coordinates, and arrays without chunks for its results."""
        named, coordinates = dimensions(self._schema.variables), self._schema.lanes.coordinates(learner)
        axes = {name: ("lane", values) for name, values in coordinates.items()}
        for name, variable in self._schema.variables.items():
            if variable.samples is not None:
                axes.setdefault(named[name][0], (named[name][0], np.array(variable.samples, dtype=np.int64)))
            group.create_array(
                name,
                shape=(self._schema.lanes.count(learner), *variable.shape),
                chunks=(self._schema.chunk_size, *variable.shape),
                dtype=variable.dtype,
                fill_value=fill_value(name, variable),
                dimension_names=("lane", *named[name]),
                attributes={"long_name": variable.description},
                compressors=_CODECS,
            )
        for name, (dim, values) in axes.items():
            group.create_array(name, data=values, chunks=values.shape, dimension_names=(dim,), compressors=_CODECS)
        group.attrs["coordinates"] = " ".join(coordinates)

    def _flush(self, files: Iterable[Path]) -> None:
        """Waits until files, and the entries of the directories that lead to them, are on the disk."""
        directories = set()
        for file in files:
            flush(file)
            directories |= {parent for parent in file.parents if parent.is_relative_to(self._directory)}
        for directory in directories:
            flush(directory)


@contextmanager
def consolidating() -> Iterator[None]:
    """Silences zarr's warning that its version 3 does not specify consolidated metadata, without which xarray warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield
