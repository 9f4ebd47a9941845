"""What a check draws for one seed: networks, targets of any magnitude, statistics.

All of it comes from one key, so that lane *i* is what seed *i* gives alone.

Nothing is symmetric: scales, offsets and tails differ from entry to entry, so that a wrong sign or two swapped
statistics can't hide.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popart_func import models, random
from popart_func.pop_art import PopArtState

__all__ = [
    "ARCHITECTURES",
    "BOUNDS",
    "SCALE_LB",
    "SCALE_UB",
    "Architecture",
    "Modules",
    "between",
    "bounds",
    "heavy_tailed",
    "log_between",
    "magnitude",
    "modules",
    "network",
    "normal",
    "statistics",
    "uniforms",
]

LEAST_SCALE, GREATEST_SCALE = 1e-6, 1e6
"""The magnitudes of targets."""

SCALE_LB, SCALE_UB = 1e-12, 1e12
"""Bounds that never bind for such targets; `bounds` draws others."""

BOUNDS: dict[str, Any] = {"scale_lb": SCALE_LB, "scale_ub": SCALE_UB}
"""The same, as `pop_art` takes them."""


class Architecture(NamedTuple):
    """The shapes of a seed, which must be the same in all lanes of one call.

    Attributes:
        inputs: how many.
        hidden: units in each hidden layer.
        layers: hidden layers.
        outputs: of the head.
        tasks: entries of the statistics: ``outputs``, or 1 for one that all outputs share.
        batch: examples at a time; 0 for one without a batch axis.
        indexed: whether each example has a target for one output only.
    """

    inputs: int
    hidden: int
    layers: int
    outputs: int
    tasks: int
    batch: int = 0
    indexed: bool = False

    def batched(self, *shape: int) -> tuple[int, ...]:
        """A shape with the batch axis in front, if there is one."""
        return (self.batch, *shape) if self.batch else shape


ARCHITECTURES = (
    Architecture(inputs=16, hidden=10, layers=4, outputs=1, tasks=1),
    Architecture(inputs=3, hidden=5, layers=1, outputs=3, tasks=3, batch=4),
    Architecture(inputs=7, hidden=4, layers=2, outputs=2, tasks=1),
    Architecture(inputs=2, hidden=6, layers=3, outputs=4, tasks=4, batch=5, indexed=True),
    Architecture(inputs=5, hidden=3, layers=1, outputs=3, tasks=1, batch=2, indexed=True),
)
"""Seed s has number s modulo their count; the first is the papers' network."""


class Modules(NamedTuple):
    """One network as blueprints: below the head, the head, and both in one."""

    lower: nn.Module
    upper: nn.Module
    unified: nn.Module


def modules(architecture: Architecture) -> Modules:
    """The verification networks where they have the architecture, else tanh layers with the same name for the head."""
    return _MODULES[architecture]


def _build(architecture: Architecture) -> Modules:
    inputs, hidden, outputs = architecture.inputs, architecture.hidden, architecture.outputs
    if architecture.layers == 4:
        return Modules(
            models.LowerLayers(inputs, hidden),
            models.UpperLayer(hidden, outputs),
            models.UnifiedModel(inputs, hidden, outputs),
        )
    lower: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in range(architecture.layers):
        lower[f"hidden{layer}"] = nn.Linear(hidden if layer else inputs, hidden)
        lower[f"tanh{layer}"] = nn.Tanh()
    upper: OrderedDict[str, nn.Module] = OrderedDict(output_linear=nn.Linear(hidden, outputs))
    return Modules(nn.Sequential(lower), nn.Sequential(upper), nn.Sequential(OrderedDict(**lower, **upper)))


# Built here, since a module draws when it is built, which vmap forbids; then without values, since none is ever read.
with torch.random.fork_rng(devices=()):
    _MODULES = {
        architecture: Modules(*(module.to("meta") for module in _build(architecture))) for architecture in ARCHITECTURES
    }


def uniforms(key: Tensor, dtype: torch.dtype, **shapes: Sequence[int]) -> dict[str, Tensor]:
    """Numbers in (0, 1), with as many random digits as the dtype has, in one draw.

    Args:
        key: not to be used again.
        dtype: float32 or float64.
        **shapes: the names of the results and their shapes.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if dtype == torch.float64:
        high, low = random.uniform(key, (2, sum(sizes))).double().unbind()
        numbers = high + (low + 2.0**-24) * 2.0**-23
    else:
        numbers = random.uniform(key, (sum(sizes),)) + 2.0**-24
    parts = numbers.split(sizes)
    return {name: part.reshape(tuple(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def between(low: int | float, high: int | float, uniform: Tensor) -> Tensor:
    """Uniform on an interval."""
    return low + (high - low) * uniform


def log_between(low: int | float, high: int | float, uniform: Tensor) -> Tensor:
    """Uniform in the logarithm."""
    return torch.exp(between(math.log(low), math.log(high), uniform))


def magnitude(uniform: Tensor) -> Tensor:
    """A scale of targets."""
    return log_between(LEAST_SCALE, GREATEST_SCALE, uniform)


def bounds(uniforms: Tensor) -> dict[str, Tensor]:
    """Bounds of the scale, of which one or the other binds for every few targets, from two numbers."""
    low, high = uniforms.unbind()
    return {"scale_lb": log_between(SCALE_LB, 1, low), "scale_ub": log_between(1, SCALE_UB, high)}


def normal(uniform: Tensor) -> Tensor:
    """Standard normal."""
    return math.sqrt(2) * torch.special.erfinv(between(-1, 1, uniform))


def heavy_tailed(uniform: Tensor) -> Tensor:
    """Student's t with two degrees of freedom, around 0.3: its variance is infinite, and both signs occur."""
    return 0.3 + between(-1, 1, uniform) / (2 * uniform * (1 - uniform)).sqrt()


def network(key: Tensor, dtype: torch.dtype, architecture: Architecture) -> dict[str, Tensor]:
    """Parameters in the order of the layers: each uniform within the root of its fan-in, the head normal."""
    shapes = {name: tuple(value.shape) for name, value in modules(architecture).unified.named_parameters()}
    params = {}
    for name, uniform in uniforms(key, dtype, **shapes).items():
        fan_in = shapes[name.removesuffix("bias").removesuffix("weight") + "weight"][1]
        is_head = name.startswith("output_linear.")
        params[name] = normal(uniform) if is_head else between(-1, 1, uniform) / math.sqrt(fan_in)
    return params


def statistics(shift: Tensor, scale: Tensor, residue: Tensor) -> PopArtState:
    """Statistics of these moments, ``[tasks]`` each."""
    return PopArtState(shift, scale, scale.square(), torch.zeros_like(shift, dtype=torch.int32), residue)
