"""Random draws for one seed: networks, targets of any magnitude, statistics, bounds of the scale.

All draws of a seed come from one key, so that lane *i* of a batch of seeds equals seed *i* alone.

No draw is symmetric. Scales, offsets and tails differ from entry to entry, so that a wrong sign or two swapped
statistics change the result.
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
"""The range of the targets' magnitudes."""

SCALE_LB, SCALE_UB = 1e-12, 1e12
"""Bounds of the scale that never bind for such targets; `bounds` draws bounds that do."""

BOUNDS: dict[str, Any] = {"scale_lb": SCALE_LB, "scale_ub": SCALE_UB}
"""`SCALE_LB` and `SCALE_UB` as keyword arguments of `pop_art`'s functions."""


class Architecture(NamedTuple):
    """The shapes of network and data; all lanes of one call share them.

    Attributes:
        inputs: the number of inputs.
        hidden: the number of units in each hidden layer.
        layers: the number of hidden layers.
        outputs: the number of outputs of the head.
        tasks: the number of entries of the statistics: ``outputs``, or 1 if all outputs share one entry.
        batch: the number of examples in a batch; 0 for one example without a batch axis.
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
        """The shape with the batch axis in front, if the architecture has one."""
        return (self.batch, *shape) if self.batch else shape


ARCHITECTURES = (
    Architecture(inputs=16, hidden=10, layers=4, outputs=1, tasks=1),
    Architecture(inputs=3, hidden=5, layers=1, outputs=3, tasks=3, batch=4),
    Architecture(inputs=7, hidden=4, layers=2, outputs=2, tasks=1),
    Architecture(inputs=2, hidden=6, layers=3, outputs=4, tasks=4, batch=5, indexed=True),
    Architecture(inputs=5, hidden=3, layers=1, outputs=3, tasks=1, batch=2, indexed=True),
)
"""Seed s gets the architecture s modulo their number. The first is the papers' network."""


class Modules(NamedTuple):
    """The modules of one network: the layers below the head, the head, and the whole network."""

    lower: nn.Module
    upper: nn.Module
    unified: nn.Module


def modules(architecture: Architecture) -> Modules:
    """The modules of an architecture, on the meta device: the papers' network for the first, tanh layers for others.

    The head is named ``output_linear`` in each of them.
    """
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


# Built at import: building a module draws random numbers, which vmap forbids. The values are never read.
with torch.random.fork_rng(devices=()):
    _MODULES = {
        architecture: Modules(*(module.to("meta") for module in _build(architecture))) for architecture in ARCHITECTURES
    }


def uniforms(key: Tensor, dtype: torch.dtype, **shapes: Sequence[int]) -> dict[str, Tensor]:
    """Uniform random numbers in the open interval (0, 1), with as many random digits as the dtype has.

    One draw yields all of them.

    Args:
        key: the random key; don't use it again.
        dtype: float32 or float64.
        **shapes: the shape of each result, by the name of the result.
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
    """Maps uniform numbers in (0, 1) to uniform numbers in an interval."""
    return low + (high - low) * uniform


def log_between(low: int | float, high: int | float, uniform: Tensor) -> Tensor:
    """Maps uniform numbers in (0, 1) to numbers in an interval whose logarithm is uniform."""
    return torch.exp(between(math.log(low), math.log(high), uniform))


def magnitude(uniform: Tensor) -> Tensor:
    """Maps uniform numbers to magnitudes of targets, `LEAST_SCALE` to `GREATEST_SCALE`."""
    return log_between(LEAST_SCALE, GREATEST_SCALE, uniform)


def bounds(uniforms: Tensor) -> dict[str, Tensor]:
    """Maps two uniform numbers to bounds of the scale; for about a quarter of the targets one of them binds."""
    low, high = uniforms.unbind()
    return {"scale_lb": log_between(SCALE_LB, 1, low), "scale_ub": log_between(1, SCALE_UB, high)}


def normal(uniform: Tensor) -> Tensor:
    """Maps uniform numbers to standard normal ones."""
    return math.sqrt(2) * torch.special.erfinv(between(-1, 1, uniform))


def heavy_tailed(uniform: Tensor) -> Tensor:
    """Maps uniform numbers to Student's t with two degrees of freedom, centred on 0.3.

    The variance is infinite, and both signs occur.
    """
    return 0.3 + between(-1, 1, uniform) / (2 * uniform * (1 - uniform)).sqrt()


def network(key: Tensor, dtype: torch.dtype, architecture: Architecture) -> dict[str, Tensor]:
    """Random parameters in the order of the layers: the head's normal, the others uniform in ± 1/√fan-in."""
    shapes = {name: tuple(value.shape) for name, value in modules(architecture).unified.named_parameters()}
    params = {}
    for name, uniform in uniforms(key, dtype, **shapes).items():
        fan_in = shapes[name.removesuffix("bias").removesuffix("weight") + "weight"][1]
        is_head = name.startswith("output_linear.")
        params[name] = normal(uniform) if is_head else between(-1, 1, uniform) / math.sqrt(fan_in)
    return params


def statistics(shift: Tensor, scale: Tensor, residue: Tensor) -> PopArtState:
    """Statistics with this shift, scale and residue, ``[tasks]`` each, and a count of 0."""
    return PopArtState(shift, scale, scale.square(), torch.zeros_like(shift, dtype=torch.int32), residue)
