"""The moments of a batch of targets: for each task their number, mean and variance.

The statistics need nothing else of a batch. `join` gives the moments of several batches together, as when several
processes have one each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popart_func._typing import Float, Integer

__all__ = ["Moments", "join", "moments"]


class Moments(NamedTuple):
    """Moments of the deviations ``e = (y − μ) − r`` of a batch's targets from the mean so far, each ``[tasks]``.

    Attributes:
        samples: the number of targets of each task, in the dtype of the others.
        mean: their mean; 0 without targets.
        spread: their variance about that mean, divided by ``samples`` (biased); 0 without targets.
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
    """The moments of one batch.

    Args:
        shift: the rounded mean so far, ``[tasks]``.
        residue: what rounding took from it, ``[tasks]``.
        targets: ``[samples, tasks]``, or with indices ``[samples]``.
        indices: the task of each target, ``[samples]``.

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
    """The moments of several batches together, from those of each, ``[batches, tasks]``.

    The variance of all targets is the mean of the batches' variances plus the variance of their means, both weighted
    by their numbers of samples (Chan, Golub and LeVeque, 1983). The result is that of one large batch up to rounding.

    >>> join(Moments(*torch.tensor([[[2.0], [1.0]], [[3.0], [6.0]], [[4.0], [0.0]]])))
    Moments(samples=tensor([3.]), mean=tensor([4.]), spread=tensor([4.6667]))
    """
    samples = batches.samples.sum(0)
    weights = batches.samples / samples.clamp(min=1)
    some = batches.samples > 0
    mean = (weights * batches.mean).sum(0)
    # A batch without targets of a task must add nothing, even where its distance from the mean is infinite.
    squares = torch.where(some, batches.spread + (batches.mean - mean).square(), 0)
    return Moments(samples, mean, (weights * squares).sum(0))
