"""A workload at one size: its step for the engines, the same run in JAX, and how much arithmetic there is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from popart_func.models import init_lanes
from popart_func.optim import GradientTransformation, apply_updates
from popart_func.tree import PyTree

__all__ = [
    "Case",
    "JaxForm",
    "as_numpy",
    "blank",
    "jax_linear",
    "jax_popart",
    "jax_rescaled",
    "jax_training",
    "lanes_of",
    "steps_for",
    "training_step",
]

DISTINCT = 32
"""So many lanes have first parameters of their own; further lanes begin as one of these."""


class JaxForm(NamedTuple):
    """A workload as its users would write it in JAX: `bench` runs ``jit(vmap(one_lane))``.

    Attributes:
        one_lane: ``(start, xs) -> ys``: all steps of one lane, by `jax.lax.scan`.
        start: what a lane begins with; leaves ``[lanes, ...]``, numpy.
        xs: the inputs; leaves ``[steps, lanes, ...]``, numpy, or None.
    """

    one_lane: Callable[[Any, Any], Any]
    start: PyTree
    xs: PyTree


class Case(NamedTuple):
    """A workload at one size.

    Attributes:
        size: the sizes of network and batch, in words.
        lanes: the number of lanes.
        steps: the number of steps in a run.
        step: of one lane, for `scan_lanes`; it returns ``(carry, y)``.
        start: the first carry; leaves ``[lanes, ...]``.
        xs: the inputs; leaves ``[steps, lanes, ...]``, or None.
        flops: additions and multiplications of a lane-step in matrix products; 0 where the step is not made of them.
        jax: makes the same in JAX.
        checked: the number of first steps in which all sides must give the same outputs, to 0.001 of the largest.
    """

    size: str
    lanes: int
    steps: int
    step: Callable[[Any, Any], tuple[Any, Any]]
    start: PyTree
    xs: PyTree
    flops: int
    jax: Callable[[], JaxForm]
    checked: int = 100


def blank(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without numbers, for `stateless`."""
    with torch.device("meta"):
        return make()


def lanes_of(make: Callable[[], nn.Module], lanes: int) -> dict[str, Tensor]:
    """First parameters of each lane, ``[lanes, ...]``, by a module's own initialization."""
    few = init_lanes(make, seeds=range(min(lanes, DISTINCT)))
    return {name: leaf[torch.arange(lanes) % DISTINCT].contiguous() for name, leaf in few.items()}


def steps_for(flops: int, lanes: int, *, most: int = 2000) -> int:
    """The number of steps of a run that takes some tenths of a second."""
    return max(2, min(most, int(4e8 / (flops * lanes))))


def as_numpy(tree: PyTree) -> PyTree:
    """A tree of tensors as numpy arrays."""
    return optree.tree_map(Tensor.numpy, tree)


def training_step(loss: Callable[[Any, Any], Tensor], optimizer: GradientTransformation) -> Callable[[Any, Any], Any]:
    """A step that descends ``loss(params, x)``; its carry is the parameters and the optimizer's state."""

    def step(carry: Any, x: Any) -> Any:
        params, state = carry
        grads, value = grad_and_value(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return (apply_updates(params, updates), state), value

    return step


def jax_training(loss: Callable[[Any, Any], Any], optimizer: Any) -> Callable[[Any, Any], Any]:
    """`training_step` of one lane in JAX, scanned over ``xs``, with an optimizer of optax."""
    import jax
    import optax

    def step(carry: Any, x: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return lambda params, xs: jax.lax.scan(step, (params, optimizer.init(params)), xs)[1]


def jax_linear(params: Mapping[str, Any], name: str, x: Any) -> Any:
    """`torch.nn.Linear` in JAX."""
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def jax_popart(
    params: Mapping[str, Any], statistics: Any, y: Any, step_size: float, head: str
) -> tuple[dict[str, Any], Any, Any]:
    """Pop-Art's update in JAX, by rlax's rule: the popped parameters, the new statistics, and old scale / new scale."""
    import jax.numpy as jnp

    mean, second, scale = statistics
    new_mean = (1 - step_size) * mean + step_size * y.mean()
    new_second = (1 - step_size) * second + step_size * (y * y).mean()
    new_scale = jnp.sqrt(jnp.clip(new_second - new_mean**2, 1e-8, 1e12))
    popped = {
        **params,
        f"{head}.weight": params[f"{head}.weight"] * (scale / new_scale),
        f"{head}.bias": (scale * params[f"{head}.bias"] + mean - new_mean) / new_scale,
    }
    return popped, (new_mean, new_second, new_scale), scale / new_scale


def jax_rescaled(state: Any, ratio: Any, head: str) -> Any:
    """Optax's state, with Adam's moments of the head moved along with Pop-Art, as the learners do."""
    adam, *rest = state
    if not hasattr(adam, "mu"):
        return state

    def scaled(moments: Any, factor: Any) -> Any:
        return {name: leaf * factor if name.startswith(f"{head}.") else leaf for name, leaf in moments.items()}

    return (adam._replace(mu=scaled(adam.mu, ratio), nu=scaled(adam.nu, ratio**2)), *rest)
