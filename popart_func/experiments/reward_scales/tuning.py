"""Tuning: the hyper-parameters of each agent with the best mean score at rewards times 1, every setting a lane.

Where one network learns tasks with rewards of all scales, it is the mean score over these.

The grid is one for all treatments of an algorithm, and the seeds are none of those that are reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import xarray

from popart_func.experiments.reward_scales.play import checked, run_agent
from popart_func.experiments.reward_scales.roster import ALGORITHMS, STEP_SIZES, Setting, default_setting
from popart_func.experiments.reward_scales.tasks import TASKS

__all__ = ["SEEDS", "Tuned", "tune"]

SEEDS = range(2**32 - 10, 2**32)
"""The seeds that settings are chosen on: the last there are, where runs are numbered from 0."""


class Tuned(NamedTuple):
    """What an agent was tuned to.

    Attributes:
        setting: the hyper-parameters with the largest mean score. Without statistics the step size is the default.
        scores: mean scores over ``learning_rate`` and, where the agent has statistics, ``step_size``.
        seeds: how many seeds they are means of.
    """

    setting: Setting
    scores: xarray.DataArray
    seeds: int


def tune(
    task: str,
    agents: Iterable[str],
    seeds: Iterable[SupportsIndex] = SEEDS,
    *,
    steps: int | None = None,
    store: str | Path | None = None,
    **options: Any,
) -> dict[str, Tuned]:
    """Chooses each agent's learning rate and step size of the statistics.

    Args:
        task: one of `TASKS`.
        agents: one or more of `names.AGENT_NAMES`.
        seeds: other ones than those of the reported runs.
        steps: as in `play.play`.
        store: as in `play.play`.
        **options: as in `play.play`.

    Raises:
        TypeError, ValueError: as `play.play`.
    """
    together = task in TASKS and TASKS[task].together
    names, scales, steps = checked("tune", task, agents, None if together else [1.0], steps)
    found, seeds = {}, list(seeds)
    for name in names:
        axes = {
            "reward_scale": scales,
            "learning_rate": ALGORITHMS[name.split("-")[0]].learning_rates,
            "step_size": STEP_SIZES,
        }
        directory = None if store is None else Path(store) / name
        runs = run_agent(TASKS[task], name, axes, seeds, steps, store=directory, **options)
        scores = TASKS[task].scores(runs).mean(["reward_scale", "seed"])
        best = scores[scores.argmax(list(scores.dims))]
        setting = default_setting(name)._replace(**{str(dim): float(best[dim]) for dim in scores.dims})
        found[name] = Tuned(setting, scores, len(seeds))
    return found
