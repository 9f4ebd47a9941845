"""Workloads ``regression`` and ``mlp``: Pop-Art regression on the paper's network, and on wider ones with batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from popart_func import optim
from popart_func.experiments.workloads.case import (
    Case,
    JaxForm,
    as_numpy,
    blank,
    jax_linear,
    jax_popart,
    jax_rescaled,
    lanes_of,
    steps_for,
)
from popart_func.learners import popart_learner
from popart_func.models import stateless
from popart_func.pop_art import popart

__all__ = ["MLP", "REGRESSION", "case"]

INPUTS, STEP_SIZE, RATE = 16, 0.01, 1e-3


REGRESSION = tuple({"hidden": (10,) * 4, "batch": 1, "lanes": lanes} for lanes in (1, 8, 50, 1000))
"""The paper's network, one example a step."""

MLP: tuple[dict[str, Any], ...] = (
    *({"hidden": (64, 64), "batch": batch, "lanes": lanes} for batch in (1, 32, 128) for lanes in (1, 32, 256)),
    {"hidden": (64, 64), "batch": 32, "lanes": 32, "optimizer": "adam"},
    {"hidden": (256, 256), "batch": 1, "lanes": 32},
    {"hidden": (256, 256), "batch": 32, "lanes": 8},
    {"hidden": (256, 256), "batch": 128, "lanes": 32},
)
"""Wider networks, batches of 1 to 128."""


def case(hidden: Sequence[int], batch: int, lanes: int, optimizer: str = "sgd") -> Case:
    """Pop-Art regression on a network with these hidden layers."""
    sizes = [INPUTS, *hidden, 1]
    head = str(2 * len(hidden))

    def make() -> nn.Module:
        layers = [part for a, b in itertools.pairwise(sizes[:-1]) for part in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(sizes[-2], 1))

    chosen = {"sgd": optim.sgd(RATE), "adam": optim.adam(RATE)}[optimizer]
    learner = popart_learner(stateless(blank(make)), chosen, popart(1, STEP_SIZE), head=head)

    def step(state: Any, batch: Any) -> Any:
        state, info = learner.update(state, batch)
        return state, info.error.mean()

    # The gradient of the inputs is not needed; elsewhere forward, the inputs' gradient and the weights' cost 2 each.
    weights = [a * b for a, b in itertools.pairwise(sizes)]
    flops = (6 * sum(weights) - 2 * weights[0]) * batch
    steps = steps_for(flops, lanes)
    params = lanes_of(make, lanes)
    x = torch.randn(steps, lanes, batch, INPUTS, generator=torch.Generator().manual_seed(0))
    xs = x, 100 * x.sum(-1, keepdim=True) + 7

    def in_jax() -> JaxForm:
        import jax
        import jax.numpy as jnp
        import optax

        tx = {"sgd": optax.sgd(RATE), "adam": optax.adam(RATE)}[optimizer]

        def network(params: Any, x: Any) -> Any:
            for layer in range(len(hidden)):
                x = jnp.tanh(jax_linear(params, str(2 * layer), x))
            return jax_linear(params, head, x)

        def step(carry: Any, batch: Any) -> Any:
            params, statistics, state = carry
            x, y = batch
            params, statistics, ratio = jax_popart(params, statistics, y, STEP_SIZE, head)
            state = jax_rescaled(state, ratio, head)
            mean, _, scale = statistics

            def loss(params: Any) -> Any:
                out = network(params, x)
                return 0.5 * jnp.mean((out - (y - mean) / scale) ** 2), out

            grads, out = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), statistics, state), jnp.abs(out * scale + mean - y).mean()

        def one_lane(params: Any, xs: Any) -> Any:
            start = jnp.float32(0), jnp.float32(1), jnp.float32(1)
            return jax.lax.scan(step, (params, start, tx.init(params)), xs)[1]

        return JaxForm(one_lane, as_numpy(params), as_numpy(xs))

    shape = f"{len(hidden)}x{hidden[0]}, batch {batch}, {optimizer}"
    return Case(shape, lanes, steps, step, torch.vmap(learner.init)(params), xs, flops, in_jax)
