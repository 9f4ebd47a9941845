"""Running statistics in closed form, and a bound on what rounding does to them.

A running mean is a weighted mean. The targets of an update with step s together weigh ``s Π (1 − s')``, the product
over the later steps s'; the start weighs the rest. The closed form takes all targets at once, in float64, relative to
the first mean, so that a large offset costs no digits.

The rounding error has a bound that is computed along with the numbers, operation by operation (*running error
analysis*; Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 3.3). Every update passes on the
errors so far as the mathematics does: with the weight of the numbers that carry them. It adds the errors of its own
operations, each at most half an eps of its result. `track_update` lists them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func.pop_art import PopArtState
from popart_func.verify.discrepancy import Discrepancy, compare, unit_roundoff, worst

__all__ = [
    "CORRECTED_STEP_ROUNDINGS",
    "JOINED_ROUNDINGS",
    "Bounds",
    "TrackedStatistics",
    "Updates",
    "compare_statistics",
    "task_mask",
    "track",
    "track_update",
]

CORRECTED_STEP_ROUNDINGS = 6
"""Roundings of a bias-corrected step: 2 each for log1p and for expm1 (an error of one unit in the last place), one for
a product and one for a quotient. None is amplified: ``x ↦ 1 − exp(−x)`` damps relative errors."""

JOINED_ROUNDINGS = 6
"""Roundings where ranks' moments are joined, besides one a rank in a sum: two in a deviation, two in its square and in
the sum with a variance, one in a weight and one in a product. A rank's mean lies between its targets, so that its
deviation is no larger than theirs."""

Bounds = dict[str, Any]
"""``scale_lb`` and ``scale_ub``, 0-d tensors, as keyword arguments of `pop_art`'s functions."""


class Updates(NamedTuple):
    """The updates of the statistics, one after the other, in float64.

    Attributes:
        targets: ``[updates, samples, tasks]``, or ``[updates, samples, 1]`` if each sample has one target.
        mask: 1 where a target belongs to a task, else 0, ``[updates, samples, tasks]``.
        steps: the step of each task, ``[updates, tasks]``; 0 for a task without a target.
        step_roundings: the number of roundings in each step, ``[updates, tasks]``.
    """

    targets: Tensor
    mask: Tensor
    steps: Tensor
    step_roundings: Tensor

    @classmethod
    def from_rules(
        cls,
        targets: Tensor,
        mask: Tensor,
        step_size: Tensor,
        dtype: torch.dtype,
        *,
        summed: bool = False,
        bias_correction: bool = False,
    ) -> Updates:
        """The updates whose steps follow `pop_art.art`'s rules.

        The step is β, or nβ for n targets under reduction ``"sum"``; bias correction divides it by ``1 − (1 − step)ᵗ``.
        """
        count = mask.sum(1)
        times = (count > 0).double().cumsum(0)
        steps = step_size.double() * (count if summed else torch.ones_like(count))
        roundings = torch.full_like(steps, float(summed))
        if bias_correction:
            steps, own = _corrected(steps, times, dtype)
            roundings = torch.where(times > 1, roundings + own, 0)  # the first step is 1, to the bit
        return cls(targets, mask, torch.where(count > 0, steps, 0), roundings)


