"""Workload ``ensemble``: many networks, each trained on minibatches of its own out of one data set that they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from popart_func import optim
from popart_func.experiments.workloads.case import (
    Case,
    JaxForm,
    as_numpy,
    blank,
    jax_linear,
    jax_training,
    lanes_of,
    steps_for,
    training_step,
)
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

    def loss(params: dict[str, Tensor], picks: Tensor) -> Tensor:
        return (network(params, inputs[picks]) - targets[picks]).square().mean()

    weights = INPUTS * WIDTH + WIDTH * WIDTH + WIDTH
    flops = (6 * weights - 2 * INPUTS * WIDTH) * BATCH
    steps = steps_for(flops, lanes)
    params = lanes_of(make, lanes)
    picks = torch.randint(0, SAMPLES, (steps, lanes, BATCH), generator=generator)

    def in_jax() -> JaxForm:
        import jax.numpy as jnp
        import optax

        all_inputs, all_targets = jnp.asarray(inputs.numpy()), jnp.asarray(targets.numpy())

        def network(params: Any, x: Any) -> Any:
            x = jnp.tanh(jax_linear(params, "0", x))
            x = jnp.tanh(jax_linear(params, "2", x))
            return jax_linear(params, "4", x)

        def loss(params: Any, picks: Any) -> Any:
            return jnp.mean((network(params, all_inputs[picks]) - all_targets[picks]) ** 2)

        return JaxForm(jax_training(loss, optax.adam(RATE)), as_numpy(params), as_numpy(picks.int()))

    start = params, torch.vmap(optimizer.init)(params)
    return Case(
        f"2x{WIDTH}, batch {BATCH}, adam", lanes, steps, training_step(loss, optimizer), start, picks, flops, in_jax
    )
