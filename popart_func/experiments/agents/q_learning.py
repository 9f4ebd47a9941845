"""Q-learning of one lane: `q_learning` learns from each transition as it comes, `dqn` from a replay buffer.

The target of a transition is ``r + γ Q(s', a*)`` in the rewards' units, where the values are unnormalized by the
statistics before they move. One statistic serves all actions. Behind a terminated state the value is 0; behind one
that a time limit truncated it is bootstrapped.

Source: Watkins (1989); Mnih et al., *Human-level control through deep reinforcement learning* (2015); van Hasselt,
Guez and Silver, *Deep reinforcement learning with double Q-learning* (2016).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func import random
from popart_func.experiments.agents.agent import Agent, Experience
from popart_func.experiments.agents.critics import Critic
from popart_func.experiments.agents.exploration import epsilon_greedy
from popart_func.experiments.agents.networks import init_mlp, layer_sizes
from popart_func.experiments.environments import Environment, step_or_reset
from popart_func.learners import LearnerState
from popart_func.pop_art import pop

__all__ = ["DQNState", "QLearningState", "Replay", "dqn", "q_learning"]

Scalar = float | Tensor


class QLearningState(NamedTuple):
    """What the next step of `q_learning` needs."""

    learner: LearnerState
    environment: Any
    observation: Tensor
    key: Tensor


class Replay(NamedTuple):
    """The last transitions, ``[capacity, ...]``, and how many were ever inserted."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    discount: Tensor
    inserted: Tensor


class DQNState(NamedTuple):
    """What the next step of `dqn` needs."""

    learner: LearnerState
    target: dict[str, Tensor]
    replay: Replay
    environment: Any
    observation: Tensor
    key: Tensor


def q_learning(
    environment: Environment,
    critic: Critic,
    hidden: tuple[int, ...] = (50,),
    *,
    discount: Scalar = 0.99,
    epsilon: Scalar = 0.05,
) -> Agent:
    """Online Q-learning: one gradient step for each transition, and no memory of it.

    Args:
        environment: a pure environment.
        critic: what learns the values, see `critics.make_critic`.
        hidden: the widths of the network's hidden layers.
        discount: γ.
        epsilon: the probability of an action at random.
    """

    def init(key: Tensor) -> QLearningState:
        key, for_network, for_reset = random.split(key, 3)
        params = init_mlp(for_network, layer_sizes(environment, hidden))
        return QLearningState(critic.learner.init(params), *environment.reset(for_reset), key)

    def step(state: QLearningState) -> tuple[QLearningState, Experience]:
        key, for_action, for_step = random.split(state.key, 3)
        learner, seen = state.learner, state.observation
        action = epsilon_greedy(for_action, critic.values(learner, learner.params, seen), epsilon)
        now, observation, transition = step_or_reset(environment, state.environment, action, for_step)
        best = critic.values(learner, learner.params, transition.observation).amax(-1)
        target = transition.reward + discount * torch.where(transition.terminated, torch.zeros_like(best), best)
        learner, _ = critic.learner.update(learner, (seen, target, action))
        ended = transition.terminated | transition.truncated
        return QLearningState(learner, now, observation, key), Experience(transition.raw_reward[None], ended[None])

    return Agent(init, step, actions=1)


def dqn(
    environment: Environment,
    critic: Critic,
    hidden: tuple[int, ...] = (50, 50),
    *,
    discount: Scalar = 0.99,
    epsilon: Scalar = 0.05,
    capacity: int = 10_000,
    batch_size: int = 32,
    steps_per_update: int = 4,
    target_rate: Scalar = 0.05,
) -> Agent:
    """Double DQN: a replay buffer, a batch from it for each gradient step, and a target network that follows.

    With a critic that pops, the target network is popped with the other, so that its values stay where they are.

    Args:
        environment: a pure environment.
        critic: what learns the values, see `critics.make_critic`.
        hidden: the widths of the network's hidden layers.
        discount: γ.
        epsilon: the probability of an action at random.
        capacity: how many transitions the buffer holds.
        batch_size: how many of them a gradient step sees, drawn with replacement.
        steps_per_update: actions for each gradient step. One step of the agent is so many actions.
        target_rate: how far the target network moves toward the other after each gradient step (Polyak).
    """

    def init(key: Tensor) -> DQNState:
        key, for_network, for_reset = random.split(key, 3)
        params = init_mlp(for_network, layer_sizes(environment, hidden))
        state, observation = environment.reset(for_reset)
        rows, row = torch.zeros(capacity), torch.zeros(capacity, *environment.observation_shape)
        count = torch.zeros((), dtype=torch.int32)
        replay = Replay(row, torch.zeros(capacity, dtype=torch.long), rows, row.clone(), rows.clone(), count)
        return DQNState(critic.learner.init(params), dict(params), replay, state, observation, key)

    def act(state: DQNState) -> tuple[DQNState, tuple[Tensor, ...], Experience]:
        key, for_action, for_step = random.split(state.key, 3)
        learner, seen = state.learner, state.observation
        action = epsilon_greedy(for_action, critic.values(learner, learner.params, seen), epsilon)
        now, observation, transition = step_or_reset(environment, state.environment, action, for_step)
        goes_on = discount * (~transition.terminated).to(seen.dtype)
        row = seen, action, transition.reward, transition.observation, goes_on
        state = state._replace(environment=now, observation=observation, key=key)
        return state, row, Experience(transition.raw_reward, transition.terminated | transition.truncated)

    def learn(state: DQNState) -> DQNState:
        key, for_batch = random.split(state.key)
        replay, learner, target = state.replay, state.learner, state.target
        filled = replay.inserted.clamp(max=capacity)
        at = (random.uniform(for_batch, (batch_size,)) * filled).long().clamp(max=capacity - 1)
        seen, action, reward, following, goes_on = (part[at] for part in replay[:5])

        chosen = critic.values(learner, learner.params, following).argmax(-1, keepdim=True)
        value = critic.values(learner, target, following).gather(-1, chosen).squeeze(-1)
        new, _ = critic.learner.update(learner, (seen, reward + goes_on * value, action))
        if critic.pops:
            target = {**target, **_popped_head(target, learner, new)}
        target = {name: leaf + target_rate * (new.params[name] - leaf) for name, leaf in target.items()}
        return state._replace(learner=new, target=target, key=key)

    def step(state: DQNState) -> tuple[DQNState, Experience]:
        rows, experiences = [], []
        for _ in range(steps_per_update):
            state, row, experience = act(state)
            rows.append(row)
            experiences.append(experience)
        # All rows at once: the buffer is then written in place.
        state = state._replace(replay=_insert(state.replay, tuple(map(torch.stack, zip(*rows, strict=True)))))
        return learn(state), Experience(*map(torch.stack, zip(*experiences, strict=True)))

    return Agent(init, step, actions=steps_per_update)


def _insert(replay: Replay, rows: tuple[Tensor, ...]) -> Replay:
    """The buffer with new rows, ``[new, ...]``, in the place of the oldest ones."""
    new, capacity = rows[0].shape[0], replay.reward.shape[0]
    at = (replay.inserted + torch.arange(new)).remainder(capacity).long()
    parts = (part.index_copy(0, at, row.to(part.dtype)) for part, row in zip(replay[:5], rows, strict=True))
    return Replay._make((*parts, replay.inserted + new))


def _popped_head(params: dict[str, Tensor], old: LearnerState, new: LearnerState) -> dict[str, Tensor]:
    head = {name: leaf for name, leaf in params.items() if name.startswith("head.")}
    return pop(head, old.statistics, new.statistics)
