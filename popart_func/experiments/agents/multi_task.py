"""Q-learning of several tasks with one network, which has the rows of every task's actions in its head.

In a step each task's environment takes one action, and the network learns from all these transitions as one batch. The
target of a task is ``r + γ max Q_task(s')`` in its own rewards' units. Whether the tasks have statistics of their own,
share one or have none is the critic's affair: ``popart(tasks, ..., groups=task_of_outputs(...))``, ``popart(1, ...)``,
or plain values.

Source: Hessel et al., *Multi-task deep reinforcement learning with PopArt* (2019), with Q-learning in V-trace's place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func import random
from popart_func.experiments.agents.agent import Agent, Experience
from popart_func.experiments.agents.critics import Critic
from popart_func.experiments.agents.exploration import epsilon_greedy
from popart_func.experiments.agents.networks import init_mlp
from popart_func.experiments.environments import Environment, step_or_reset
from popart_func.learners import LearnerState

__all__ = ["MultiTaskState", "multi_task_q_learning", "task_of_outputs"]

Scalar = float | Tensor


class MultiTaskState(NamedTuple):
    """What the next step of `multi_task_q_learning` needs.

    Attributes:
        learner: the network, its statistics and its optimizer.
        environments: the state of each task's environment.
        observations: ``[tasks, inputs]``.
        key: of all that is drawn.
    """

    learner: LearnerState
    environments: tuple[Any, ...]
    observations: Tensor
    key: Tensor


def task_of_outputs(tasks: int, actions: int) -> Tensor:
    """The task of each output of the network, ``[tasks * actions]``: the ``groups`` of `pop_art.popart`.

    >>> task_of_outputs(2, 3)
    tensor([0, 0, 0, 1, 1, 1])
    """
    return torch.arange(tasks).repeat_interleave(actions)


def multi_task_q_learning(
    environments: Sequence[Environment],
    critic: Critic,
    hidden: tuple[int, ...] = (50,),
    *,
    discount: Scalar = 0.99,
    epsilon: Scalar = 0.05,
) -> Agent:
    """Online Q-learning of several tasks at once.

    Args:
        environments: one for each task, with observations of one shape and equally many actions.
        critic: what learns the values; its network has ``tasks * actions`` outputs.
        hidden: the widths of the network's hidden layers.
        discount: γ.
        epsilon: the probability of an action at random.

    Returns:
        An agent whose experience is ``[1, tasks]``.

    Raises:
        ValueError: the environments differ in their observations' shape or their number of actions.
    """
    kinds = {(environment.observation_shape, environment.num_actions) for environment in environments}
    if len(kinds) != 1:
        raise ValueError(
            f"multi_task_q_learning: `environments` must have one shape of observations and one number of actions, "
            f"got {sorted(kinds)}."
        )
    ((shape, actions),) = kinds
    tasks = len(environments)
    rows = torch.arange(tasks)

    def values(learner: LearnerState, observations: Tensor) -> Tensor:
        """Of each task's actions for its own observation, ``[tasks, actions]``."""
        of_all = critic.values(learner, learner.params, observations).unflatten(-1, (tasks, actions))
        return of_all.diagonal(dim1=0, dim2=1).movedim(-1, 0)

    def init(key: Tensor) -> MultiTaskState:
        key, for_network, *for_resets = random.split(key, 2 + tasks)
        params = init_mlp(for_network, [math.prod(shape), *hidden, tasks * actions])
        firsts = [one.reset(for_reset) for one, for_reset in zip(environments, for_resets, strict=True)]
        states, observations = zip(*firsts, strict=True)
        return MultiTaskState(critic.learner.init(params), states, torch.stack(observations), key)

    def step(state: MultiTaskState) -> tuple[MultiTaskState, Experience]:
        key, for_actions, for_steps = random.split(state.key, 3)
        learner, seen = state.learner, state.observations
        keys = random.split(for_actions, tasks)
        chosen = [epsilon_greedy(*one, epsilon) for one in zip(keys, values(learner, seen), strict=True)]
        stepped = [
            step_or_reset(*one)
            for one in zip(environments, state.environments, chosen, random.split(for_steps, tasks), strict=True)
        ]
        states, observations, transitions = zip(*stepped, strict=True)
        terminated, truncated, reward, raw_reward, following = (
            torch.stack([getattr(one, name) for one in transitions])
            for name in ("terminated", "truncated", "reward", "raw_reward", "observation")
        )
        best = values(learner, following).amax(-1)
        targets = reward + discount * torch.where(terminated, torch.zeros_like(best), best)
        learner, _ = critic.learner.update(learner, (seen, targets, rows * actions + torch.stack(chosen)))
        experience = Experience(raw_reward[None], (terminated | truncated)[None])
        return MultiTaskState(learner, states, torch.stack(observations), key), experience

    return Agent(init, step, actions=1)
