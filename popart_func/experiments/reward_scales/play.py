"""Runs agents on an experiment at every scale and seed, each a lane: one sweep for each agent."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray
from torch import Tensor

from popart_func import random, sweeps
from popart_func.engines import load_engine, scan
from popart_func.experiments.agents import Agent
from popart_func.experiments.environments.wrappers import scale_rewards
from popart_func.experiments.names import SINGLE_AGENT_NAMES, TASK_AGENT_NAMES
from popart_func.experiments.reward_scales.roster import (
    ALGORITHMS,
    Setting,
    default_setting,
    has_statistics,
    make_agent,
)
from popart_func.experiments.reward_scales.tasks import TASKS, Task
from popart_func.learners import Learner
from popart_func.sweeps._checks import as_count, as_names
from popart_func.sweeps.records import Record
from popart_func.sweeps.workers import Workers

__all__ = ["Tally", "checked", "play", "run_agent"]

_PERIOD = 128
"""The points of learning curves are multiples of this number of actions, which every agent's step divides."""

POINTS = 200
"""How many points a learning curve has."""

_DESCRIPTION = "episodes, the sum of their returns and the best of them, at the points of a curve"

_NO_EPISODE = -1e9
"""The best return before an episode has ended: finite, since infinity says that a lane diverged."""


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


