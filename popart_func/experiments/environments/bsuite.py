"""The environments of bsuite's scale experiments: `Bandit`, `Catch`, `CartPole`, `MountainCar`.

State, rewards, ends and observations are those of ``bsuite.environments``, where an episode that runs out of time is
terminated, not truncated, and where the time is part of the observation. Observations have bsuite's values in a flat
vector. `sweep.NUM_EPISODES` of bsuite is 10,000 for the bandit and Catch, 1,000 for the two others.

Source: Osband et al., *Behaviour Suite for Reinforcement Learning* (2020), version 0.3.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func import random
from popart_func.experiments.environments.environment import Transition

__all__ = ["Bandit", "CartPole", "CartPoleState", "Catch", "CatchState", "MountainCar", "MountainCarState"]


def _never(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


@dataclass(frozen=True)
class Bandit:
    """A bandit whose arms give 0, 0.1, ..., 1, one step an episode.

    Attributes:
        rewards: the reward of each arm, ``[11]``. `Bandit.shuffled(key)` draws their order.
    """

    rewards: Tensor

    @classmethod
    def shuffled(cls, key: Tensor, num_actions: int = 11) -> Bandit:
        """A bandit whose rewards lie on its arms in random order: bsuite's ``mapping_seed``."""
        return cls(random.permutation(key, num_actions).float() / (num_actions - 1))

    @property
    def num_actions(self) -> int:
        return self.rewards.shape[-1]

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return (1,)

    def reset(self, key: Tensor) -> tuple[tuple[()], Tensor]:
        return (), torch.ones_like(self.rewards[:1])

    def step(self, state: tuple[()], action: Tensor, key: Tensor) -> Transition:
        reward = self.rewards.gather(-1, action.long()[None]).squeeze(-1)
        ended = torch.ones_like(reward, dtype=torch.bool)
        return Transition((), torch.ones_like(self.rewards[:1]), reward, reward, ended, ~ended)


class CatchState(NamedTuple):
    """Columns of the ball and the paddle, and the ball's row; int32, 0-d."""

    ball_x: Tensor
    ball_y: Tensor
    paddle_x: Tensor


