"""bsuite's scale experiments: an environment whose rewards are multiplied, and how a run is scored.

``catch_tasks`` is not bsuite's: one network learns seven variants of Catch at once, each with another scale.

Regret and scores are bsuite's: the mean regret of an episode, 1 for none and 0 for that of a random or idle agent,
clipped in between. Returns are counted in the environment's own units, whatever the scale.

Source: Osband et al., *Behaviour Suite for Reinforcement Learning* (2020), version 0.3.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray
from torch import Tensor

from popart_func.experiments.environments import Environment
from popart_func.experiments.environments.bsuite import Bandit, CartPole, Catch, MountainCar
from popart_func.experiments.environments.wrappers import flip_cells, mirror_actions, slip
from popart_func.experiments.names import REWARD_SCALES, TASK_SCALES

__all__ = ["TASKS", "Task", "score_of_scales"]


@dataclass(frozen=True)
class Task:
    """One of the experiments.

    Attributes:
        make: ``make(key)`` -> the environment of a seed; several where one network learns several tasks at once.
        episodes: how many episodes are counted, as in bsuite.
        longest: the most actions that an episode has.
        steps: how many actions a run has. An episode of the bandit has one and one of Catch has nine; an episode of the
            two others is as long as the agent makes it. A run counts the episodes that it finished.
        best_return: of an episode: what regret is counted from.
        base_regret: of an episode: what scores 0.
        good_return: half of the score is whether an episode had more than this return; None where all is regret.
        together: whether `make` gives several environments, one for each scale of the rewards, that one network learns.
        reward_scales: what rewards are multiplied by.
    """

    make: Callable[[Tensor], Environment | tuple[Environment, ...]]
    episodes: int
    longest: int
    steps: int
    best_return: float
    base_regret: float
    good_return: float | None = None
    together: bool = False
    reward_scales: tuple[float, ...] = REWARD_SCALES

    def score(self, episodes: np.ndarray, total_return: np.ndarray, best_episode: np.ndarray) -> np.ndarray:
        """The score of runs, bsuite's for each run by itself.

        Args:
            episodes: how many episodes were counted, ``[...]``.
            total_return: the sum of their returns.
            best_episode: the largest of their returns.

        Raises:
            ValueError: a run has finished no episode.
        """
        if (np.asarray(episodes) < 1).any():
            raise ValueError("score: `episodes` must be at least 1 in each run, got 0.")
        regret = self.best_return - total_return / episodes
        score = np.clip(1 - regret / self.base_regret, 0, 1)
        if self.good_return is None:
            return score
        return 0.5 * (score + (best_episode > self.good_return))

    def scores(self, dataset: xarray.Dataset) -> xarray.DataArray:
        """The score of each run of a dataset as `play.play` returns it, over all its dimensions but ``step``."""
        last = dataset.isel(step=-1, drop=True)
        found: xarray.DataArray = xarray.apply_ufunc(
            self.score, last["episodes"], last["total_return"], last["best_episode"]
        )
        return found


def _catch_variants(key: Tensor) -> tuple[Environment, ...]:
    """Seven tasks with boards of 50 cells. On a wide board the paddle can't reach each ball in time."""
    catch, wide = Catch(), Catch(rows=5, columns=10)
    return (
        catch,
        mirror_actions(catch),
        slip(catch, 0.2),
        flip_cells(catch, 0.01),
        wide,
        mirror_actions(wide),
        mirror_actions(slip(catch, 0.2)),
    )


TASKS = {
    "bandit_scale": Task(Bandit.shuffled, 10_000, 1, 10_000, 1.0, 0.5),
    "catch_scale": Task(lambda key: Catch(), 10_000, 9, 90_000, 1.0, 1.6),
    "cartpole_scale": Task(lambda key: CartPole(), 1000, 1001, 200_000, 1000.0, 1000.0, good_return=500.0),
    "mountain_car_scale": Task(lambda key: MountainCar(), 1000, 1000, 200_000, -100.0, 1000.0),
    "catch_tasks": Task(_catch_variants, 10_000, 9, 90_000, 1.0, 1.6, together=True, reward_scales=TASK_SCALES),
}
"""The experiments by name."""


def score_of_scales(scores: np.ndarray) -> np.ndarray | np.floating:
    """The score of an experiment by bsuite's rule, from the scores of its scales ``[..., scales]``.

    It is the mean of two numbers, each clipped to [0, 1]: the mean, and the mean minus the standard deviation.

    >>> score_of_scales(np.array([1.0, 1.0, 0.0, 0.0]))
    np.float64(0.25)
    """
    mean, deviation = scores.mean(-1), scores.std(-1)
    return 0.5 * (np.clip(mean, 0, 1) + np.clip(mean - deviation, 0, 1))
