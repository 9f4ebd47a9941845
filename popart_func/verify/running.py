"""Running statistics in closed form, and what rounding may make of them.

A running mean is a weighted mean: the targets of an update with step s that has had later ones weigh ``s Π (1 − s')``
together, the product over the later steps; the start has what is left. The closed form takes all targets at once, in
float64, relative to the first mean (so that an offset costs it nothing).

What rounding may do has a bound that is computed beside the numbers, operation by operation (*running error analysis*;
Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 3.3): every update passes the errors so far on
as the mathematics does, weighted down with the numbers they came with, and adds those of its own operations, each at
most half an eps of its result. The counts stand in `follow`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func.pop_art import PopArtState
from popart_func.verify.discrepancy import Discrepancy, compare, unit_roundoff, worst

__all__ = ["CORRECTED", "Batches", "Bounds", "Path", "begin", "belongs_to", "compare_statistics", "follow"]

CORRECTED = 6
"""Roundings of a bias-corrected step: 2 for log1p and for expm1 each (an error of one unit in the last place), and a
product and a quotient. Each enters with a factor of at most one: ``x ↦ 1 − exp(−x)`` damps relative errors."""

Bounds = dict[str, Any]
"""``scale_lb`` and ``scale_ub``, 0-d tensors, as `pop_art` takes them."""


class Batches(NamedTuple):
    """Updates, one after the other, in float64.

    Attributes:
        targets: ``[updates, samples, tasks]``, or ``[updates, samples, 1]`` where each has one task.
        belongs: which of them are a task's own, zeros and ones, ``[updates, samples, tasks]``.
        steps: the step that each task takes, ``[updates, tasks]``; 0 where it has no target.
        step_roundings: how many a step has behind it, of the same shape.
    """

    targets: Tensor
    belongs: Tensor
    steps: Tensor
    step_roundings: Tensor

    @classmethod
    def of(
        cls,
        targets: Tensor,
        belongs: Tensor,
        step_size: Tensor,
        dtype: torch.dtype,
        *,
        summed: bool = False,
        bias_correction: bool = False,
    ) -> Batches:
        """The steps from the rules: β, under ``"sum"`` nβ for n targets, and what bias correction makes of it."""
        count = belongs.sum(1)
        times = (count > 0).double().cumsum(0)
        steps = step_size.double() * (count if summed else torch.ones_like(count))
        roundings = torch.full_like(steps, float(summed))
        if bias_correction:
            steps, own = _corrected(steps, times, dtype)
            roundings = torch.where(times > 1, roundings + own, 0)  # a first step is 1, to the bit
        return cls(targets, belongs, torch.where(count > 0, steps, 0), roundings)


def _corrected(step: Tensor, times: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``β / (1 − (1−β)ᵗ)`` as one over the first t terms of a geometric series; its roundings, and the series'.

    Args:
        step: β, ``[updates, tasks]``.
        times: t, of the same shape.
        dtype: the one in which the library computes it.
    """
    ages = torch.arange(len(times), dtype=torch.float64, device=step.device)[:, None, None]
    series = torch.where(ages < times, (1 - step) ** ages, 0).sum(0)
    return 1 / series.clamp(min=1), CORRECTED + (times + 2) * _here(dtype)


def belongs_to(indices: Tensor, tasks: int) -> Tensor:
    """``[..., tasks]`` from indices ``[...]``: ones where they say so."""
    return (indices[..., None] == torch.arange(tasks, device=indices.device)).double()


class Path(NamedTuple):
    """Where exact arithmetic takes the statistics, ``[tasks]`` in float64, and how far rounding may stray from it.

    Attributes:
        origin: what the mean is relative to.
        mean: μ − origin.
        variance: σ², without bounds.
        mean_error: in units of one rounding, `unit_roundoff`.
        variance_error: in the same.
    """

    origin: Tensor
    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor


def begin(state: PopArtState) -> Path:
    """Statistics as they are, with nothing behind them; their mean is the origin."""
    zero = torch.zeros_like(state.shift, dtype=torch.float64)
    return Path(state.shift.double() + state.residue.double(), zero, state.variance.double(), zero, zero)


