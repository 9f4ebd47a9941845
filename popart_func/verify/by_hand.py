"""The same mathematics written again, by hand and in float64: what the library is held against.

Nothing here calls the library. Networks are lists of layers ``(W, b)``, gradients are back-propagated by hand, the
statistics are plain float64, an optimizer's step is its formula.

How much rounding does to a network after some steps has no simple bound, so it is measured, by Monte Carlo arithmetic
(Parker, 1997): what goes into sums and products and what comes out is disturbed by random relative errors, and what
the disturbances do to the result is what roundings of that size would do, however much the steps in between amplify or
damp them. (A dot product has one of its factors disturbed: that is where its terms cancel.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import optree
import torch
from torch import Tensor, vmap

from popart_func import random
from popart_func.tree import PyTree
from popart_func.verify.discrepancy import unit_roundoff
from popart_func.verify.draw import Architecture

__all__ = [
    "Gradients",
    "Layers",
    "Measured",
    "Noise",
    "Statistics",
    "art",
    "backward",
    "forward",
    "layers_of",
    "louder",
    "measure",
    "named",
    "pop",
    "roundings",
    "silent",
    "step",
]

PROBES = 12
"""How many times the disturbed computation is run. By chance a number may hardly move in any of them: by less than a
third of the standard deviation in all twelve with odds of one in ten millions, ``(2 Φ(⅓) − 1)¹²``."""

LOUDNESS = 1024.0
"""The disturbances in units of one rounding: far above float64's own rounding, and still small."""

_POOL = 4096

Layers = list[tuple[Tensor, Tensor]]
Gradients = list[tuple[Tensor, Tensor]]


class Measured(NamedTuple):
    """A result, and the size that a rounding of its computation acts on, leaf by leaf."""

    value: PyTree
    terms: PyTree


Noise = Callable[[Tensor], Tensor]
"""What arithmetic does to a number."""


def silent(tensor: Tensor) -> Tensor:
    """Undisturbed."""
    return tensor


class _Disturbance:
    """Disturbs tensors by relative errors of at most ``level``; every call takes other numbers of the pool."""

    def __init__(self, pool: Tensor, level: Tensor) -> None:
        self.factors, self.calls = 1 + level * pool, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        start = (self.calls * 997) % (_POOL - tensor.numel())
        return tensor * self.factors[start : start + tensor.numel()].reshape(tensor.shape)


def measure(compute: Callable[[Noise], PyTree], like: Tensor, dtype: torch.dtype) -> Measured:
    """Runs a computation undisturbed and disturbed.

    Args:
        compute: from a noise to a tree of float64 tensors.
        like: a tensor on the device to compute on.
        dtype: the dtype whose roundings are imitated.

    Returns:
        The undisturbed result, and as terms of each leaf its largest entry plus the largest change that disturbances
        of one rounding make in the leaf.
    """
    loudness = LOUDNESS * unit_roundoff(dtype)
    levels = torch.tensor([0.0] + [loudness] * PROBES, dtype=torch.float64, device=like.device)
    runs = vmap(lambda pool, level: compute(_Disturbance(pool, level)))(_pool(like.device), levels)

    def terms(leaf: Tensor) -> Tensor:
        flat = leaf.reshape(PROBES + 1, -1)
        return flat[0].abs().amax() + (flat[1:] - flat[0]).abs().amax() / loudness

    return Measured(optree.tree_map(lambda leaf: leaf[0], runs), optree.tree_map(terms, runs))


def roundings(architecture: Architecture) -> int:
    """How many of the library's roundings one disturbance stands for, at most.

    - A layer with n inputs: each product takes part in n roundings, and the bias in one more.
    - Back-propagation: of a batch's examples, or of a layer's units, each product in as many as there are.
    - A task's mean of m targets: two in each deviation, m − 1 sums and a division.
    - tanh: four, two units in the last place, where before and after it one is disturbed.
    - POP's bias: ratio, product and sum, or two differences, their sum, a quotient and a sum; a scale's root is
      disturbed with it: at most five, as in a variance's update (`running.follow`) beside what its deviations carry.

    So one more than the most numbers that are added up, five at least. They may conspire within a disturbance; across
    disturbances they are as random as these are.
    """
    shared = architecture.tasks == 1 and not architecture.indexed
    targets = max(architecture.batch, 1) * (architecture.outputs if shared else 1)
    return max(architecture.inputs, architecture.hidden, targets + 1, 4) + 1


