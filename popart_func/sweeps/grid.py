"""The lanes of a sweep: hyper-parameters by seeds, for one learner or several, cut into chunks of whole lanes.

A learner's lanes are the product of the hyper-parameters it takes and the seeds, the last axis changing fastest. A
learner is not run again for the values of a hyper-parameter that it does not take.
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
    "Chunk",
    "Grid",
    "Plan",
    "Values",
    "Variable",
    "dimensions",
    "missing",
]

DIVERGED, NEVER, NOT_RUN = "diverged_at", -1, -2
"""The variable that says at which sample a lane diverged, and its two other values."""

DONE = "done"
"""The variable that says whether a lane has been run. In files it is `DIVERGED` alone that says so."""

Values = dict[str, np.ndarray]
"""Arrays by name, with lanes as the leading axis."""


class Chunk(NamedTuple):
    """Lanes ``start`` to ``stop`` of one learner."""

    learner: str
    number: int
    start: int
    stop: int


class Variable(NamedTuple):
    """What a sweep keeps under one name: the shape and dtype of one lane's, and the samples on its leading axis."""

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


class Grid(NamedTuple):
    """All lanes.

    Attributes:
        axes: the hyper-parameters and their values.
        seeds: the innermost axis.
        takes: the names of the hyper-parameters that each learner takes. A sweep of one learner that was not named has
            it under the empty name.
    """

    axes: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    takes: dict[str, tuple[str, ...]]

    def shape(self, learner: str) -> tuple[int, ...]:
        """How many values each hyper-parameter of a learner has, and how many seeds there are."""
        return (*(len(self.axes[name]) for name in self.takes[learner]), len(self.seeds))

    def lanes(self, learner: str) -> int:
        """How many lanes a learner has."""
        return math.prod(self.shape(learner))

    def coordinates(self, learner: str) -> Values:
        """The hyper-parameters and the seed of each of a learner's lanes, ``[lanes]``."""
        values: list[np.ndarray] = [np.array(self.axes[name], dtype=np.float64) for name in self.takes[learner]]
        grids = np.meshgrid(*values, np.array(self.seeds, dtype=np.int64), indexing="ij")
        return {name: grid.reshape(-1) for name, grid in zip((*self.takes[learner], "seed"), grids, strict=True)}


class Plan(NamedTuple):
    """The lanes of a sweep, in which chunks they come, and what is kept of each.

    Attributes:
        grid: the lanes.
        chunk_size: how many of one learner's lanes run together.
        variables: what is kept.
    """

    grid: Grid
    chunk_size: int
    variables: dict[str, Variable]

    def chunks(self) -> list[Chunk]:
        """All chunks of all learners, in the order in which they are run."""
        return [
            Chunk(learner, number, start, min(start + self.chunk_size, self.grid.lanes(learner)))
            for learner in self.grid.takes
            for number, start in enumerate(range(0, self.grid.lanes(learner), self.chunk_size))
        ]

    def empty(self, learner: str) -> Values:
        """Arrays for a learner's results, ``[lanes, ...]``, that say of each lane that it was not run."""
        lanes = self.grid.lanes(learner)
        return {
            name: np.full((lanes, *variable.shape), missing(name, variable), dtype=variable.dtype)
            for name, variable in self.variables.items()
        }

    def dataset(self, values: Mapping[str, Values]) -> xarray.Dataset:
        """Results with their labels: dimensions named after the hyper-parameters, ``seed`` and, in front, ``learner``.

        A learner that does not take a hyper-parameter has the same results for all its values.

        Args:
            values: for each learner its variables, ``[lanes, ...]``.
        """
        grid, named = self.grid, dimensions(self.variables)
        axes: dict[str, Any] = {name: np.array(given, dtype=np.float64) for name, given in grid.axes.items()}
        axes["seed"] = np.array(grid.seeds, dtype=np.int64)
        learners = () if "" in grid.takes else ("learner",)
        coordinates: dict[str, Any] = {"learner": np.array(list(grid.takes), dtype=object)} if learners else {}
        coordinates.update(axes)
        data: dict[str, Any] = {}
        for name, variable in self.variables.items():
            parts = [self._spread(learner, values[learner][name]) for learner in grid.takes]
            whole = np.stack(parts) if learners else parts[0]
            data[name] = ((*learners, *axes, *named[name]), whole, {"long_name": variable.description})
            if variable.samples is not None:
                coordinates[named[name][0]] = np.array(variable.samples, dtype=np.int64)
        dims, diverged, _ = data[DIVERGED]
        data[DONE] = (dims, diverged != NOT_RUN, {"long_name": "whether the lane has been run"})
        return xarray.Dataset(data, coordinates)

    def _spread(self, learner: str, values: np.ndarray) -> np.ndarray:
        """A learner's results over all axes, those of hyper-parameters that it does not take repeated."""
        axes, own, rest = (*self.grid.axes, "seed"), (*self.grid.takes[learner], "seed"), values.shape[1:]
        lengths = [len(given) for given in (*self.grid.axes.values(), self.grid.seeds)]
        thin = [length if axis in own else 1 for axis, length in zip(axes, lengths, strict=True)]
        values = values.reshape(*thin, *rest)
        # What is broadcast can't be written to.
        return values if thin == lengths else np.broadcast_to(values, (*lengths, *rest))

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "hyper_parameters": {name: list(values) for name, values in self.grid.axes.items()},
            "order": [list(self.grid.axes), list(self.grid.takes), list(self.variables)],
            "seeds": list(self.grid.seeds),
            "learners": {name: list(takes) for name, takes in self.grid.takes.items()},
            "chunk_size": self.chunk_size,
            "record": {name: variable.as_json() for name, variable in self.variables.items()},
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that `as_json` made plain."""
        hyper_parameters, learners, record = plain["order"]
        axes = {name: tuple(plain["hyper_parameters"][name]) for name in hyper_parameters}
        takes = {name: tuple(plain["learners"][name]) for name in learners}
        variables = {name: Variable.from_json(plain["record"][name]) for name in record}
        return cls(Grid(axes, tuple(plain["seeds"]), takes), plain["chunk_size"], variables)


def missing(name: str, variable: Variable) -> int | float:
    """What stands in the place of a lane that was not run: NaN, or 0 where the dtype has none."""
    return NOT_RUN if name == DIVERGED else float("nan") if variable.dtype.kind in "fc" else 0


def dimensions(variables: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    """The names of each variable's own dimensions.

    The time axis is called ``sample``; where variables keep different samples, those of the first are, and others carry
    their variable's name.
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
