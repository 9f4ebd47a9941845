"""How many targets each task has in a batch, and their mean and variance: all that a batch says to the statistics.

Batches that are read apart, by several processes or one after the other, are joined by joining their moments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popart_func._typing import Float, Integer

__all__ = ["Moments", "join", "moments"]


class Moments(NamedTuple):
    """Of the deviations ``e = (y − μ) − r`` of a batch's targets from the mean so far; each ``[tasks]``, 0 where none.

    Attributes:
        samples: how many targets each task has, in the others' dtype.
        mean: their mean.
        spread: their variance about that mean, biased: divided by ``samples``.
    """

    samples: Float[Tensor, "*batches tasks"]
    mean: Float[Tensor, "*batches tasks"]
    spread: Float[Tensor, "*batches tasks"]


def moments(
    shift: Float[Tensor, " tasks"],
    residue: Float[Tensor, " tasks"],
    targets: Float[Tensor, "..."],
    indices: Integer[Tensor, " samples"] | None,
) -> Moments:
    """The moments of one batch, ``[samples, tasks]``, or with indices ``[samples]``.

    >>> moments(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([[2.0], [6.0]]), None)
    Moments(samples=tensor([2.]), mean=tensor([3.]), spread=tensor([4.]))
    """
    if indices is None:
        deviations = (targets - shift) - residue
        belongs = torch.ones_like(targets, dtype=torch.bool)
    else:
        deviations = (targets - shift.index_select(0, indices)) - residue.index_select(0, indices)
        deviations = deviations[:, None]
        belongs = indices[:, None] == torch.arange(shift.shape[0], device=indices.device)
    samples = belongs.sum(0).to(targets.dtype)
    at_least_one = samples.clamp(min=1)
    mean = torch.where(belongs, deviations, 0).sum(0) / at_least_one
    spread = torch.where(belongs, deviations - mean, 0).square().sum(0) / at_least_one
    return Moments(samples, mean, spread)


def join(batches: Moments) -> Moments:
    """The moments of several batches' targets together, from theirs, ``[batches, tasks]``.

    The variance of the whole is the mean of the batches' variances and the variance of their means, weighted by their
    samples (Chan, Golub and LeVeque, 1983). Equal to the moments of the joined batch up to rounding.

    >>> join(Moments(*torch.tensor([[[2.0], [1.0]], [[3.0], [6.0]], [[4.0], [0.0]]])))
    Moments(samples=tensor([3.]), mean=tensor([4.]), spread=tensor([4.6667]))
    """
    samples = batches.samples.sum(0)
    weights = batches.samples / samples.clamp(min=1)
    some = batches.samples > 0
    mean = (weights * batches.mean).sum(0)
    # Where a batch has none of a task, even an infinite distance of its mean must count as nothing.
    squares = torch.where(some, batches.spread + (batches.mean - mean).square(), 0)
    return Moments(samples, mean, (weights * squares).sum(0))