def louder(noise: Noise, count: int, architecture: Architecture) -> Noise:
    """A disturbance for a place where more roundings happen than `roundings` says: as many times as large."""
    times = max(1.0, count / roundings(architecture))
    return lambda tensor: tensor + times * (noise(tensor) - tensor)


@functools.cache
def _pool(device: torch.device) -> Tensor:
    numbers = random.uniform(random.key(0).to(device), (PROBES + 1, _POOL), -1.0, 1.0)
    return numbers.double()


def layers_of(params: dict[str, Tensor]) -> Layers:
    """The layers of flat parameters, which come in the order of the layers."""
    names = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
    return [(params[f"{name}.weight"].double(), params[f"{name}.bias"].double()) for name in names]


def named(params: dict[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """Layers under the names of the parameters."""
    flat = [tensor for layer in layers for tensor in layer]
    return dict(zip(params, flat, strict=True))


def forward(layers: Layers, x: Tensor, noise: Noise) -> tuple[list[Tensor], Tensor]:
    """The input and the activations of each hidden layer, and the outputs: ``[batch, ...]`` each."""
    hidden = [x]
    for weight, bias in layers[:-1]:
        hidden.append(noise(torch.tanh(noise(noise(hidden[-1]) @ weight.mT + noise(bias)))))
    weight, bias = layers[-1]
    return hidden, noise(noise(hidden[-1]) @ weight.mT + noise(bias))


def backward(layers: Layers, hidden: list[Tensor], cotangent: Tensor, noise: Noise) -> Gradients:
    """The gradients of ``Σ cotangent · outputs`` by back-propagation, summed over the batch."""
    gradients: Gradients = []
    for (weight, _), h in zip(reversed(layers), reversed(hidden), strict=True):
        gradients.append((noise(cotangent).mT @ noise(h), noise(cotangent).sum(-2)))
        # 1 − h² loses what rounding takes from h² when h is near 1.
        cotangent = (noise(cotangent) @ weight) * (noise(torch.ones_like(h)) - noise(h.square()))
    return gradients[::-1]


def step(layers: Layers, gradients: Gradients, learning_rate: Tensor, noise: Noise) -> Layers:
    """``θ − α g`` for each."""
    return [
        (noise(weight - noise(learning_rate * dw)), noise(bias - noise(learning_rate * db)))
        for (weight, bias), (dw, db) in zip(layers, gradients, strict=True)
    ]


class Statistics(NamedTuple):
    """Mean and variance, ``[tasks]``, in plain float64."""

    mean: Tensor
    variance: Tensor

    @property
    def scale(self) -> Tensor:
        """σ, without bounds."""
        return self.variance.sqrt()


def art(statistics: Statistics, targets: Tensor, mask: Tensor, step_size: Tensor, noise: Noise) -> Statistics:
    """The paper's equations for a batch whose targets of one task count as one: in moments about the old mean.

    Args:
        statistics: before.
        targets: ``[batch, outputs]``; with one task all outputs are its targets.
        mask: which of them there are, zeros and ones.
        step_size: β.
        noise: of the arithmetic.
    """
    if statistics.mean.shape[0] == 1:
        targets, mask = targets.reshape(-1, 1), mask.reshape(-1, 1)
    count = mask.sum(0)
    step = torch.where(count > 0, step_size, 0)
    share = mask / count.clamp(min=1)
    deviation = noise(targets - statistics.mean)
    first, second = (noise(share * deviation)).sum(0), (noise(share * deviation.square())).sum(0)
    # Moments about the old mean, then about the new one: ν' − μ'² with the old mean as origin.
    about_old = noise((1 - step) * statistics.variance) + noise(step * second)
    return Statistics(statistics.mean + noise(step * first), about_old - noise((step * first).square()))


def pop(head: tuple[Tensor, Tensor], old: Statistics, new: Statistics, noise: Noise) -> tuple[Tensor, Tensor]:
    """Proposition 1: ``W' = σ/σ' W``, ``b' = (σ b + μ − μ')/σ'``."""
    weight, bias = head
    moved = noise(old.scale * noise(bias)) + noise(old.mean - new.mean)
    return noise(weight * noise(old.scale / new.scale)[:, None]), noise(moved / new.scale)
