"""Schema of a sweep's results: which lanes each learner has, in which chunks they run, and what is kept of each lane.

A learner's lanes are the product of the hyper-parameters it takes and the seeds, the last axis changing fastest. A
learner does not run again for the values of a hyper-parameter that it does not take. The lanes of a sweep that has
grown come in the order in which they were asked for: those of its first grid, then those that each later grid added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray

__all__ = [
    "DIVERGED",
    "DONE",
    "NEVER",
    "NOT_RUN",
    "RESERVED",
    "Arrays",
    "Chunk",
    "EarlierGrid",
    "LaneAxes",
    "Schema",
    "Variable",
    "dimensions",
    "fill_value",
]

DIVERGED, NEVER, NOT_RUN = "diverged_at", -1, -2
"""The variable with the sample at which a lane diverged, and its values for a lane that never did and one not run."""

DONE = "done"
"""The variable that is True for a lane that has run. It is not stored: it is read off `DIVERGED`."""

RESERVED = ("learner", "seed", "lane", "sample", DIVERGED, DONE)
"""Names that neither a hyper-parameter nor a record can have."""

Arrays = dict[str, np.ndarray]
"""Arrays by name, with lanes as the leading axis."""


class Chunk(NamedTuple):
    """Lanes ``start`` to ``stop`` of one learner."""

    learner: str
    number: int
    start: int
    stop: int


class Variable(NamedTuple):
    """One variable of the results.

    Attributes:
        shape: one lane's.
        dtype: numpy's.
        samples: the samples on the leading axis of ``shape``; None where that is no time axis.
        description: one line for the files.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    samples: range | None
    description: str

    def as_json(self) -> dict[str, Any]:
        """The variable as plain data."""
        samples = None if self.samples is None else [self.samples.start, self.samples.stop, self.samples.step]
        return {**self._asdict(), "shape": list(self.shape), "dtype": self.dtype.name, "samples": samples}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Variable:
        """The variable that `as_json` made plain."""
        samples = None if plain["samples"] is None else range(*plain["samples"])
        return cls(tuple(plain["shape"]), np.dtype(plain["dtype"]), samples, plain["description"])


class EarlierGrid(NamedTuple):
    """A grid that a sweep had before it grew: a part of the one that it has now."""

    axes: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]


class LaneAxes(NamedTuple):
    """Each learner's lanes.

    Attributes:
        axes: the hyper-parameters and their values.
        seeds: the innermost axis.
        takes: for each learner the names of the hyper-parameters that it takes. A sweep of one learner without a name
            has it under the empty name.
        earlier: the grids from which the sweep has grown, the first one first.
    """

    axes: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    takes: dict[str, tuple[str, ...]]
    earlier: tuple[EarlierGrid, ...] = ()

    def shape(self, learner: str) -> tuple[int, ...]:
        """The number of values of each hyper-parameter that a learner takes, and the number of seeds."""
        return (*(len(self.axes[name]) for name in self.takes[learner]), len(self.seeds))

    def count(self, learner: str) -> int:
        """The number of a learner's lanes."""
        return math.prod(self.shape(learner))

    def coordinates(self, learner: str) -> Arrays:
        """The hyper-parameters and the seed of each of a learner's lanes, ``[lanes]``."""
        values: list[np.ndarray] = [np.array(self.axes[name], dtype=np.float64) for name in self.takes[learner]]
        grids = np.meshgrid(*values, np.array(self.seeds, dtype=np.int64), indexing="ij")
        places = self.places(learner)
        return {
            name: grid.reshape(-1)[places] for name, grid in zip((*self.takes[learner], "seed"), grids, strict=True)
        }

    def places(self, learner: str) -> np.ndarray:
        """The place of each of a learner's lanes in the grid, which counts the last axis fastest, ``[lanes]``."""
        grid = np.arange(self.count(learner)).reshape(self.shape(learner))
        now = [*(self.axes[name] for name in self.takes[learner]), self.seeds]
        positions = [{value: place for place, value in enumerate(values)} for values in now]
        parts = []
        for earlier in self.earlier:
            then = [*(earlier.axes[name] for name in self.takes[learner]), earlier.seeds]
            places = [[found[value] for value in values] for found, values in zip(positions, then, strict=True)]
            parts.append(grid[np.ix_(*places)].reshape(-1))
        if not parts:
            return grid.reshape(-1)
        together = np.concatenate([*parts, grid.reshape(-1)])
        first_seen = np.sort(np.unique(together, return_index=True)[1])
        return together[first_seen]


