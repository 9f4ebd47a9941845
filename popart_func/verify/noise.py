"""Rounding errors of a network's training, measured by disturbing the computation.

No simple bound tells what rounding does to a network after some training steps. So `measure` runs the computation in
float64, once as it is and several times with random relative errors on the numbers that enter sums and products and on
their results. This is Monte Carlo arithmetic (Parker, 1997). The change of the outcome estimates what roundings of the
same size would do, including how later steps amplify or damp them. In a dot product one factor is disturbed, since
that disturbs each of the terms that may cancel.
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
from popart_func.verify.check import Settings
from popart_func.verify.discrepancy import Discrepancy, compare, rounding_sides, unit_roundoff
from popart_func.verify.draw import Architecture

__all__ = ["Measured", "Noise", "amplify", "compare_measured", "measure", "no_noise", "roundings_per_disturbance"]

PROBES = 12
"""How many disturbed runs `measure` makes. A result may by chance hardly move in any of them: the odds that it moves by
less than a third of the standard deviation in all twelve are one in ten million, ``(2 Φ(⅓) − 1)¹²``."""

LOUDNESS = 1024.0
"""The size of a disturbance, in units of one rounding: far above float64's own rounding, and still small."""

_POOL = 4096

Noise = Callable[[Tensor], Tensor]
"""Disturbs the entries of a tensor. Hand-written computations apply it to intermediate results."""


class Measured(NamedTuple):
    """A result, and for each of its leaves the terms: the size that the computation's roundings act on."""

    value: PyTree
    terms: PyTree


def no_noise(tensor: Tensor) -> Tensor:
    """The noise that changes nothing."""
    return tensor


class _Disturbance:
    """A noise of relative errors of at most ``level``; every call takes other numbers from the pool."""

    def __init__(self, pool: Tensor, level: Tensor) -> None:
        self.factors, self.calls = 1 + level * pool, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        start = (self.calls * 997) % (_POOL - tensor.numel())
        return tensor * self.factors[start : start + tensor.numel()].reshape(tensor.shape)


def measure(compute: Callable[[Noise], PyTree], like: Tensor, dtype: torch.dtype) -> Measured:
    """Runs a computation undisturbed and disturbed, to find its result and how roundings change it.

    Args:
        compute: computes a tree of float64 tensors, and applies the noise that it gets.
        like: a tensor on the device to compute on.
        dtype: the dtype whose roundings are imitated.

    Returns:
        The undisturbed result. The terms of a leaf are its largest absolute entry plus the largest change that
        disturbances of one rounding make in the leaf.
    """
    loudness = LOUDNESS * unit_roundoff(dtype)
    levels = torch.tensor([0.0] + [loudness] * PROBES, dtype=torch.float64, device=like.device)
    runs = vmap(lambda pool, level: compute(_Disturbance(pool, level)))(_pool(like.device), levels)

    def terms(leaf: Tensor) -> Tensor:
        flat = leaf.reshape(PROBES + 1, -1)
        return flat[0].abs().amax() + (flat[1:] - flat[0]).abs().amax() / loudness

    return Measured(optree.tree_map(lambda leaf: leaf[0], runs), optree.tree_map(terms, runs))


def compare_measured(got: PyTree, compute: Callable[[Noise], PyTree], like: Tensor, settings: Settings) -> Discrepancy:
    """The discrepancy of the library's result and the same computed by hand; `measure` says which error is allowed."""
    value, terms = measure(compute, like, settings.dtype)
    count = rounding_sides(settings.dtype) * roundings_per_disturbance(settings.architecture)
    return compare(got, value, terms, count, settings.dtype)


def roundings_per_disturbance(architecture: Architecture) -> int:
    """The largest number of the library's roundings that one disturbance stands for.

    - A layer with n inputs: each product takes part in n roundings, and the bias in one more.
    - Back-propagation: each product takes part in as many roundings as a batch has examples, or a layer has units.
    - A task's mean of m targets: two roundings in each deviation, m − 1 in the sum and one in the division.
    - tanh: four roundings, two units in the last place; its input and its result are disturbed once each.
    - POP's bias: ratio, product and sum; or two differences, their sum, a quotient and a sum. The root of a scale is
      disturbed along with it. At most five roundings, as in the update of a variance (`closed_form.track_update`)
      without those that its deviations carry.

    So the number is the largest count of numbers that are added up, at least 4, plus one. The roundings behind one
    disturbance may all act in the same direction; those behind different disturbances are as random as these.
    """
    shared = architecture.tasks == 1 and not architecture.indexed
    targets = max(architecture.batch, 1) * (architecture.outputs if shared else 1)
    return max(architecture.inputs, architecture.hidden, targets + 1, 4) + 1


def amplify(noise: Noise, count: int, architecture: Architecture) -> Noise:
    """The noise for a place with ``count`` roundings: larger in proportion beyond `roundings_per_disturbance`."""
    times = max(1.0, count / roundings_per_disturbance(architecture))
    return lambda tensor: tensor + times * (noise(tensor) - tensor)


@functools.cache
def _pool(device: torch.device) -> Tensor:
    """Numbers in (−1, 1), the same in every process, ``[runs, pool]``; the first run has level 0."""
    return random.uniform(random.key(0).to(device), (PROBES + 1, _POOL), None, -1.0, 1.0).double()
