"""Streaming Q(λ) of one lane: traces and a bounded step, no memory of transitions, no batch, no target network.

The target ``r + γ max Q(s')`` is in the rewards' units, and values are unnormalized by the statistics before they move,
as in `q_learning`. The trace is that of the normalized output. Traces end with an episode and behind an action that was
not greedy (Watkins). The network has layer normalization, leaky relu and sparse first weights.

Source: Elsayed, Vasan and Mahmood, *Streaming deep reinforcement learning finally works* (2024), stream Q(λ). Their
rewards and observations are standardized: see `environments.wrappers`. Here the head starts at 0, see `networks`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from popart_func import random
from popart_func.experiments.agents.agent import Agent, Experience
from popart_func.experiments.agents.exploration import epsilon_greedy
from popart_func.experiments.agents.networks import apply_normalized_mlp, init_sparse_mlp, layer_sizes
from popart_func.experiments.agents.traces import obgd, pop_traces
from popart_func.experiments.environments import Environment, step_or_reset
from popart_func.optim import apply_updates
from popart_func.pop_art import PopArt, PopArtState, normalize, unnormalize

__all__ = ["StreamState", "stream_q"]

Scalar = float | Tensor

_HEAD = "head"


class StreamState(NamedTuple):
    """What the next step of `stream_q` needs."""

    params: dict[str, Tensor]
    traces: dict[str, Tensor]
    statistics: PopArtState
    environment: Any
    observation: Tensor
    key: Tensor


def stream_q(
    environment: Environment,
    popart: PopArt,
    hidden: tuple[int, ...] = (50, 50),
    *,
    step_size: Scalar = 1.0,
    kappa: Scalar = 2.0,
    trace: Scalar = 0.8,
    discount: Scalar = 0.99,
    epsilon: Scalar = 0.05,
) -> Agent:
    """Streaming Q(λ) under Pop-Art statistics, or with plain values.

    Args:
        environment: a pure environment.
        popart: one statistic for all actions, such as ``popart(1, step_size=0.001)``; with ``scales.fixed`` of 0 and 1
            values are plain.
        hidden: the widths of the network's hidden layers.
        step_size: α of `traces.obgd`.
        kappa: κ of `traces.obgd`.
        trace: λ.
        discount: γ.
        epsilon: the probability of an action at random.
    """
    optimizer = obgd(step_size, decay=discount * trace, kappa=kappa)
    sizes = layer_sizes(environment, hidden)

    def values(params: dict[str, Tensor], statistics: PopArtState, observation: Tensor) -> Tensor:
        return unnormalize(statistics, apply_normalized_mlp(params, observation))

    def init(key: Tensor) -> StreamState:
        key, for_network, for_reset = random.split(key, 3)
        params = init_sparse_mlp(for_network, sizes)
        return StreamState(params, optimizer.init(params), popart.init(params), *environment.reset(for_reset), key)

    def step(state: StreamState) -> tuple[StreamState, Experience]:
        key, for_action, for_step = random.split(state.key, 3)
        params, old, seen = state.params, state.statistics, state.observation
        of_actions = values(params, old, seen)
        action = epsilon_greedy(for_action, of_actions, epsilon)
        now, observation, transition = step_or_reset(environment, state.environment, action, for_step)
        best = values(params, old, transition.observation).amax(-1)
        target = transition.reward + discount * torch.where(transition.terminated, torch.zeros_like(best), best)
        ended = transition.terminated | transition.truncated

        head = {name: leaf for name, leaf in params.items() if name.startswith(f"{_HEAD}.")}
        popped, statistics = popart.update(head, old, target[None])
        params = {**params, **popped}

        def output(params: dict[str, Tensor]) -> Tensor:
            return apply_normalized_mlp(params, seen).gather(-1, action[None]).squeeze(-1)

        delta = normalize(statistics, target[None]).squeeze(-1) - output(params)
        updates, traces = optimizer.update(
            grad(output)(params),
            delta,
            pop_traces(state.traces, old, statistics, head=_HEAD),
            ended | (action != of_actions.argmax(-1)),
        )
        params = dict(apply_updates(params, updates))
        experience = Experience(transition.raw_reward[None], ended[None])
        return StreamState(params, traces, statistics, now, observation, key), experience

    return Agent(init, step, actions=1)
