"""Runs agents on an experiment at every scale and seed: lanes of one sweep, one learner for each agent."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray
from torch import Tensor

from popart_func import random, sweeps
from popart_func.engines import scan
from popart_func.experiments.agents import Agent, dqn, make_critic, ppo, q_learning, v_trace
from popart_func.experiments.agents.networks import apply_mlp
from popart_func.experiments.environments import Environment, scale_rewards
from popart_func.experiments.names import AGENT_NAMES, REWARD_SCALES
from popart_func.experiments.reward_scales.tasks import TASKS, Task
from popart_func.learners import Learner
from popart_func.optim import adam, chain, clip_by_global_norm
from popart_func.pop_art import popart
from popart_func.sweeps._checks import as_count, as_names
from popart_func.sweeps.records import Record
from popart_func.sweeps.workers import Workers

__all__ = ["SETTINGS", "Setting", "Tally", "play"]

_DESCRIPTION = "episodes, the sum of their returns and the best of them, at the points of a curve"

_NO_EPISODE = -1e9
"""The best return before an episode has ended: finite, since infinity says that a lane diverged."""

POINTS = 200
"""How many points a learning curve has."""


class Setting(NamedTuple):
    """An agent's hyper-parameters: Adam's learning rate, and the step size of the statistics."""

    learning_rate: float
    step_size: float


SETTINGS: dict[str, Setting] = {
    "q": Setting(0.005, 0.001),
    "dqn": Setting(0.003, 0.001),
    "ppo": Setting(0.003, 0.01),
    "vtrace": Setting(0.003, 0.01),
}
"""What each algorithm runs with by default, whichever critic it has."""

ACTIONS = {"q": 1, "dqn": 4, "ppo": 128, "vtrace": 16}
"""How many actions each algorithm takes in a step. A sample of the sweep has at least 4, and a step of each agent."""


class Tally(NamedTuple):
    """The counts that bsuite scores, over the first episodes of a run: 0-d tensors.

    Attributes:
        episodes: how many have ended.
        total_return: the sum of their returns.
        best_episode: the largest of them.
        running: the return of the episode that has not ended.
    """

    episodes: Tensor
    total_return: Tensor
    best_episode: Tensor
    running: Tensor


def _make_agent(name: str, environment: Environment, learning_rate: Any, step_size: Any) -> Agent:
    """The agent of a name."""
    algorithm, critic_name = name.split("_")
    # The lower bound lies far below bsuite's smallest rewards. With bias correction the scale is that of the first
    # targets, instead of 1 for as long as statistics with a small step size remember it.
    statistics = popart(1, step_size, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)
    critic = make_critic(critic_name, apply_mlp, adam(learning_rate), statistics)
    actions = ACTIONS[algorithm]
    if algorithm == "q":
        return q_learning(environment, critic)
    if algorithm == "dqn":
        return dqn(environment, critic, batch_size=16, steps_per_update=actions)
    actor = chain(clip_by_global_norm(0.5), adam(learning_rate))
    if algorithm == "ppo":
        return ppo(environment, critic, actor, length=actions)
    return v_trace(environment, critic, actor, length=actions)


def _tally_of(state: Any, info: Tensor) -> Tensor:
    """What is recorded of a step: the episodes, the sum of their returns, and the best of them."""
    return info


def play(
    task: str,
    agents: Iterable[str],
    reward_scales: Iterable[SupportsFloat] = REWARD_SCALES,
    seeds: Iterable[SupportsIndex] = range(100),
    *,
    settings: Mapping[str, Setting] | None = None,
    steps: int | None = None,
    chunk_size: int = 128,
    engine: str = "auto",
    store: str | Path | None = None,
    workers: Workers = None,
    quiet: bool = False,
) -> xarray.Dataset:
    """Runs agents on an experiment, every reward scale and seed a lane.

    Args:
        task: one of `TASKS`.
        agents: one or more of `names.AGENT_NAMES`.
        reward_scales: what rewards are multiplied by.
        seeds: distinct integers: of the environment, the network and the actions.
        settings: hyper-parameters by the agent's name; by default those of `SETTINGS`.
        steps: how many actions, rounded up to a multiple of four and of the actions in a step of each agent; by default
            the experiment's.
        chunk_size: as in `sweeps.run`.
        engine: as in `sweeps.run`.
        store: as in `sweeps.run`.
        workers: as in `sweeps.run`.
        quiet: as in `sweeps.run`.

    Returns:
        ``episodes``, ``total_return`` and ``best_episode`` over learner, reward_scale, seed and ``step``: learning
        curves of at most 200 points, the last of which bsuite scores. ``step`` is the number of actions before a point.

    Raises:
        TypeError, ValueError: an unknown experiment, agent or setting; fewer steps than an episode may have, so that a
            run could end without one; and as `sweeps.run`.
    """
    as_names("play", "task", [task], list(TASKS))
    agents = as_names("play", "agents", agents, AGENT_NAMES)
    names = [name.replace("-", "_") for name in agents]  # the sweep's learners are identifiers
    chosen = TASKS[task]
    steps = as_count("play", "steps", chosen.steps if steps is None else steps)
    if steps < chosen.longest:
        raise ValueError(f"play: `steps` must be at least {chosen.longest}, an episode of {task}, got {steps}.")
    given = dict(settings or {})
    if unknown := given.keys() - set(agents):
        raise ValueError(f"play: `settings` must be of the agents {list(agents)}, got {sorted(unknown)}.")
    actions = max(4, *(ACTIONS[name.split("_")[0]] for name in names))
    learners = {}
    for name in names:
        setting = given.get(name.replace("_", "-"), SETTINGS[name.split("_")[0]])
        learners[name] = functools.partial(_counted, chosen, name, setting, actions)
    samples = -(-steps // actions)
    found = sweeps.run(
        learners,
        torch.zeros(samples, dtype=torch.int8),
        _start,
        sweeps.lanes(seeds, reward_scale=reward_scales),
        record={"tally": Record(_tally_of, _points, None, _DESCRIPTION)},
        chunk_size=chunk_size,
        engine=engine,
        store=store,
        workers=workers,
        quiet=quiet,
    )
    tally = found["tally"]
    point, quantity = tally.dims[-2:]
    parts = {name: tally.isel({quantity: i}) for i, name in enumerate(Tally._fields[:3])}
    at = actions * (_kept(samples) + 1)
    return xarray.Dataset(parts, attrs=found.attrs).rename({point: "step"}).assign_coords(step=at)


def _start(seed: int) -> dict[str, Tensor]:
    return {"key": random.key(seed)}


def _counted(task: Task, name: str, setting: Setting, actions: int, reward_scale: Tensor) -> Learner:
    """An agent as a learner of a sweep: its parameters are a key, its samples say nothing, its info is the tally.

    An update is so many actions.
    """

    def agent_of(key: Tensor) -> Agent:
        environment = scale_rewards(task.make(key), reward_scale)
        return _make_agent(name, environment, *setting)

    def init(params: Any) -> Any:
        for_task, for_agent = random.split(params["key"], 2)
        zero = torch.zeros(())
        tally = Tally(zero, zero.clone(), torch.full((), _NO_EPISODE), zero.clone())
        return agent_of(for_task).init(for_agent), tally, for_task

    def update(state: Any, _: Any) -> Any:
        agent_state, tally, for_task = state
        agent = agent_of(for_task)

        def act(carry: Any, _: Any) -> tuple[Any, Any]:
            agent_state, tally = carry
            agent_state, experience = agent.step(agent_state)
            tally, _ = scan(count, tally, (experience.reward / reward_scale, experience.ended))
            return (agent_state, tally), ()

        def count(tally: Tally, action: tuple[Tensor, Tensor]) -> tuple[Tally, tuple[()]]:
            return _count(task, tally, *action), ()

        (agent_state, tally), _ = scan(act, (agent_state, tally), length=actions // agent.actions)
        return (agent_state, tally, for_task), torch.stack(tally[:3])

    return Learner(init, update)


def _count(task: Task, tally: Tally, reward: Tensor, ended: Tensor) -> Tally:
    running = tally.running + reward
    counts = ended & (tally.episodes < task.episodes)
    return Tally(
        tally.episodes + counts.to(torch.float32),
        tally.total_return + torch.where(counts, running, 0.0),
        torch.where(counts, torch.maximum(tally.best_episode, running), tally.best_episode),
        torch.where(ended, 0.0, running),
    )


def _points(series: Tensor) -> Tensor:
    """The series at `POINTS` points, the last one among them."""
    return series[_kept(series.shape[0])]


def _kept(samples: int) -> np.ndarray:
    return np.unique(np.linspace(0, samples, min(POINTS, samples) + 1).round().astype(int)[1:] - 1)
