"""Wrappers: any environment with other rewards, observations or actions.

`scale_rewards`, `clip_rewards`:                   each reward by itself
`standardize_rewards`, `standardize_observations`: by running statistics, which outlive an episode
`mirror_actions`, `slip`, `flip_cells`:            other tasks made of one

A wrapper changes ``transition.reward`` and leaves ``transition.raw_reward`` alone.

Source of the running statistics: Elsayed, Vasan and Mahmood, *Streaming deep reinforcement learning finally works*
(2024), algorithms 4 to 6, and their code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func import random
from popart_func.experiments.environments.environment import Environment, Transition, restart

__all__ = [
    "RunningMoments",
    "clip_rewards",
    "flip_cells",
    "mirror_actions",
    "scale_rewards",
    "slip",
    "standardize_observations",
    "standardize_rewards",
]

_EPSILON = 1e-8
"""What the paper's code adds to a variance before it divides by its root."""


@dataclass(frozen=True)
class _Wrapper:
    """An environment that is the one inside of it, but for what a subclass overrides."""

    environment: Environment

    @property
    def num_actions(self) -> int:
        return self.environment.num_actions

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return self.environment.observation_shape

    def reset(self, key: Tensor) -> tuple[Any, Tensor]:
        return self.environment.reset(key)

    def restart(self, state: Any, key: Tensor) -> tuple[Any, Tensor]:
        return restart(self.environment, state, key)

    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        return self.environment.step(state, action, key)


@dataclass(frozen=True)
class _Scaled(_Wrapper):
    scale: float | Tensor

    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        transition = self.environment.step(state, action, key)
        return transition._replace(reward=transition.reward * self.scale)


def scale_rewards(environment: Environment, scale: float | Tensor) -> Environment:
    """The environment with its rewards multiplied by ``scale``, which may be a hyper-parameter of the lane."""
    return _Scaled(environment, scale)


@dataclass(frozen=True)
class _Clipped(_Wrapper):
    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        transition = self.environment.step(state, action, key)
        return transition._replace(reward=transition.reward.clamp(-1, 1))


def clip_rewards(environment: Environment) -> Environment:
    """The environment with its rewards clipped to [−1, 1], as DQN's authors did."""
    return _Clipped(environment)


@dataclass(frozen=True)
class _Mirrored(_Wrapper):
    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        return self.environment.step(state, self.num_actions - 1 - action, key)


def mirror_actions(environment: Environment) -> Environment:
    """The environment with its actions in reverse order: left is right."""
    return _Mirrored(environment)


@dataclass(frozen=True)
class _Slippery(_Wrapper):
    probability: float | Tensor

    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        for_slip, for_action, key = random.split(key, 3)
        other = random.randint(for_action, (), 0, self.num_actions).to(action.dtype)
        action = torch.where(random.uniform(for_slip) < self.probability, other, action)
        return self.environment.step(state, action, key)


def slip(environment: Environment, probability: float | Tensor) -> Environment:
    """The environment with an action at random in the place of the agent's, with a probability."""
    return _Slippery(environment, probability)


@dataclass(frozen=True)
class _Flipped(_Wrapper):
    probability: float | Tensor

    def reset(self, key: Tensor) -> tuple[Any, Tensor]:
        return self._flip(*self.environment.reset(key), key)

    def restart(self, state: Any, key: Tensor) -> tuple[Any, Tensor]:
        return self._flip(*restart(self.environment, state, key), key)

    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        transition = self.environment.step(state, action, key)
        _, observation = self._flip(transition.state, transition.observation, key)
        return transition._replace(observation=observation)

    def _flip(self, state: Any, observation: Tensor, key: Tensor) -> tuple[Any, Tensor]:
        flips = random.uniform(random.fold_in(key, 1), observation.shape) < self.probability
        return state, torch.where(flips, 1 - observation, observation)


def flip_cells(environment: Environment, probability: float | Tensor) -> Environment:
    """The environment with each cell of its observations, which is 0 or 1, inverted with a probability."""
    return _Flipped(environment, probability)


class RunningMoments(NamedTuple):
    """Mean and variance of all samples so far: Welford's algorithm, with the variance 1 before the second sample."""

    number: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def like(cls, sample: Tensor) -> RunningMoments:
        """The moments of no samples, which have the shape of this one."""
        return cls(sample.new_zeros(()), torch.zeros_like(sample), torch.zeros_like(sample))

    def add(self, sample: Tensor) -> RunningMoments:
        """The moments with one more sample."""
        number = self.number + 1
        mean = self.mean + (sample - self.mean) / number
        return RunningMoments(number, mean, self.squares + (sample - self.mean) * (sample - mean))

    @property
    def deviation(self) -> Tensor:
        """The root of the unbiased variance and `_EPSILON`."""
        variance = torch.where(self.number > 1, self.squares / (self.number - 1).clamp(min=1), 1.0)
        return (variance + _EPSILON).sqrt()


class RewardsState(NamedTuple):
    """The state of the environment inside, the moments of the discounted sums, and the sum so far (0-d)."""

    inner: Any
    moments: RunningMoments
    discounted: Tensor


class ObservationsState(NamedTuple):
    """The state of the environment inside, and the moments of its observations."""

    inner: Any
    moments: RunningMoments


@dataclass(frozen=True)
class _StandardizedRewards(_Wrapper):
    discount: float | Tensor

    def reset(self, key: Tensor) -> tuple[RewardsState, Tensor]:
        inner, observation = self.environment.reset(key)
        zero = observation.new_zeros(())
        return RewardsState(inner, RunningMoments.like(zero), zero), observation

    def restart(self, state: RewardsState, key: Tensor) -> tuple[RewardsState, Tensor]:
        inner, observation = restart(self.environment, state.inner, key)
        return state._replace(inner=inner), observation

    def step(self, state: RewardsState, action: Tensor, key: Tensor) -> Transition:
        transition = self.environment.step(state.inner, action, key)
        goes_on = (~(transition.terminated | transition.truncated)).to(transition.reward.dtype)
        discounted = self.discount * goes_on * state.discounted + transition.reward
        moments = state.moments.add(discounted)
        now = RewardsState(transition.state, moments, discounted)
        return transition._replace(state=now, reward=transition.reward / moments.deviation)


def standardize_rewards(environment: Environment, discount: float | Tensor) -> Environment:
    """The environment with its rewards divided by the deviation of their discounted sums."""
    return _StandardizedRewards(environment, discount)


@dataclass(frozen=True)
class _StandardizedObservations(_Wrapper):
    def reset(self, key: Tensor) -> tuple[ObservationsState, Tensor]:
        inner, observation = self.environment.reset(key)
        return self._seen(inner, RunningMoments.like(observation), observation)

    def restart(self, state: ObservationsState, key: Tensor) -> tuple[ObservationsState, Tensor]:
        inner, observation = restart(self.environment, state.inner, key)
        return self._seen(inner, state.moments, observation)

    def step(self, state: ObservationsState, action: Tensor, key: Tensor) -> Transition:
        transition = self.environment.step(state.inner, action, key)
        now, observation = self._seen(transition.state, state.moments, transition.observation)
        return transition._replace(state=now, observation=observation)

    def _seen(self, inner: Any, moments: RunningMoments, observation: Tensor) -> tuple[ObservationsState, Tensor]:
        moments = moments.add(observation)
        standardized = (observation - moments.mean) / moments.deviation
        return ObservationsState(inner, moments), standardized


def standardize_observations(environment: Environment) -> Environment:
    """The environment with its observations in deviations from their running mean."""
    return _StandardizedObservations(environment)
