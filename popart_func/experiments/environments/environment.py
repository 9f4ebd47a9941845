"""What an environment is: two pure functions for one environment, `reset` and `step`.

reset: environment.reset(key) -> (state, observation)
step:  environment.step(state, action, key) -> Transition

A state is a NamedTuple of tensors. Everything is written for one environment of one lane: `torch.vmap` runs many, an
engine runs them inside of a step, and `interop.jax.to_jax_function` in JAX. Keys are those of `popart_func.random`.
An environment that ends stays where it is told to; `step_or_reset` starts the next episode. `wrappers` change rewards,
observations or actions of any environment.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import optree
import torch
from torch import Tensor

from popart_func import random

__all__ = ["Environment", "Transition", "restart", "step_or_reset"]


class Transition(NamedTuple):
    """What one step gives.

    Attributes:
        state: the state that was reached.
        observation: what the agent sees of it, float.
        reward: 0-d, float: what the agent learns from. Wrappers may change it.
        raw_reward: the environment's own reward, which no wrapper changes: what an agent is scored by.
        terminated: the episode is over, and what follows is worth 0; 0-d, bool.
        truncated: the episode was cut off by a time limit, and what would follow has a value; 0-d, bool.
    """

    state: Any
    observation: Tensor
    reward: Tensor
    raw_reward: Tensor
    terminated: Tensor
    truncated: Tensor


@runtime_checkable
class Environment(Protocol):
    """A pure environment with discrete actions ``0 ... num_actions - 1``."""

    @property
    def num_actions(self) -> int: ...

    @property
    def observation_shape(self) -> tuple[int, ...]: ...

    def reset(self, key: Tensor) -> tuple[Any, Tensor]:
        """The first state of an episode, and its observation."""

    def step(self, state: Any, action: Tensor, key: Tensor) -> Transition:
        """One action, an integer tensor without dimensions. The key is for environments that draw in a step."""


def step_or_reset(environment: Environment, state: Any, action: Tensor, key: Tensor) -> tuple[Any, Tensor, Transition]:
    """A step, and the first state of the next episode where this one ended.

    Returns:
        The state and the observation to go on from, and the transition as it was: its observation is the last one of
        the episode, which a value is bootstrapped from where the episode was truncated.

    >>> from popart_func.experiments.environments.bsuite import Catch
    >>> catch = Catch()
    >>> state, observation = catch.reset(random.key(0))
    >>> state, observation, transition = step_or_reset(catch, state, torch.tensor(1), random.key(1))
    >>> transition.reward, state.ball_y
    (tensor(0.), tensor(1, dtype=torch.int32))
    """
    for_step, for_reset = random.split(key, 2)
    transition = environment.step(state, action, for_step)
    ended = transition.terminated | transition.truncated
    first: Any = restart(environment, transition.state, for_reset)
    last: Any = transition.state, transition.observation
    following: Any = optree.tree_map(lambda new, old: torch.where(ended, new, old), first, last)
    return *following, transition


def restart(environment: Environment, state: Any, key: Tensor) -> tuple[Any, Tensor]:
    """The first state of the next episode and its observation.

    An environment whose state holds something that outlives an episode has a method ``restart(state, key)``; the state
    of any other one starts anew, by `reset`.
    """
    found = getattr(environment, "restart", None)
    first: tuple[Any, Tensor] = environment.reset(key) if found is None else found(state, key)
    return first
