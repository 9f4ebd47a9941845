"""Workload ``replay``: Q-learning from a replay buffer in the carry, of two capacities and in two orders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from popart_func import optim, random
from popart_func.experiments.workloads.case import Case, JaxForm, as_numpy, blank, jax_linear, lanes_of, steps_for
from popart_func.models import stateless

__all__ = ["SIZES", "case"]

INPUTS, HIDDEN, ACTIONS, BATCH, RATE, DISCOUNT = 50, 64, 3, 32, 1e-3, 0.99


SIZES = tuple(
    {"order": order, "capacity": capacity, "lanes": 8}
    for order in ("insert, sample", "sample, insert")
    for capacity in (100, 10_000)
)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, ACTIONS))


def case(order: str, capacity: int, lanes: int) -> Case:
    """Each step writes one transition and trains on 32 that it draws, before or after."""
    network, optimizer = stateless(blank(make)), optim.adam(RATE)
    samples_first = order.startswith("sample")

    def step(carry: Any, x: Any) -> Any:
        params, state, key, count, buffers = carry
        key, draw = random.split(key)
        picks = random.randint(draw, (BATCH,), 0, capacity).long()
        drawn = tuple(buffer[picks] for buffer in buffers)
        buffers = tuple(buffer.index_put((count % capacity,), new) for buffer, new in zip(buffers, x, strict=True))
        if not samples_first:
            drawn = tuple(buffer[picks] for buffer in buffers)
        seen, action, reward, after = drawn

        def loss(params: dict[str, Tensor]) -> Tensor:
            values = network(params, seen).gather(1, action[:, None].long())[:, 0]
            target = reward + DISCOUNT * network(params, after).max(1).values.detach()
            return (values - target).square().mean()

        grads, value = grad_and_value(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optim.apply_updates(params, updates), state, key, count + 1, buffers), value

    weights, head = INPUTS * HIDDEN, HIDDEN * ACTIONS
    flops = (2 * (weights + head) + 4 * weights + 6 * head) * BATCH
    steps = steps_for(flops, lanes)
    generator = torch.Generator().manual_seed(0)

    def transitions(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        draw = lambda *shape: torch.randn(lanes, count, *shape, generator=generator)  # noqa: E731
        action = torch.randint(0, ACTIONS, (lanes, count), dtype=torch.int32, generator=generator)
        return draw(INPUTS), action, draw(), draw(INPUTS)

    params = lanes_of(make, lanes)
    seeds = torch.arange(lanes)
    buffers = transitions(capacity)
    xs = tuple(leaf.transpose(0, 1).contiguous() for leaf in transitions(steps))
    start = (
        params,
        torch.vmap(optimizer.init)(params),
        torch.vmap(random.key)(seeds),
        torch.zeros(lanes, dtype=torch.int32),
        buffers,
    )

    def in_jax() -> JaxForm:
        return JaxForm(_jax_lane(capacity, samples_first), as_numpy((params, seeds.int(), buffers)), as_numpy(xs))

    size = f"1x{HIDDEN}, batch {BATCH}, {order}, capacity {capacity:,}"
    return Case(size, lanes, steps, step, start, xs, flops, in_jax)


def _jax_lane(capacity: int, samples_first: bool) -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    tx = optax.adam(RATE)

    def network(params: Any, x: Any) -> Any:
        return jax_linear(params, "2", jax.nn.relu(jax_linear(params, "0", x)))

    def step(carry: Any, x: Any) -> Any:
        params, state, key, count, buffers = carry
        key, draw = jax.random.split(key)
        picks = jax.random.randint(draw, (BATCH,), 0, capacity)
        drawn = tuple(buffer[picks] for buffer in buffers)
        buffers = tuple(buffer.at[count % capacity].set(new) for buffer, new in zip(buffers, x, strict=True))
        if not samples_first:
            drawn = tuple(buffer[picks] for buffer in buffers)
        seen, action, reward, after = drawn

        def loss(params: Any) -> Any:
            values = jnp.take_along_axis(network(params, seen), action[:, None], 1)[:, 0]
            target = reward + DISCOUNT * jax.lax.stop_gradient(network(params, after).max(1))
            return jnp.mean((values - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, key, count + 1, buffers), value

    def one_lane(start: Any, xs: Any) -> Any:
        params, seed, buffers = start
        carry = params, tx.init(params), jax.random.key(seed), jnp.int32(0), buffers
        carry, ys = jax.lax.scan(step, carry, xs)
        return ys, carry[-1]

    return one_lane
