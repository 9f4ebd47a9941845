"""Workload ``conv``: a small convolutional network, as for MinAtar, trained on the values of actions."""

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
    training_step,
)
from popart_func.models import stateless

__all__ = ["SIZES", "case"]

CHANNELS, SIZE, FILTERS, HIDDEN, ACTIONS, BATCH, RATE, STEPS = 4, 10, 16, 128, 6, 32, 1e-3, 4


SIZES = tuple({"lanes": lanes} for lanes in (1, 8, 64))


def make() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, FILTERS, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(FILTERS * (SIZE - 2) ** 2, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, ACTIONS),
    )


def case(lanes: int) -> Case:
    """Images of 10x10x4, 16 filters of 3x3, a layer of 128, batch 32, Adam."""
    network, optimizer = stateless(blank(make)), optim.adam(RATE)

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        image, action, y = batch
        values = network(params, image.float()).gather(1, action[:, None].long())[:, 0]
        return (values - y).square().mean()

    places = (SIZE - 2) ** 2
    first = places * FILTERS * CHANNELS * 9
    weights = first + FILTERS * places * HIDDEN + HIDDEN * ACTIONS
    flops = (6 * weights - 2 * first) * BATCH
    params = lanes_of(make, lanes)
    generator = torch.Generator().manual_seed(0)
    xs = (
        (torch.rand(STEPS, lanes, BATCH, CHANNELS, SIZE, SIZE, generator=generator) < 0.1).to(torch.uint8),
        torch.randint(0, ACTIONS, (STEPS, lanes, BATCH), dtype=torch.int32, generator=generator),
        torch.randn(STEPS, lanes, BATCH, generator=generator),
    )

    def in_jax() -> JaxForm:
        import jax
        import jax.numpy as jnp
        import optax

        def network(params: Any, x: Any) -> Any:
            # Patches and a product: under vmap several times as fast on CPUs as `conv_general_dilated`.
            n = SIZE - 2
            patches = jnp.stack([x[:, :, i : i + n, j : j + n] for i in range(3) for j in range(3)], 2)
            patches = patches.transpose(0, 3, 4, 1, 2).reshape(-1, CHANNELS * 9)
            h = patches @ params["0.weight"].reshape(FILTERS, -1).T + params["0.bias"]
            h = jax.nn.relu(h.reshape(x.shape[0], n * n, FILTERS).transpose(0, 2, 1)).reshape(x.shape[0], -1)
            return jax_linear(params, "5", jax.nn.relu(jax_linear(params, "3", h)))

        def loss(params: Any, batch: Any) -> Any:
            image, action, y = batch
            values = network(params, image.astype(jnp.float32))
            return jnp.mean((jnp.take_along_axis(values, action[:, None], 1)[:, 0] - y) ** 2)

        return JaxForm(jax_training(loss, optax.adam(RATE)), as_numpy(params), as_numpy(xs))

    start = params, torch.vmap(optimizer.init)(params)
    size = f"{FILTERS} filters, {HIDDEN}, batch {BATCH}, adam"
    return Case(size, lanes, STEPS, training_step(loss, optimizer), start, xs, flops, in_jax)
