"""Growth: a sweep goes on in its directory with more seeds, more values of its hyper-parameters, or more steps.

The lanes that are there stay where they are, and the new ones follow them. A sweep keeps no states, so with more steps
all lanes run again, from their first step. The result is that of one run of the larger sweep with the same engine and
the same number of lanes in a chunk, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optree
from torch import Tensor

from popart_func.sweeps.inputs import Inputs
from popart_func.sweeps.job import Job
from popart_func.sweeps.schema import EarlierGrid, LaneAxes, Schema
from popart_func.tree import PyTree

__all__ = ["in_order_of", "part_of", "stored_chunk_size"]


def stored_chunk_size(asked: int, lanes: LaneAxes, there: Mapping[str, Any] | None) -> int:
    """The number of lanes in a chunk: no more than there are lanes, unless the store began with fewer.

    Args:
        asked: the number that the user gave.
        lanes: the lanes that the user asked for.
        there: the store's configuration; None for a new sweep.
    """
    fitting = min(asked, max(map(lanes.count, lanes.takes)))
    if there is None:
        return fitting
    before = Schema.from_json(there).lanes
    first = before if not before.earlier else _at(before, before.earlier[0], ())
    began_with_one_chunk = there["chunk_size"] == max(map(first.count, first.takes))
    return int(there["chunk_size"]) if began_with_one_chunk and there["chunk_size"] <= asked else fitting


def in_order_of(job: Job, there: Mapping[str, Any] | None) -> Job:
    """A sweep with its lanes in the order that the store has, or will have once it has grown.

    Args:
        job: the sweep that was asked for.
        there: the store's configuration; None for a new sweep.
    """
    if there is None:
        return job
    before = Schema.from_json(there).lanes
    if (before.axes, before.seeds) == (job.lanes.axes, job.lanes.seeds):
        return replace(job, lanes=job.lanes._replace(earlier=before.earlier))
    if not _within(before, job.lanes) or there["steps"] != job.steps():
        return job
    return replace(job, lanes=job.lanes._replace(earlier=(*before.earlier, EarlierGrid(before.axes, before.seeds))))


def part_of(job: Job, there: Mapping[str, Any] | None) -> Job | None:
    """The part of a sweep that a store may hold: its grid and steps, where they are fewer; None where they are not.

    The store holds that part if this job has its configuration.

    Args:
        job: the sweep that was asked for.
        there: the store's configuration; None for a new sweep.
    """
    if there is None:
        return None
    before, steps = Schema.from_json(there).lanes, int(there["steps"])
    same_grid = (before.axes, before.seeds) == (job.lanes.axes, job.lanes.seeds)
    if not _within(before, job.lanes) or steps > job.steps() or (same_grid and steps == job.steps()):
        return None
    lanes = _at(job.lanes, EarlierGrid(before.axes, before.seeds), before.earlier)
    return replace(job, lanes=lanes, inputs=_first_steps(job.inputs, steps), _steps={})


def _at(lanes: LaneAxes, grid: EarlierGrid, earlier: tuple[EarlierGrid, ...]) -> LaneAxes:
    return lanes._replace(axes=grid.axes, seeds=grid.seeds, earlier=earlier)


def _within(small: LaneAxes, large: LaneAxes) -> bool:
    """Whether a grid has the axes and learners of a larger one, and no value that the larger one lacks."""
    return (
        small.takes == large.takes
        and list(small.axes) == list(large.axes)
        and set(small.seeds) <= set(large.seeds)
        and all(set(values) <= set(large.axes[name]) for name, values in small.axes.items())
    )


def _first_steps(inputs: Inputs, steps: int) -> Inputs:
    """Inputs whose stream is cut after some steps."""

    def cut(stream: PyTree) -> PyTree:
        return optree.tree_map(lambda leaf: leaf[:steps] if isinstance(leaf, Tensor) else leaf, stream)

    data = inputs.data
    shorter = (lambda seed: cut(data(seed))) if callable(data) else cut(data)
    return replace(inputs, data=shorter, _kept={}, _first={})
