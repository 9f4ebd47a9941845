"""Workload ``ensemble``: many networks, each trained on minibatches of its own out of one data set that they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import grad_and_value

from popart_func import optim
from popart_func.experiments.workloads.case import Case, JaxForm, blank, jax_linear, lanes_of, steps_for
from popart_func.models import stateless

__all__ = ["SIZES", "case"]

INPUTS, WIDTH, BATCH, SAMPLES, RATE = 16, 64, 64, 2000, 1e-3


SIZES = tuple({"lanes": lanes} for lanes in (10, 100))


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def case(lanes: int) -> Case:
    """Two hidden layers of 64, minibatches of 64, Adam."""
    network, optimizer = stateless(blank(make)), optim.adam(RATE)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator)
    targets = inputs.sum(1, keepdim=True).sin()

    def step(carry: Any, picks: Any) -> Any:
        params, state = carry
        x, y = inputs[picks], targets[picks]
        grads, value = grad_and_value(lambda params: (network(params, x) - y).square().mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return (optim.apply_updates(params, updates), state), value

    weights = INPUTS * WIDTH + WIDTH * WIDTH + WIDTH
    flops = (6 * weights - 2 * INPUTS * WIDTH) * BATCH
    steps = steps_for(flops, lanes)
    params = lanes_of(make, lanes)
    picks = torch.randint(0, SAMPLES, (steps, lanes, BATCH), generator=generator)

    def in_jax() -> JaxForm:
        import jax
        import jax.numpy as jnp
        import optax

        tx = optax.adam(RATE)
        all_inputs, all_targets = jnp.asarray(inputs.numpy()), jnp.asarray(targets.numpy())

        def network(params: Any, x: Any) -> Any:
            x = jnp.tanh(jax_linear(params, "0", x))
            x = jnp.tanh(jax_linear(params, "2", x))
            return jax_linear(params, "4", x)

        def step(carry: Any, picks: Any) -> Any:
            params, state = carry
            x, y = all_inputs[picks], all_targets[picks]
            value, grads = jax.value_and_grad(lambda params: jnp.mean((network(params, x) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        def one_lane(params: Any, picks: Any) -> Any:
            return jax.lax.scan(step, (params, tx.init(params)), picks)[1]

        return JaxForm(one_lane, {name: leaf.numpy() for name, leaf in params.items()}, picks.int().numpy())

    start = params, torch.vmap(optimizer.init)(params)
    return Case(f"2x{WIDTH}, batch {BATCH}, adam", lanes, steps, step, start, picks, flops, in_jax)
