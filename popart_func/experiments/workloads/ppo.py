"""Workload ``ppo``: the update of PPO on one minibatch: actor and critic, clipped gradients, Adam."""

from __future__ import annotations

import math
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

INPUTS, ACTIONS, WIDTH, RATE, CLIP, NORM = 4, 2, 64, 3e-4, 0.2, 0.5


SIZES = tuple({"batch": batch, "lanes": lanes} for batch in (128, 512) for lanes in (8, 64))


def _make(outputs: int) -> nn.Module:
    layers = nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)
    return nn.Sequential(*layers)


def make() -> nn.Module:
    return nn.ModuleDict({"actor": _make(ACTIONS), "critic": _make(1)})


def _part(params: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): leaf for key, leaf in params.items() if key.startswith(f"{name}.")}


def case(batch: int, lanes: int) -> Case:
    """Two networks of 2x64, minibatches of 128 or 512."""
    actor, critic = (stateless(blank(lambda n=outputs: _make(n))) for outputs in (ACTIONS, 1))  # type: ignore[misc]
    optimizer = optim.chain(optim.clip_by_global_norm(NORM), optim.adam(RATE, eps=1e-5))

    def loss(params: dict[str, Tensor], sample: Any) -> Tensor:
        x, action, old, advantage, returns = sample
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        logits = torch.log_softmax(actor(_part(params, "actor"), x), -1)
        entropy = -(logits.exp() * logits).sum(-1).mean()
        ratio = (logits.gather(-1, action[:, None].long())[:, 0] - old).exp()
        policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        value = 0.5 * (critic(_part(params, "critic"), x)[:, 0] - returns).square().mean()
        return policy + 0.5 * value - 0.01 * entropy

    first = 2 * INPUTS * WIDTH
    weights = first + 2 * WIDTH * WIDTH + WIDTH * (ACTIONS + 1)
    flops = (6 * weights - 2 * first) * batch
    steps = steps_for(flops, lanes)
    params = lanes_of(make, lanes)
    generator = torch.Generator().manual_seed(0)
    shape = (steps, lanes, batch)
    xs = (
        torch.randn(*shape, INPUTS, generator=generator),
        torch.randint(0, ACTIONS, shape, dtype=torch.int32, generator=generator),
        -math.log(ACTIONS) + 0.1 * torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )

    def in_jax() -> JaxForm:
        return JaxForm(_jax_lane(), as_numpy(params), as_numpy(xs))

    start = params, torch.vmap(optimizer.init)(params)
    size = f"2x{WIDTH} twice, minibatch {batch}, adam"
    return Case(size, lanes, steps, training_step(loss, optimizer), start, xs, flops, in_jax)


def _jax_lane() -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    def network(params: Any, x: Any) -> Any:
        x = jnp.tanh(jax_linear(params, "0", x))
        x = jnp.tanh(jax_linear(params, "2", x))
        return jax_linear(params, "4", x)

    def loss(params: Any, sample: Any) -> Any:
        x, action, old, advantage, returns = sample
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        logits = jax.nn.log_softmax(network(_part(params, "actor"), x))
        entropy = -(jnp.exp(logits) * logits).sum(-1).mean()
        ratio = jnp.exp(jnp.take_along_axis(logits, action[:, None], -1)[:, 0] - old)
        policy = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
        value = 0.5 * ((network(_part(params, "critic"), x)[:, 0] - returns) ** 2).mean()
        return policy + 0.5 * value - 0.01 * entropy

    return jax_training(loss, optax.chain(optax.clip_by_global_norm(NORM), optax.adam(RATE, eps=1e-5)))