class Schema(NamedTuple):
    """What a sweep's results look like.

    Attributes:
        lanes: each learner's lanes.
        chunk_size: how many lanes of one learner run together.
        variables: what is kept of each lane, by name.
    """

    lanes: LaneAxes
    chunk_size: int
    variables: dict[str, Variable]

    def chunks(self) -> list[Chunk]:
        """All chunks of all learners, in the order in which they are run."""
        return [
            Chunk(learner, number, start, min(start + self.chunk_size, self.lanes.count(learner)))
            for learner in self.lanes.takes
            for number, start in enumerate(range(0, self.lanes.count(learner), self.chunk_size))
        ]

    def empty(self, learner: str) -> Arrays:
        """A learner's results ``[lanes, ...]`` as they are before any lane has run."""
        lanes = self.lanes.count(learner)
        return {
            name: np.full((lanes, *variable.shape), fill_value(name, variable), dtype=variable.dtype)
            for name, variable in self.variables.items()
        }

    def dataset(self, results: Mapping[str, Arrays]) -> xarray.Dataset:
        """Results with labels: dimensions named after the hyper-parameters, ``seed`` and, in front, ``learner``.

        A learner that does not take a hyper-parameter has the same results for all its values.

        Args:
            results: for each learner its variables, ``[lanes, ...]``.
        """
        lanes, named = self.lanes, dimensions(self.variables)
        axes: dict[str, Any] = {name: np.array(values, dtype=np.float64) for name, values in lanes.axes.items()}
        axes["seed"] = np.array(lanes.seeds, dtype=np.int64)
        learners = () if "" in lanes.takes else ("learner",)
        coordinates: dict[str, Any] = {"learner": np.array(list(lanes.takes), dtype=object)} if learners else {}
        coordinates.update(axes)
        data: dict[str, Any] = {}
        for name, variable in self.variables.items():
            parts = [self._spread(learner, results[learner][name]) for learner in lanes.takes]
            whole = np.stack(parts) if learners else parts[0]
            data[name] = ((*learners, *axes, *named[name]), whole, {"long_name": variable.description})
            if variable.samples is not None:
                coordinates[named[name][0]] = np.array(variable.samples, dtype=np.int64)
        dims, diverged, _ = data[DIVERGED]
        data[DONE] = (dims, diverged != NOT_RUN, {"long_name": "whether the lane has been run"})
        return xarray.Dataset(data, coordinates)

    def _spread(self, learner: str, values: np.ndarray) -> np.ndarray:
        """One variable of a learner over all axes, repeated along the hyper-parameters that it does not take."""
        axes, own, rest = (*self.lanes.axes, "seed"), (*self.lanes.takes[learner], "seed"), values.shape[1:]
        lengths = [len(given) for given in (*self.lanes.axes.values(), self.lanes.seeds)]
        thin = [length if axis in own else 1 for axis, length in zip(axes, lengths, strict=True)]
        in_grid = np.empty_like(values)
        in_grid[self.lanes.places(learner)] = values
        values = in_grid.reshape(*thin, *rest)
        # A broadcast array can't be written to; `dataset` makes a copy of it where it stacks learners.
        return values if thin == lengths else np.broadcast_to(values, (*lengths, *rest))

    def as_json(self) -> dict[str, Any]:
        """The schema as plain data."""
        earlier = [{"hyper_parameters": _listed(grid.axes), "seeds": list(grid.seeds)} for grid in self.lanes.earlier]
        return {
            **({"earlier": earlier} if earlier else {}),
            "hyper_parameters": _listed(self.lanes.axes),
            "order": [list(self.lanes.axes), list(self.lanes.takes), list(self.variables)],
            "seeds": list(self.lanes.seeds),
            "learners": {name: list(takes) for name, takes in self.lanes.takes.items()},
            "chunk_size": self.chunk_size,
            "record": {name: variable.as_json() for name, variable in self.variables.items()},
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Schema:
        """The schema that `as_json` made plain."""
        hyper_parameters, learners, record = plain["order"]
        axes = {name: tuple(plain["hyper_parameters"][name]) for name in hyper_parameters}
        earlier = tuple(
            EarlierGrid({name: tuple(grid["hyper_parameters"][name]) for name in axes}, tuple(grid["seeds"]))
            for grid in plain.get("earlier", ())
        )
        takes = {name: tuple(plain["learners"][name]) for name in learners}
        variables = {name: Variable.from_json(plain["record"][name]) for name in record}
        return cls(LaneAxes(axes, tuple(plain["seeds"]), takes, earlier), plain["chunk_size"], variables)


def _listed(axes: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in axes.items()}


def fill_value(name: str, variable: Variable) -> int | float:
    """The value in the place of a lane that has not run: `NOT_RUN`, or NaN, or 0 where the dtype has no NaN."""
    return NOT_RUN if name == DIVERGED else float("nan") if variable.dtype.kind in "fc" else 0


def dimensions(variables: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    """The names of each variable's own dimensions, those after the lanes.

    A time axis is called ``sample`` where its samples are those of the first variable that has one, else after its
    variable, ``..._sample``. Any other axis is called after its variable and its place, ``..._0``.
    """
    first: range | None = None
    named = {}
    for name, variable in variables.items():
        plain = [f"{name}_{axis}" for axis in range(len(variable.shape))]
        if variable.samples is not None:
            first = variable.samples if first is None else first
            plain[0] = "sample" if variable.samples == first else f"{name}_sample"
        named[name] = tuple(plain)
    return named