def follow(
    path: Path, targets: Tensor, belongs: Tensor, step: Tensor, step_roundings: Tensor, dtype: torch.dtype
) -> Path:
    """One update, and what its roundings may add.

    ``e = (y − μ) − r`` rounds twice, their mean and their variance n − 1 times and in a division, ``s e + r`` twice
    (two-sum not at all), ``(1 − s) e²`` three times, the sum with the batch's variance once, and ``v + s (square − v)``
    twice in its smaller part and once in its result. The mean's error also enters e.

    Args:
        path: before.
        targets: relative to the origin, ``[samples, tasks or 1]``.
        belongs: which of them are a task's own, ``[samples, tasks]``.
        step: s, ``[tasks]``.
        step_roundings: of s, ``[tasks]``.
        dtype: the one that rounds.
    """
    u = unit_roundoff(dtype)
    count = belongs.sum(0)
    several = (count > 1).double()
    share = belongs / count.clamp(min=1)
    deviations = belongs * (targets - path.mean)
    mean = (share * deviations).sum(0)
    spread = (share * (deviations - mean).square()).sum(0)
    residue = u * (path.origin + path.mean).abs()  # at most half a unit of the shift's last place
    keep = 1 - step

    of_each = belongs * (2 * deviations.abs() + residue)
    of_mean = (share * of_each).sum(0) + several * count * (share * deviations.abs()).sum(0)
    apart = belongs * (deviations - mean).abs()
    # What all deviations have in common, their variance sees as a square.
    of_spread = (share * (2 * apart * (of_each + apart) + apart.square())).sum(0) + several * (
        count * spread + u * of_mean.square()
    )
    of_mean_square = 2 * mean.abs() * (of_mean + path.mean_error) + u * (of_mean + path.mean_error).square()
    square = spread + keep * mean.square()
    of_square = (
        of_spread
        + keep * (of_mean_square + 3 * mean.square())
        + step * step_roundings * mean.square()
        + several * square
    )
    variance = path.variance + step * (square - path.variance)
    moved = (square - path.variance).abs()
    new = Path(
        path.origin,
        path.mean + step * mean,
        variance,
        keep * path.mean_error + step * (of_mean + (2 + step_roundings) * mean.abs()) + residue,
        keep * path.variance_error
        + step * of_square
        + (2 * torch.minimum(step, keep) + step * step_roundings) * moved
        + variance,
    )
    return Path(*(torch.where(count > 0, after, before) for after, before in zip(new, path, strict=True)))


def compare_statistics(
    got: PopArtState, first: PopArtState, batches: Batches, bounds: Bounds, dtype: torch.dtype
) -> Discrepancy:
    """Statistics after some updates against the closed form: mean, variance and the scale, clamped by its bounds."""
    path = begin(first)
    targets = (batches.targets.double() - first.shift.double()) - first.residue.double()
    for part, belongs, step, roundings in zip(
        targets.unbind(), batches.belongs.unbind(), batches.steps.unbind(), batches.step_roundings.unbind(), strict=True
    ):
        path = follow(path, part, belongs, step, roundings, dtype)
    mean, variance, mean_error, variance_error = _closed_form(targets, first, batches, dtype)
    mean_error, variance_error = path.mean_error + mean_error, path.variance_error + variance_error

    lower, upper = bounds["scale_lb"].double(), bounds["scale_ub"].double()
    never = batches.belongs.sum((0, 1)) == 0  # nothing of such a task moves, not even into the bounds
    scale = torch.where(never, first.scale.double(), variance.sqrt().clamp(lower, upper))
    # √v errs by at most the error of v over √v, and by its own rounding; clamping brings numbers only nearer together.
    scale_error = variance_error / variance.sqrt().clamp(min=lower) + scale
    found = (got.shift.double() - first.shift.double()) + (got.residue.double() - first.residue.double())
    return worst(
        compare(found, mean, mean_error, 1, dtype),
        compare(got.variance, variance, variance_error, 1, dtype),
        compare(got.scale, scale, scale_error, 1, dtype),
    )


def _closed_form(
    targets: Tensor, first: PopArtState, batches: Batches, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of the weighted targets and the start, and the errors of this very computation.

    Roundings of a term, of U updates of n targets: two for each later step in its weight, three more there; of the
    deviation one (and of its square three), of the product one, of the sum Un.
    """
    later = (1 - batches.steps).flip(0).cumprod(0).flip(0)
    after = torch.cat([later[1:], torch.ones_like(later[:1])])
    count = batches.belongs.sum(1, keepdim=True)
    weights = (batches.belongs * (batches.steps * after)[:, None] / count.clamp(min=1)).flatten(0, 1)
    rest = later[0]
    targets = targets.expand(batches.belongs.shape).flatten(0, 1)
    mean = (weights * targets).sum(0)
    apart = targets - mean
    variance = (weights * apart.square()).sum(0) + rest * (first.variance.double() + mean.square())
    roundings = 2 * batches.steps.shape[0] + targets.shape[0] + 7
    mean_error = roundings * (weights * targets.abs()).sum(0) + 2 * mean.abs()
    variance_error = roundings * variance + 2 * (weights * apart.abs() * targets.abs()).sum(0)
    return mean, variance, mean_error * _here(dtype), variance_error * _here(dtype)


def _here(dtype: torch.dtype) -> float:
    """A rounding of float64, in which all of this is computed, in units of the dtype's."""
    return unit_roundoff(torch.float64) / unit_roundoff(dtype)
