"""The moments of a batch of targets: for each task their number, mean and variance.

The statistics need nothing else of a batch. `join` gives the moments of several batches together, as when several
processes have one each.

Targets may have weights. A target of weight 0 is absent, whatever it holds, and a task whose targets all have weight 0
has none.

The mean is kept in two parts, ``mean + residue``: float32 holds 10000001 and 10000002, but not their mean. The variance
is that about the mean in both parts, so that it is right however far the targets are from 0 and from earlier ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from popart_func._typing import Float, Integer

__all__ = ["Moments", "TaskMoments", "by_task", "join", "moments", "moments_of_all", "two_sum"]


class Moments(NamedTuple):
    """The moments of a batch of targets, each ``[tasks]``; 0 for a task without targets.

    Attributes:
        samples: the number of targets of each task, or the sum of their weights, in the dtype of the others.
        mean: their mean, rounded; the mean itself is ``mean + residue``.
        residue: what rounding took from ``mean``.
        spread: their variance about the mean: the sum of weighted squares over ``samples`` (biased).
    """

    samples: Float[Tensor, "*batches tasks"]
    mean: Float[Tensor, "*batches tasks"]
    residue: Float[Tensor, "*batches tasks"]
    spread: Float[Tensor, "*batches tasks"]


class TaskMoments(NamedTuple):
    """`Moments` of one task, in floats."""

    samples: float
    mean: float
    residue: float
    spread: float


Number = TypeVar("Number", float, Tensor)


def moments(
    targets: Float[Tensor, "..."],
    indices: Integer[Tensor, " samples"] | None,
    tasks: int,
    weights: Float[Tensor, "..."] | None = None,
) -> Moments:
    """The moments of one batch.

    Args:
        targets: ``[samples, tasks]``, or with indices ``[samples]``.
        indices: the task of each target, ``[samples]``.
        tasks: how many tasks there are.
        weights: the weight of each target, of the targets' shape, >= 0; None for 1.

    >>> moments(torch.tensor([[10000001.0], [10000002.0]]), None, 1).residue
    tensor([-0.5000])
    >>> moments(torch.tensor([[1.0], [torch.nan], [4.0]]), None, 1, torch.tensor([[2.0], [0.0], [1.0]])).mean
    tensor([2.])
    """
    if indices is None:
        belongs = torch.ones_like(targets, dtype=torch.bool)
    else:
        targets = targets[:, None]
        # Looked up rather than compared, so that an index out of range is an error.
        belongs = torch.eye(tasks, dtype=torch.bool, device=indices.device).index_select(0, indices)
    if weights is None:
        samples = belongs.sum(0).to(targets.dtype)
        shares = belongs / samples.clamp(min=1)
    else:
        weights = torch.where(belongs, weights if indices is None else weights[:, None], 0)
        belongs = weights > 0
        samples = weights.sum(0)
        shares = weights / _divisor(samples)
    zeros = torch.zeros_like(targets)
    return Moments(samples, *_pooled(shares, belongs, targets, zeros, zeros))


def moments_of_all(targets: Float[Tensor, "samples tasks"]) -> list[TaskMoments]:
    """The moments of each task, in few operations, of targets that are all present."""
    number, reference = float(targets.shape[0]), targets.amax(0)
    spreads, distances = torch.var_mean(targets - reference, 0, correction=0)
    tasks = zip(reference.tolist(), distances.tolist(), spreads.tolist(), strict=True)
    return [TaskMoments(number, *two_sum(largest, distance), spread) for largest, distance, spread in tasks]


def by_task(batch: Moments) -> list[TaskMoments]:
    """The moments of each task, where values can be read."""
    return [TaskMoments(*row) for row in zip(*(field.tolist() for field in batch), strict=True)]


def join(batches: Moments) -> Moments:
    """The moments of several batches together, from those of each, ``[batches, tasks]``.

    The variance of all targets is the mean of the batches' variances plus the variance of their means, both weighted
    by their numbers of samples (Chan, Golub and LeVeque, 1983). The result is that of one large batch up to rounding.

    >>> join(Moments(*torch.tensor([[[2.0], [1.0]], [[3.0], [6.0]], [[0.0], [0.0]], [[4.0], [0.0]]]))).spread
    tensor([4.6667])
    """
    some = batches.samples > 0
    samples = batches.samples.sum(0)
    return Moments(samples, *_pooled(batches.samples / _divisor(samples), some, *batches[1:]))


def two_sum(a: Number, b: Number) -> tuple[Number, Number]:
    """The rounded sum and its exact rounding error (Knuth). Needs IEEE arithmetic: no re-association."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _divisor(samples: Tensor) -> Tensor:
    """The number of samples, or 1 where there are none; weights may add up to less than 1."""
    return torch.where(samples > 0, samples, 1)


def _pooled(
    shares: Tensor, some: Tensor, means: Tensor, residues: Tensor, spreads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, residue and spread of parts together, along the leading axis.

    ``shares`` are the parts' shares in all samples; ``some`` says which parts have samples at all.

    Means are taken relative to the largest of them. That makes the deviations of equal means exactly 0, and those of
    close ones exact, whatever their magnitude.
    """
    if not means.shape[0]:
        nothing = shares.sum(0)
        return nothing, nothing, nothing
    reference = torch.where(some, means, -math.inf).amax(0)
    reference = torch.where(some.any(0), reference, 0)
    deviations = torch.where(some, (means - reference) + residues, 0)
    correction = (shares * deviations).sum(0)
    # Without samples, even an infinite distance must add nothing: 0 · ∞ is NaN.
    squares = torch.where(some, spreads + (deviations - correction).square(), 0)
    return *two_sum(reference, correction), (shares * squares).sum(0)
