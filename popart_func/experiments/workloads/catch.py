"""Workload ``catch``: online Q-learning on bsuite's Catch, environment and random numbers in the step, Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from popart_func import optim, random
from popart_func.experiments.workloads.case import (
    Case,
    JaxForm,
    as_numpy,
    blank,
    jax_linear,
    jax_popart,
    jax_rescaled,
    lanes_of,
)
from popart_func.learners import popart_learner
from popart_func.models import stateless
from popart_func.pop_art import popart, unnormalize

__all__ = ["SIZES", "case"]

ROWS, COLUMNS, HIDDEN, ACTIONS = 10, 5, 50, 3
EPSILON, DISCOUNT, RATE, STEP_SIZE = 0.05, 0.99, 0.005, 1e-3
LANE_STEPS = 100_000


SIZES = tuple({"lanes": lanes} for lanes in (1, 16, 100, 1000))


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(ROWS * COLUMNS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, ACTIONS))


def case(lanes: int) -> Case:
    """A hidden layer of 50, and one step of the environment a step."""
    network = stateless(blank(make))
    learner = popart_learner(network, optim.adam(RATE), popart(1, STEP_SIZE), head="2")
    cells = torch.arange(ROWS * COLUMNS)

    def observe(ball_x: Tensor, ball_y: Tensor, paddle: Tensor) -> Tensor:
        return ((cells == ball_y * COLUMNS + ball_x) | (cells == (ROWS - 1) * COLUMNS + paddle)).float()

    def step(carry: Any, _: Any) -> Any:
        state, key, (ball_x, ball_y, paddle) = carry
        key, explore, choice, place = random.split(key, 4)
        seen = observe(ball_x, ball_y, paddle)
        greedy = network(state.params, seen).argmax()
        action = torch.where(random.uniform(explore) < EPSILON, random.randint(choice, (), 0, ACTIONS).long(), greedy)
        paddle = (paddle + action.int() - 1).clamp(0, COLUMNS - 1)
        ball_y = ball_y + 1
        done = ball_y == ROWS - 1
        reward = torch.where(done, torch.where(ball_x == paddle, 1.0, -1.0), 0.0)
        values = unnormalize(state.statistics, network(state.params, observe(ball_x, ball_y, paddle)))
        target = reward + DISCOUNT * torch.where(done, 0.0, values.max())
        state, _ = learner.update(state, (seen, target, action))
        ball_x = torch.where(done, random.randint(place, (), 0, COLUMNS), ball_x)
        ball_y = torch.where(done, 0, ball_y)
        paddle = torch.where(done, COLUMNS // 2, paddle)
        return (state, key, (ball_x, ball_y, paddle)), reward

    steps = max(20, min(2000, LANE_STEPS // lanes))
    params = lanes_of(make, lanes)
    seeds = torch.arange(lanes, dtype=torch.int32)
    zeros = torch.zeros(lanes, dtype=torch.int32)
    start = (
        torch.vmap(learner.init)(params),
        torch.vmap(random.key)(seeds.long()),
        (seeds % COLUMNS, zeros, zeros + COLUMNS // 2),
    )

    def in_jax() -> JaxForm:
        return JaxForm(_jax_lane(steps), as_numpy((params, seeds, seeds % COLUMNS)), None)

    # Two values to act and to bootstrap, and a training step of one of three outputs.
    weights, head = ROWS * COLUMNS * HIDDEN, HIDDEN * ACTIONS
    flops = 4 * (weights + head) + 4 * weights + 6 * head
    return Case(f"1x{HIDDEN}, batch 1, adam", lanes, steps, step, start, None, flops, in_jax)


def _jax_lane(steps: int) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    tx = optax.adam(RATE)
    cells = jnp.arange(ROWS * COLUMNS)

    def network(params: Any, x: Any) -> Any:
        return jax_linear(params, "2", jax.nn.relu(jax_linear(params, "0", x)))

    def observe(ball_x: Any, ball_y: Any, paddle: Any) -> Any:
        seen = (cells == ball_y * COLUMNS + ball_x) | (cells == (ROWS - 1) * COLUMNS + paddle)
        return seen.astype(jnp.float32)

    def step(carry: Any, _: Any) -> Any:
        (params, statistics, state), key, (ball_x, ball_y, paddle) = carry
        key, explore, choice, place = jax.random.split(key, 4)
        seen = observe(ball_x, ball_y, paddle)
        greedy = network(params, seen).argmax()
        action = jnp.where(jax.random.uniform(explore) < EPSILON, jax.random.randint(choice, (), 0, ACTIONS), greedy)
        paddle = jnp.clip(paddle + action - 1, 0, COLUMNS - 1)
        ball_y = ball_y + 1
        done = ball_y == ROWS - 1
        reward = jnp.where(done, jnp.where(ball_x == paddle, 1.0, -1.0), 0.0)
        mean, _, scale = statistics
        values = network(params, observe(ball_x, ball_y, paddle)) * scale + mean
        target = reward + DISCOUNT * jnp.where(done, 0.0, values.max())
        params, statistics, ratio = jax_popart(params, statistics, target, STEP_SIZE, "2")
        state = jax_rescaled(state, ratio, "2")
        goal = (target - statistics[0]) / statistics[2]
        grads = jax.grad(lambda params: 0.5 * (network(params, seen)[action] - goal) ** 2)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ball_x = jnp.where(done, jax.random.randint(place, (), 0, COLUMNS), ball_x)
        ball_y = jnp.where(done, 0, ball_y)
        paddle = jnp.where(done, COLUMNS // 2, paddle)
        return ((params, statistics, state), key, (ball_x, ball_y, paddle)), reward

    def one_lane(start: Any, _: Any) -> Any:
        params, seed, ball = start
        statistics = jnp.float32(0), jnp.float32(1), jnp.float32(1)
        place = ball, jnp.int32(0), jnp.int32(COLUMNS // 2)
        carry = (params, statistics, tx.init(params)), jax.random.key(seed), place
        return jax.lax.scan(step, carry, None, length=steps)[1]

    return one_lane
