"""The agents of ``popart-func rl`` by name, *algorithm*-*treatment*: how they are made, and their hyper-parameters.

A treatment is what an agent does about the size of rewards: a critic of `agents.critics`; plain values of rewards that
are clipped or standardized; ``shared``, Pop-Art with one statistic for several tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from popart_func.experiments.agents import (
    Agent,
    Critic,
    dqn,
    make_critic,
    multi_task_q_learning,
    ppo,
    q_learning,
    stream_q,
    v_trace,
)
from popart_func.experiments.agents.multi_task import task_of_outputs
from popart_func.experiments.agents.networks import apply_mlp
from popart_func.experiments.environments import Environment
from popart_func.experiments.environments.wrappers import (
    clip_rewards,
    standardize_observations,
    standardize_rewards,
)
from popart_func.optim import GradientTransformation, adam, chain, clip_by_global_norm
from popart_func.pop_art import PopArt, popart
from popart_func.scales import fixed

__all__ = ["ALGORITHMS", "STEP_SIZES", "Algorithm", "Setting", "default_setting", "has_statistics", "make_agent"]


class Setting(NamedTuple):
    """An agent's hyper-parameters, which ``--tune`` chooses.

    Attributes:
        learning_rate: Adam's; for a streaming agent 1/κ of `agents.traces`: the share of an error that a step corrects.
        step_size: that of the statistics, which plain values leave alone.
    """

    learning_rate: float
    step_size: float


class Algorithm(NamedTuple):
    """One of the algorithms.

    Attributes:
        make: ``make(environment, critic, statistics, learning_rate)`` -> the agent. The name of the critic and the
            statistics are those of its treatment.
        actions: how many actions a step of the agent takes.
        setting: the hyper-parameters that it has by default, whatever the treatment.
        learning_rates: the learning rates of the grid that ``--tune`` searches.
    """

    make: Callable[[Environment, str, PopArt, Any], Agent]
    actions: int
    setting: Setting
    learning_rates: tuple[float, ...]


STEP_SIZES = (0.0001, 0.001, 0.01, 0.1)
"""The step sizes of the statistics of the grid that ``--tune`` searches."""

_DISCOUNT = 0.99


def _critic(name: str, statistics: PopArt, learning_rate: Any) -> Critic:
    return make_critic(name, apply_mlp, adam(learning_rate), statistics)


def _actor(learning_rate: Any) -> GradientTransformation:
    return chain(clip_by_global_norm(0.5), adam(learning_rate))


def _q(environment: Environment, critic: str, statistics: PopArt, rate: Any) -> Agent:
    return q_learning(environment, _critic(critic, statistics, rate), discount=_DISCOUNT)


def _dqn(environment: Environment, critic: str, statistics: PopArt, rate: Any) -> Agent:
    return dqn(environment, _critic(critic, statistics, rate), discount=_DISCOUNT)


def _ppo(environment: Environment, critic: str, statistics: PopArt, rate: Any) -> Agent:
    return ppo(environment, _critic(critic, statistics, rate), _actor(rate), discount=_DISCOUNT)


def _v_trace(environment: Environment, critic: str, statistics: PopArt, rate: Any) -> Agent:
    return v_trace(environment, _critic(critic, statistics, rate), _actor(rate), discount=_DISCOUNT)


def _stream(environment: Environment, critic: str, statistics: PopArt, rate: Any) -> Agent:
    if critic == "plain":
        statistics = fixed(torch.zeros(1), torch.ones(1))
    return stream_q(standardize_observations(environment), statistics, kappa=1 / rate, discount=_DISCOUNT)


_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)

ALGORITHMS = {
    "q": Algorithm(_q, 1, Setting(0.005, 0.001), _RATES),
    "dqn": Algorithm(_dqn, 4, Setting(0.003, 0.001), _RATES),
    "ppo": Algorithm(_ppo, 128, Setting(0.003, 0.01), _RATES),
    "vtrace": Algorithm(_v_trace, 16, Setting(0.003, 0.01), _RATES),
    "stream": Algorithm(_stream, 1, Setting(0.5, 0.001), (0.05, 0.1, 0.25, 0.5, 1.0)),
}
"""The algorithms by name."""


def default_setting(name: str) -> Setting:
    """The hyper-parameters of an agent that nobody has tuned."""
    return ALGORITHMS[name.split("-")[0]].setting


def has_statistics(name: str) -> bool:
    """Whether an agent has statistics, so that their step size means something to it."""
    return name.split("-")[1] in ("art", "popart", "normalized", "shared")


def make_agent(
    name: str, environment: Environment | tuple[Environment, ...], learning_rate: Any, step_size: Any
) -> Agent:
    """The agent of a name.

    Args:
        name: one of `names.AGENT_NAMES`.
        environment: a pure environment, with its rewards as they are; or several that one network learns, for one of
            `names.TASK_AGENT_NAMES`.
        learning_rate: as in `Setting`; a float, or a 0-d tensor of the lane.
        step_size: as in `Setting`.
    """
    algorithm, treatment = name.split("-")

    def treated(one: Environment) -> Environment:
        if treatment == "clipped":
            return clip_rewards(one)
        return standardize_rewards(one, _DISCOUNT) if treatment == "scaled" else one

    # The lower bound lies far below bsuite's smallest rewards. With bias correction the scale is that of the first
    # targets, instead of 1 for as long as statistics with a small step size remember it.
    statistics = functools.partial(popart, step_size=step_size, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)
    critic = "popart" if treatment == "shared" else treatment if has_statistics(name) else "plain"
    if not isinstance(environment, tuple):
        return ALGORITHMS[algorithm].make(treated(environment), critic, statistics(1), learning_rate)
    tasks = len(environment)
    groups = task_of_outputs(tasks, environment[0].num_actions)
    moments = statistics(1) if treatment == "shared" else statistics(tasks, groups=groups)
    return multi_task_q_learning(
        [treated(one) for one in environment], _critic(critic, moments, learning_rate), discount=_DISCOUNT
    )