def play(
    task: str,
    agents: Iterable[str],
    reward_scales: Iterable[SupportsFloat] | None = None,
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
        reward_scales: what rewards are multiplied by; by default as the experiment says. Where one network learns
            several tasks there is one for each, and each seed shares them out at random.
        seeds: distinct integers: of the environment, the network and the actions.
        settings: hyper-parameters by the agent's name, such as `tuning.tune` chooses; by default those of `roster`.
        steps: how many actions, rounded up to a multiple of 128; by default the experiment's.
        chunk_size: as in `sweeps.run`.
        engine: as in `sweeps.run`.
        store: as in `sweeps.run`: a directory with a sweep for each agent.
        workers: as in `sweeps.run`.
        quiet: as in `sweeps.run`.

    Returns:
        ``episodes``, ``total_return`` and ``best_episode`` over agent, reward_scale, seed and ``step``: learning
        curves of at most 200 points, the last of which bsuite scores. ``step`` is the number of actions before a point.
        Over agent: ``seconds``, how long this call took for it, and its ``learning_rate`` and ``step_size``.

    Raises:
        TypeError, ValueError: an unknown experiment, agent or setting; fewer steps than an episode may have, so that a
            run could end without one; and as `sweeps.run`.
    """
    agents, scales, steps = checked("play", task, agents, reward_scales, steps)
    given = dict(settings or {})
    if unknown := given.keys() - set(agents):
        raise ValueError(f"play: `settings` must be of the agents {list(agents)}, got {sorted(unknown)}.")
    found = []
    seeds = list(seeds)
    for name in agents:
        setting = given.get(name, default_setting(name))
        one = run_agent(
            TASKS[task],
            name,
            {"reward_scale": scales, "learning_rate": [setting[0]], "step_size": [setting[1]]},
            seeds,
            steps,
            chunk_size=chunk_size,
            engine=engine,
            store=None if store is None else Path(store) / name,
            workers=workers,
            quiet=quiet,
        )
        one = one.isel({axis: 0 for axis in Setting._fields if axis in one.dims}, drop=True)
        found.append(one.assign(seconds=one.attrs["seconds"], learning_rate=setting[0], step_size=setting[1]))
    whole = xarray.concat(found, xarray.Variable("agent", np.array(agents, object)), combine_attrs="drop")
    return whole.assign_attrs(lane_steps=sum(one.attrs["lane_steps"] for one in found))


def run_agent(
    task: Task,
    name: str,
    axes: Mapping[str, Sequence[SupportsFloat]],
    seeds: Iterable[SupportsIndex],
    steps: int,
    *,
    engine: str = "auto",
    **options: Any,
) -> xarray.Dataset:
    """The sweep of one agent over reward scales, hyper-parameters and seeds.

    Args:
        task: the experiment.
        name: one of `names.AGENT_NAMES`.
        axes: values of ``reward_scale``, ``learning_rate`` and ``step_size``; the last is left out where the agent has
            no statistics.
        seeds: as in `play`.
        steps: how many actions, rounded up to a multiple of 128.
        engine: as in `sweeps.run`.
        **options: of `sweeps.run`.

    Returns:
        ``episodes``, ``total_return`` and ``best_episode`` over the axes, seed and ``step``.
    """
    periods = -(-steps // _PERIOD)
    # A sample has at least 4 actions: the series of a tally is in memory.
    actions = max(4, ALGORITHMS[name.split("-")[0]].actions)
    scales = [float(scale) for scale in axes["reward_scale"]]

    def learner(learning_rate: Tensor, reward_scale: Any = scales, step_size: Any = 1.0) -> Learner:
        return _learner(task, name, actions, reward_scale, learning_rate, step_size)

    left_out = {"step_size": not has_statistics(name), "reward_scale": task.together}
    lanes: dict[str, Any] = {axis: values for axis, values in axes.items() if not left_out.get(axis)}
    found = sweeps.run(
        learner,
        torch.zeros(periods * _PERIOD // actions, dtype=torch.int8),
        _start,
        sweeps.lanes(seeds, **lanes),
        engine=_compiled(engine),
        record={"tally": Record(_tally_of, functools.partial(_points, _PERIOD // actions), None, _DESCRIPTION)},
        **options,
    )
    tally = found["tally"]
    if task.together:
        tally = tally.rename({tally.dims[-1]: "reward_scale"}).assign_coords(reward_scale=scales)
        tally = tally.transpose("reward_scale", ...)
    point, quantity = tally.dims[-2:]
    parts = {part: tally.isel({quantity: i}) for i, part in enumerate(Tally._fields[:3])}
    at = _PERIOD * (_kept(periods) + 1)
    return xarray.Dataset(parts, attrs=found.attrs).rename({point: "step"}).assign_coords(step=at)


def checked(
    caller: str, task: str, agents: Iterable[str], reward_scales: Iterable[SupportsFloat] | None, steps: int | None
) -> tuple[list[str], list[SupportsFloat], int]:
    """The agents' names, the scales of the rewards and the number of actions."""
    as_names(caller, "task", [task], list(TASKS))
    chosen = TASKS[task]
    names = list(as_names(caller, "agents", agents, TASK_AGENT_NAMES if chosen.together else SINGLE_AGENT_NAMES))
    scales = list(chosen.reward_scales if reward_scales is None else reward_scales)
    if chosen.together and len(scales) != len(chosen.reward_scales):
        raise ValueError(
            f"{caller}: `reward_scales` must have one for each of the {len(chosen.reward_scales)} tasks of {task}, got "
            f"{len(scales)}."
        )
    steps = as_count(caller, "steps", chosen.steps if steps is None else steps)
    if steps < chosen.longest:
        raise ValueError(f"{caller}: `steps` must be at least {chosen.longest}, an episode of {task}, got {steps}.")
    return names, scales, steps


def _compiled(engine: str) -> str:
    """`native` for "auto", where it can run. A step has so many actions that few of them earn back its compilation."""
    can_run = load_engine("native").why_not(torch.device("cpu")) is None
    return "native" if engine == "auto" and can_run else engine


def _start(seed: int) -> dict[str, Tensor]:
    return {"key": random.key(seed)}


def _tally_of(state: Any, info: Tensor) -> Tensor:
    """What is recorded of a sample: the episodes, the sum of their returns, and the best of them."""
    return info


def _learner(task: Task, name: str, actions: int, reward_scale: Any, learning_rate: Any, step_size: Any) -> Learner:
    """An agent as a learner of a sweep: its parameters are a key, its samples say nothing, its info is the tally.

    An update is so many actions.
    """

    def agent_of(key: Tensor) -> Agent:
        made: Any = task.make(key)
        if not task.together:
            return make_agent(name, scale_rewards(made, reward_scale), learning_rate, step_size)
        scales = torch.tensor(reward_scale)[_order(key, len(made))]
        scaled = tuple(scale_rewards(*one) for one in zip(made, scales, strict=True))
        return make_agent(name, scaled, learning_rate, step_size)

    def init(params: Any) -> Any:
        for_task, for_agent = random.split(params["key"], 2)
        zero = torch.zeros(len(reward_scale) if task.together else ())
        tally = Tally(zero, zero.clone(), torch.full_like(zero, _NO_EPISODE), zero.clone())
        return agent_of(for_task).init(for_agent), tally, for_task

    def update(state: Any, _: Any) -> Any:
        agent_state, tally, for_task = state
        agent = agent_of(for_task)

        def act(carry: Any, _: Any) -> tuple[Any, Any]:
            agent_state, tally = carry
            agent_state, experience = agent.step(agent_state)
            tally, _ = scan(count, tally, (experience.reward, experience.ended))
            return (agent_state, tally), ()

        def count(tally: Tally, action: tuple[Tensor, Tensor]) -> tuple[Tally, tuple[()]]:
            return _count(task, tally, *action), ()

        (agent_state, tally), _ = scan(act, (agent_state, tally), length=actions // agent.actions)
        counts = torch.stack(tally[:3])
        if task.together:  # by scale: the tasks are in another order in each seed
            counts = counts[:, _order(for_task, counts.shape[1]).argsort()]
        return (agent_state, tally, for_task), counts

    return Learner(init, update)


def _order(key: Tensor, tasks: int) -> Tensor:
    """The place of each task's scale among the scales."""
    return random.permutation(random.fold_in(key, 1), tasks)


def _count(task: Task, tally: Tally, reward: Tensor, ended: Tensor) -> Tally:
    running = tally.running + reward
    counts = ended & (tally.episodes < task.episodes)
    return Tally(
        tally.episodes + counts.to(torch.float32),
        tally.total_return + torch.where(counts, running, 0.0),
        torch.where(counts, torch.maximum(tally.best_episode, running), tally.best_episode),
        torch.where(ended, 0.0, running),
    )


def _points(samples: int, series: Tensor) -> Tensor:
    """The series at `POINTS` points, the last one among them; so many of its samples are a period."""
    return series[samples * (_kept(series.shape[0] // samples) + 1) - 1]


def _kept(periods: int) -> np.ndarray:
    """The periods that have a point."""
    return np.unique(np.linspace(0, periods, min(POINTS, periods) + 1).round().astype(int)[1:] - 1)
