"""Workload ``gru``: a recurrent network, trained by back-propagation through time in the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from popart_func import optim
from popart_func.engines import scan
from popart_func.experiments.workloads.case import (
    Case,
    JaxForm,
    as_numpy,
    jax_linear,
    jax_training,
    lanes_of,
    steps_for,
    training_step,
)

__all__ = ["SIZES", "case"]

INPUTS, WIDTH, LENGTH, RATE = 8, 64, 20, 1e-3


SIZES = tuple({"batch": batch, "lanes": 16} for batch in (1, 16))


def make() -> nn.Module:
    return nn.ModuleDict({"cell": nn.GRUCell(INPUTS, WIDTH), "head": nn.Linear(WIDTH, 1)})


def _network(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs ``[length, batch, 1]`` for ``x`` ``[length, batch, inputs]``."""

    def cell(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        of_x = linear(x, params["cell.weight_ih"], params["cell.bias_ih"])
        of_h = linear(h, params["cell.weight_hh"], params["cell.bias_hh"])
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, -1), of_h.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + r * hn) + z * h
        return h, linear(h, params["head.weight"], params["head.bias"])

    outputs: Tensor = scan(cell, x.new_zeros(x.shape[1], WIDTH), x)[1]
    return outputs


def case(batch: int, lanes: int) -> Case:
    """64 units over sequences of 20, Adam: `popart_func.scan` here, `jax.lax.scan` there."""
    optimizer = optim.adam(RATE)

    def loss(params: dict[str, Tensor], sample: Any) -> Tensor:
        x, y = sample
        return (_network(params, x) - y).square().mean()

    weights = 3 * WIDTH * (INPUTS + WIDTH) + WIDTH
    flops = (6 * weights - 2 * 3 * WIDTH * INPUTS) * LENGTH * batch
    steps = steps_for(flops, lanes, most=200)
    params = lanes_of(make, lanes)
    x = torch.randn(steps, lanes, LENGTH, batch, INPUTS, generator=torch.Generator().manual_seed(0))
    xs = x, x.cumsum(2).sum(-1, keepdim=True)

    def in_jax() -> JaxForm:
        import jax
        import jax.numpy as jnp
        import optax

        def network(params: Any, x: Any) -> Any:
            def cell(h: Any, x: Any) -> Any:
                of_x = x @ params["cell.weight_ih"].T + params["cell.bias_ih"]
                of_h = h @ params["cell.weight_hh"].T + params["cell.bias_hh"]
                (xr, xz, xn), (hr, hz, hn) = jnp.split(of_x, 3, -1), jnp.split(of_h, 3, -1)
                r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
                h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
                return h, jax_linear(params, "head", h)

            return jax.lax.scan(cell, jnp.zeros((x.shape[1], WIDTH)), x)[1]

        def loss(params: Any, sample: Any) -> Any:
            x, y = sample
            return jnp.mean((network(params, x) - y) ** 2)

        return JaxForm(jax_training(loss, optax.adam(RATE)), as_numpy(params), as_numpy(xs))

    start = params, torch.vmap(optimizer.init)(params)
    size = f"{WIDTH} units, {LENGTH} steps, batch {batch}, adam"
    return Case(size, lanes, steps, training_step(loss, optimizer), start, xs, flops, in_jax)
