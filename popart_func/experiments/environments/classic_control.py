"""Gymnasium's ``CartPole-v1``, which PPO is usually shown on: two actions, truncated after 500 steps.

Source: ``gymnasium.envs.classic_control``, version 1.4; gymnax has the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func import random
from popart_func.experiments.environments.environment import Transition

__all__ = ["CartPoleV1", "CartPoleV1State"]


class CartPoleV1State(NamedTuple):
    """Place, speed, angle and its speed, float, and the steps since the episode's start, int32; 0-d."""

    x: Tensor
    x_dot: Tensor
    theta: Tensor
    theta_dot: Tensor
    timestep: Tensor


@dataclass(frozen=True)
class CartPoleV1:
    """A pole on a cart, pushed to the left (0) or to the right (1): a reward of 1 a step until it falls.

    The observation is ``[x, x_dot, theta, theta_dot]``.
    """

    max_steps: int = 500
    dtype: torch.dtype = torch.float32

    num_actions = 2
    observation_shape = (4,)

    def reset(self, key: Tensor) -> tuple[CartPoleV1State, Tensor]:
        start = random.uniform(key, (4,), minval=-0.05, maxval=0.05).to(self.dtype)
        x, x_dot, theta, theta_dot = start.unbind()
        return CartPoleV1State(x, x_dot, theta, theta_dot, torch.zeros_like(x, dtype=torch.int32)), start

    def step(self, state: CartPoleV1State, action: Tensor, key: Tensor) -> Transition:
        x, x_dot, theta, theta_dot, timestep = state
        mass_pole, mass_total, length, gravity, dt = 0.1, 1.1, 0.5, 9.8, 0.02
        force = (2 * action.to(self.dtype) - 1) * 10.0
        cos, sin = theta.cos(), theta.sin()
        push = (force + mass_pole * length * theta_dot.square() * sin) / mass_total
        theta_acc = (gravity * sin - cos * push) / (length * (4 / 3 - mass_pole * cos.square() / mass_total))
        x_acc = push - mass_pole * length * theta_acc * cos / mass_total

        state = CartPoleV1State(
            x + dt * x_dot, x_dot + dt * x_acc, theta + dt * theta_dot, theta_dot + dt * theta_acc, timestep + 1
        )
        terminated = (state.x.abs() > 2.4) | (state.theta.abs() > 12 * 2 * math.pi / 360)
        truncated = ~terminated & (state.timestep >= self.max_steps)
        observation = torch.stack(state[:4])
        reward = torch.ones_like(x)
        return Transition(state, observation, reward, reward, terminated, truncated)
