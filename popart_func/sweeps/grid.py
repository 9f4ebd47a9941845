"""Grids of lanes: every combination of learner, hyper-parameters and seed is one lane, that is, one training run.

`lanes` checks what is asked once and builds a `Grid`; `run` takes it without checking it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import xarray

from popart_func.sweeps._checks import as_identifiers, as_numbers, as_seeds
from popart_func.sweeps.schema import RESERVED

__all__ = ["Grid", "lanes"]

_SHOWN = 8
"""How many values of an axis are printed."""


@dataclass(frozen=True, repr=False)
class Grid:
    """A grid of lanes, as `lanes` builds and checks it. Print it, or take a part of it with `sel`.

    Attributes:
        axes: hyper-parameter name to its values.
        seeds: the innermost axis.
        learners: the learners' names, the outermost axis; None where the sweep has one learner without a name.
    """

    axes: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    learners: tuple[str, ...] | None = None

    @property
    def coordinates(self) -> dict[str, tuple[Any, ...]]:
        """All axes by name, ``learner`` first and ``seed`` last."""
        learners = {} if self.learners is None else {"learner": self.learners}
        return {**learners, **self.axes, "seed": self.seeds}

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis."""
        return {name: len(values) for name, values in self.coordinates.items()}

    def sel(self, **values: Any) -> Grid:
        """A part of the grid: for each axis named, one value or an iterable of values that the axis has.

        Raises:
            ValueError: the grid lacks an axis or a value, or a value is named twice.

        >>> lanes(range(3), learning_rate=[0.1, 0.01]).sel(learning_rate=0.01, seed=[2, 0]).sizes
        {'learning_rate': 1, 'seed': 2}
        """
        chosen = self.coordinates
        for name, wanted in values.items():
            if name not in chosen:
                raise ValueError(f"sel: the grid has the axes {list(chosen)}, got {name!r}.")
            chosen[name] = self._chosen(name, wanted, chosen[name])
        axes = {name: chosen[name] for name in self.axes}
        return replace(self, axes=axes, seeds=chosen["seed"], learners=chosen.get("learner"))

    def to_xarray(self) -> xarray.Dataset:
        """The grid as the coordinates of a dataset without variables."""
        dtypes = {"learner": object, "seed": np.int64}
        return xarray.Dataset(
            coords={name: np.array(values, dtypes.get(name, np.float64)) for name, values in self.coordinates.items()}
        )

    def __repr__(self) -> str:
        lines = [f"Grid({', '.join(f'{name}: {size}' for name, size in self.sizes.items())})"]
        width = max(map(len, self.sizes))
        for name, values in self.coordinates.items():
            shown = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
            if len(shown) > _SHOWN:
                shown = [*shown[: _SHOWN - 2], "...", shown[-1]]
            lines.append(f"  {name:{width}}  {', '.join(shown)}")
        return "\n".join(lines)

    @staticmethod
    def _chosen(name: str, wanted: Any, known: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(wanted, str):
            listed = [wanted]
        elif name == "learner":
            listed = list(wanted)
        else:
            listed = np.atleast_1d(wanted).tolist()
        for value in listed:
            if value not in known:
                raise ValueError(f"sel: `{name}` must be among {list(known)}, got {value!r}.")
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(f"sel: `{name}` must be one or more distinct values, got {wanted!r}.")
        return tuple(known[known.index(value)] for value in listed)  # the grid's own, of its own type


def lanes(
    seeds: Iterable[SupportsIndex], *, learner: Iterable[str] | None = None, **hyper_parameters: Iterable[SupportsFloat]
) -> Grid:
    """Builds a grid of lanes: each combination of seed, hyper-parameters and, if given, learner is one training run.

    Args:
        seeds: distinct integers in [0, 2**32).
        learner: names, for a sweep of several learners.
        **hyper_parameters: the values of each hyper-parameter, distinct finite numbers, under the name that
            ``make_learner`` takes.

    Returns:
        The grid: print it, take a part of it with `Grid.sel`, or convert it with `Grid.to_xarray`.

    Raises:
        TypeError, ValueError: seeds, names or values are none.

    >>> lanes(range(3), learning_rate=[0.1, 0.01]).sizes
    {'learning_rate': 2, 'seed': 3}
    """
    learners = None if learner is None else tuple(as_identifiers("lanes", "learner", learner))
    axes = {}
    for name, values in hyper_parameters.items():
        if name in RESERVED:
            raise ValueError(f"lanes: a hyper-parameter can't be called {name!r}, which is the sweep's own word.")
        if not name.isidentifier():
            raise ValueError(f"lanes: a hyper-parameter's name must be an identifier, got {name!r}.")
        axes[name] = tuple(as_numbers("lanes", name, values))
    return Grid(axes, tuple(as_seeds("lanes", seeds)), learners)