def _corrected(step: Tensor, times: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bias-corrected steps and their roundings, from β and each task's number t of updates, ``[updates, tasks]``.

    ``β / (1 − (1−β)ᵗ)`` is computed as one over the first t terms of a geometric series. The series, too, rounds.
    """
    ages = torch.arange(len(times), dtype=torch.float64, device=step.device)[:, None, None]
    series = torch.where(ages < times, (1 - step) ** ages, 0).sum(0)
    return 1 / series.clamp(min=1), CORRECTED_STEP_ROUNDINGS + (times + 2) * _float64_rounding(dtype)


def task_mask(indices: Tensor, tasks: int) -> Tensor:
    """One-hot tasks: 1 where a target belongs to a task, ``[..., tasks]`` from indices ``[...]``."""
    return (indices[..., None] == torch.arange(tasks, device=indices.device)).double()


class TrackedStatistics(NamedTuple):
    """Exact statistics after some updates, and how far rounding may take the library's from them; ``[tasks]``, float64.

    Attributes:
        origin: the mean is relative to it.
        mean: μ − origin.
        variance: σ², without bounds.
        mean_error: the largest error of the library's mean, in units of one rounding (`unit_roundoff`).
        variance_error: the largest error of the library's variance, in the same units.
    """

    origin: Tensor
    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor


def track(state: PopArtState) -> TrackedStatistics:
    """Starts to track the library's statistics: their mean is the origin, and there are no errors yet."""
    zero = torch.zeros_like(state.shift, dtype=torch.float64)
    return TrackedStatistics(state.shift.double() + state.residue.double(), zero, state.variance.double(), zero, zero)


def track_update(
    before: TrackedStatistics,
    targets: Tensor,
    mask: Tensor,
    step: Tensor,
    step_roundings: Tensor,
    dtype: torch.dtype,
    ranks: int = 0,
) -> TrackedStatistics:
    """One update of the statistics, with a bound on the errors of its roundings.

    The roundings of the library's update, where e is the distance of the batch's mean from μ + r:

    - The deviations of n targets from the largest of them: one each.
    - The mean of these deviations and the variance of the batch: n − 1 in the sum, one in the product with a weight and
      one in the weight, each.
    - e: one, beyond those of the residues, which are half a unit of μ's last place at most.
    - ``s e``: one, and none in the two-sums that add it to μ.
    - ``square``, which is ``(1 − s) e²`` (three) plus the batch's variance (one).
    - ``v + s (square − v)``: two in the smaller part and one in the result.
    - Where ranks have a part of the batch each: the deviations of their means, two, and likewise a mean of these and
      their variance with the square of a deviation; see `JOINED_ROUNDINGS`.

    The error of the mean before also enters e.

    Args:
        before: the statistics before the update.
        targets: relative to the origin, ``[samples, tasks or 1]``.
        mask: 1 where a target belongs to a task, ``[samples, tasks]``.
        step: s, ``[tasks]``.
        step_roundings: the number of roundings in s, ``[tasks]``.
        dtype: the dtype that rounds.
        ranks: among how many ranks the batch is divided; 0 for one process.
    """
    u = unit_roundoff(dtype)
    count = mask.sum(0)
    several = (count > 1).double()
    summed = count + 1 + (ranks + JOINED_ROUNDINGS if ranks else 0)
    share = mask / count.clamp(min=1)
    deviations = mask * (targets - before.mean)
    mean = (share * deviations).sum(0)
    spread = (share * (deviations - mean).square()).sum(0)
    residue = u * (before.origin + before.mean).abs()  # at most half a unit of the shift's last place
    keep = 1 - step

    largest = torch.where(mask > 0, deviations, -torch.inf).amax(0)
    of_each = torch.where(mask > 0, largest - deviations, 0)
    of_batch = (share * of_each).sum(0) * (1 + several * summed)
    apart = mask * (deviations - mean).abs()
    # An error that all deviations share enters their variance as its square.
    of_spread = (share * (2 * apart * (of_each + apart) + apart.square())).sum(0) + several * (
        summed * spread + u * of_batch.square()
    )
    of_mean = of_batch + mean.abs() + 2 * residue + before.mean_error
    of_mean_square = 2 * mean.abs() * of_mean + u * of_mean.square()
    square = spread + keep * mean.square()
    of_square = (
        of_spread
        + keep * (of_mean_square + 3 * mean.square())
        + step * step_roundings * mean.square()
        + several * square
    )
    variance = before.variance + step * (square - before.variance)
    moved = (square - before.variance).abs()
    after = TrackedStatistics(
        before.origin,
        before.mean + step * mean,
        variance,
        keep * before.mean_error + step * (of_batch + (1 + step_roundings) * mean.abs()) + 3 * residue,
        keep * before.variance_error
        + step * of_square
        + (2 * torch.minimum(step, keep) + step * step_roundings) * moved
        + variance,
    )
    return TrackedStatistics(*(torch.where(count > 0, new, old) for new, old in zip(after, before, strict=True)))


def compare_statistics(
    got: PopArtState, first: PopArtState, updates: Updates, bounds: Bounds, dtype: torch.dtype, ranks: int = 0
) -> Discrepancy:
    """The discrepancy of the library's statistics after updates and the closed form: mean, variance, clamped scale.

    Each batch is divided among ``ranks``, or is that of one process (0).
    """
    tracked = track(first)
    targets = (updates.targets.double() - first.shift.double()) - first.residue.double()
    for batch, mask, step, roundings in zip(
        targets.unbind(), updates.mask.unbind(), updates.steps.unbind(), updates.step_roundings.unbind(), strict=True
    ):
        tracked = track_update(tracked, batch, mask, step, roundings, dtype, ranks)
    mean, variance, mean_error, variance_error = _closed_form(targets, first, updates, dtype)
    mean_error, variance_error = tracked.mean_error + mean_error, tracked.variance_error + variance_error

    lower, upper = bounds["scale_lb"].double(), bounds["scale_ub"].double()
    never = updates.mask.sum((0, 1)) == 0  # a task without targets keeps its scale, even outside of the bounds
    # A first step of 1 with one target leaves no variance: the scale is its distance from the mean before.
    alone = (variance == 0) & ~never
    deviation = torch.where(alone, mean.abs(), variance.sqrt())
    scale = torch.where(never, first.scale.double(), deviation.clamp(lower, upper))
    # √v errs by at most the error of v over √v, and by its own rounding. Clamping only brings numbers closer together.
    scale_error = torch.where(alone, mean_error, variance_error / variance.sqrt().clamp(min=lower)) + scale
    found = (got.shift.double() - first.shift.double()) + (got.residue.double() - first.residue.double())
    return worst(
        compare(found, mean, mean_error, 1, dtype),
        compare(got.variance, variance, variance_error, 1, dtype),
        compare(got.scale, scale, scale_error, 1, dtype),
    )


def _closed_form(
    targets: Tensor, first: PopArtState, updates: Updates, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of the weighted targets and the start, and the rounding errors of this computation.

    For U updates of n targets the roundings of a term are: two for each later step in its weight and three more in
    the weight; one in the deviation (three in its square), one in the product, Un in the sum.
    """
    later = (1 - updates.steps).flip(0).cumprod(0).flip(0)
    after = torch.cat([later[1:], torch.ones_like(later[:1])])
    count = updates.mask.sum(1, keepdim=True)
    weights = (updates.mask * (updates.steps * after)[:, None] / count.clamp(min=1)).flatten(0, 1)
    rest = later[0]
    targets = targets.expand(updates.mask.shape).flatten(0, 1)
    mean = (weights * targets).sum(0)
    apart = targets - mean
    variance = (weights * apart.square()).sum(0) + rest * (first.variance.double() + mean.square())
    roundings = 2 * updates.steps.shape[0] + targets.shape[0] + 7
    mean_error = roundings * (weights * targets.abs()).sum(0) + 2 * mean.abs()
    variance_error = roundings * variance + 2 * (weights * apart.abs() * targets.abs()).sum(0)
    return mean, variance, mean_error * _float64_rounding(dtype), variance_error * _float64_rounding(dtype)


def _float64_rounding(dtype: torch.dtype) -> float:
    """One rounding of float64, in which this module computes, in units of the dtype's rounding."""
    return unit_roundoff(torch.float64) / unit_roundoff(dtype)