@dataclass(frozen=True)
class Catch:
    """A ball falls down a random column; the paddle has to be under it: reward 1 or −1 in the last row.

    Actions: left, stay, right. The observation is the board, ``[rows * columns]``, 1 where the ball or the paddle is.
    """

    rows: int = 10
    columns: int = 5
    dtype: torch.dtype = torch.float32

    num_actions = 3

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return (self.rows * self.columns,)

    def reset(self, key: Tensor) -> tuple[CatchState, Tensor]:
        ball_x = random.randint(key, (), 0, self.columns)
        state = CatchState(ball_x, torch.zeros_like(ball_x), torch.full_like(ball_x, self.columns // 2))
        return state, self.observe(state)

    def step(self, state: CatchState, action: Tensor, key: Tensor) -> Transition:
        paddle_x = (state.paddle_x + action.to(torch.int32) - 1).clamp(0, self.columns - 1)
        state = CatchState(state.ball_x, state.ball_y + 1, paddle_x)
        terminated = state.ball_y == self.rows - 1
        caught = torch.where(state.ball_x == paddle_x, 1.0, -1.0)
        reward = torch.where(terminated, caught, 0.0).to(self.dtype)
        return Transition(state, self.observe(state), reward, reward, terminated, _never(terminated))

    def observe(self, state: CatchState) -> Tensor:
        """The board of a state."""
        cells = torch.arange(self.rows * self.columns, device=state.ball_x.device)
        ball = cells == state.ball_y * self.columns + state.ball_x
        paddle = cells == (self.rows - 1) * self.columns + state.paddle_x
        return (ball | paddle).to(self.dtype)


class CartPoleState(NamedTuple):
    """Place, speed, angle, its speed, and the seconds since the episode's start; float, 0-d."""

    x: Tensor
    x_dot: Tensor
    theta: Tensor
    theta_dot: Tensor
    time_elapsed: Tensor


@dataclass(frozen=True)
class CartPole:
    """bsuite's cart-pole: three actions, steps of 0.01 s, ten seconds; a reward of 1 for each step in balance.

    An episode ends when the pole leans too far, the cart is 3 from the middle, or the time is over. The observation is
    ``[x / 3, x_dot / 3, sin(theta), cos(theta), theta_dot, time / 10]``. The time is a sum: ten seconds are over after
    1001 steps in float64, as in bsuite, and after 1000 in float32.
    """

    height_threshold: float = 0.8
    x_threshold: float = 3.0
    timescale: float = 0.01
    max_time: float = 10.0
    init_range: float = 0.05
    dtype: torch.dtype = torch.float32

    num_actions = 3
    observation_shape = (6,)

    def reset(self, key: Tensor) -> tuple[CartPoleState, Tensor]:
        start = random.uniform(key, (4,), minval=-self.init_range, maxval=self.init_range).to(self.dtype)
        x, x_dot, theta, theta_dot = start.unbind()
        state = CartPoleState(x, x_dot, theta, theta_dot, torch.zeros_like(x))
        return state, self.observe(state)

    def step(self, state: CartPoleState, action: Tensor, key: Tensor) -> Transition:
        x, x_dot, theta, theta_dot, time_elapsed = state
        mass_pole, mass_total, length, gravity = 0.1, 1.1, 0.5, 9.8
        force = (action.to(self.dtype) - 1) * 10.0
        cos, sin = theta.cos(), theta.sin()
        push = (force + mass_pole * length * theta_dot.square() * sin) / mass_total
        theta_acc = (gravity * sin - cos * push) / (length * (4 / 3 - mass_pole * cos.square() / mass_total))
        x_acc = push - mass_pole * length * theta_acc * cos / mass_total

        dt = self.timescale
        state = CartPoleState(
            x + dt * x_dot,
            x_dot + dt * x_acc,
            torch.remainder(theta + dt * theta_dot, 2 * math.pi),
            theta_dot + dt * theta_acc,
            time_elapsed + dt,
        )
        balanced = (state.theta.cos() > self.height_threshold) & (state.x.abs() < self.x_threshold)
        terminated = ~balanced | (state.time_elapsed > self.max_time)
        reward = balanced.to(self.dtype)
        return Transition(state, self.observe(state), reward, reward, terminated, _never(terminated))

    def observe(self, state: CartPoleState) -> Tensor:
        """What the agent sees of a state."""
        x, x_dot, theta, theta_dot, time_elapsed = state
        parts = x / self.x_threshold, x_dot / self.x_threshold, theta.sin(), theta.cos(), theta_dot
        return torch.stack([*parts, time_elapsed / self.max_time])


class MountainCarState(NamedTuple):
    """Position and velocity, float, and the steps since the episode's start, int32; 0-d."""

    position: Tensor
    velocity: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class MountainCar:
    """A car with a weak engine has to swing itself out of a valley: a reward of −1 a step, at most 1000 of them.

    Actions: left, none, right. The observation is ``[position, velocity, timestep / 1000]``.
    """

    max_steps: int = 1000
    dtype: torch.dtype = torch.float32

    num_actions = 3
    observation_shape = (3,)

    def reset(self, key: Tensor) -> tuple[MountainCarState, Tensor]:
        position = random.uniform(key, (), minval=-0.6, maxval=-0.4).to(self.dtype)
        state = MountainCarState(position, torch.zeros_like(position), torch.zeros_like(position, dtype=torch.int32))
        return state, self.observe(state)

    def step(self, state: MountainCarState, action: Tensor, key: Tensor) -> Transition:
        push = (action.to(self.dtype) - 1) * 0.001
        velocity = (state.velocity + (push + (3 * state.position).cos() * -0.0025)).clamp(-0.07, 0.07)
        position = (state.position + velocity).clamp(-1.2, 0.6)
        velocity = torch.where(position == torch.full_like(position, -1.2), velocity.clamp(min=0), velocity)
        state = MountainCarState(position, velocity, state.timestep + 1)
        terminated = (position >= 0.5) | (state.timestep >= self.max_steps)
        reward = torch.full_like(position, -1.0)
        return Transition(state, self.observe(state), reward, reward, terminated, _never(terminated))

    def observe(self, state: MountainCarState) -> Tensor:
        """What the agent sees of a state."""
        return torch.stack([state.position, state.velocity, state.timestep.to(self.dtype) / self.max_steps])
