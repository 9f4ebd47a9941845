"""One step of ART: the statistics after a batch, from the statistics before and the moments of the batch.

The formula is written once, `moved`, over two kinds of numbers: tensors ``[tasks]``, and Python's floats, one task at a
time. A single network on a CPU has a few numbers, and there one operation on a tensor takes longer than the whole
formula in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._checks import Reduction
from popart_func._typing import Num, Scalar
from popart_func.moments import Moments, TaskMoments, two_sum

__all__ = ["FLOATS", "MOST_UPDATES", "TENSORS", "ArtOptions", "Gather", "Numbers", "bias_corrected", "moved"]

MOST_UPDATES = torch.iinfo(torch.int32).max
"""Where a count of updates stops."""

Gather = Callable[[Tensor], Tensor]
"""From one process's tensor ``[...]`` to that of every process, ``[processes, ...]``: see `distributed`."""


class ArtOptions(NamedTuple):
    """The options of `art`, and the function that the user called with them, which errors name."""

    caller: str
    step_size: Scalar
    scale_lb: Scalar = 1e-4
    scale_ub: Scalar = 1e6
    reduction: Reduction = "mean"
    bias_correction: bool = False
    gather: Gather | None = None


class Numbers(NamedTuple):
    """What the formula needs of a kind of numbers beside ``+``, ``-``, ``*``, ``/`` and comparisons. NaN stays NaN."""

    number: Callable[[Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    at_least: Callable[[Any, Any], Any]
    at_most: Callable[[Any, Any], Any]
    lerp: Callable[[Any, Any, Any], Any]
    sqrt: Callable[[Any], Any]
    expm1: Callable[[Any], Any]
    log1p: Callable[[Any], Any]


TENSORS = Numbers(
    number=lambda value, like: torch.as_tensor(value, dtype=like.dtype, device=like.device),
    where=torch.where,
    at_least=lambda value, bound: value.clamp(min=bound),
    at_most=lambda value, bound: value.clamp(max=bound),
    lerp=torch.lerp,
    sqrt=torch.sqrt,
    expm1=torch.expm1,
    log1p=torch.log1p,
)

FLOATS = Numbers(
    number=lambda value, like: float(value),
    where=lambda condition, one, other: one if condition else other,
    at_least=lambda value, bound: bound if value < bound else value,
    at_most=lambda value, bound: bound if value > bound else value,
    # As PyTorch computes it.
    lerp=lambda start, end, part: start + part * (end - start) if abs(part) < 0.5 else end - (end - start) * (1 - part),
    sqrt=math.sqrt,
    expm1=math.expm1,
    log1p=lambda value: math.log1p(value) if value > -1 else -math.inf if value == -1 else math.nan,
)


def moved(
    of: Numbers, options: ArtOptions, before: Any, batch: Moments | TaskMoments, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The statistics after a batch; a ``"sequential"`` batch is one target.

    Args:
        of: the kind of numbers.
        options: those of `art`, whose numbers are of that kind.
        before: shift, scale, variance, count and residue.
        batch: the moments of the targets of each task.
        dtype: that of the statistics, whose range they keep to.
    """
    step, scale_lb, scale_ub = options[1:4]
    shift, scale, variance, count, residue = before
    count = count + (count < MOST_UPDATES)
    if options.reduction == "sum":
        step = step * batch.samples
    if options.bias_correction:
        step = corrected(of, of.number(step, batch.mean), of.number(count, batch.mean))

    # e = (mean − μ) in two parts, since a step of 1 puts the mean itself in the place of μ.
    high, rest = two_sum(batch.mean, -shift)
    low = rest + (batch.residue - residue)
    total, rest = two_sum(shift, step * high)
    shift, residue = two_sum(total, rest + (step * low + residue))

    # An infinite variance stays infinite for ever. The largest number in its place is forgotten in time.
    limits = torch.finfo(dtype)
    distance = abs(high + low)
    square = of.at_most(batch.spread + (1 - step) * of.at_most(distance * distance, limits.max), limits.max)
    # v + β (square − v), or square − (1−β) (square − v) where β > ½: so the smaller part is rounded.
    variance = of.lerp(variance, square, step)
    deviation = of.sqrt(of.at_least(variance, 0))
    if options.bias_correction:
        # Targets that are all equal have no deviation: a scale of scale_lb would throw every other prediction away.
        one_value = of.where(distance > 0, distance, scale)
        deviation = of.where(variance > 0, deviation, one_value)
    scale = of.at_least(of.at_most(of.at_least(deviation, scale_lb), scale_ub), limits.tiny)
    return shift, scale, variance, count, residue


def corrected(of: Numbers, step: Any, count: Any) -> Any:
    """``β / (1 − (1−β)^t)`` without cancellation; exactly 1 at t = 1."""
    total = -of.expm1(count * of.log1p(-step))
    return of.where(count == 1, 1, step / total)


def bias_corrected(step: int | float | Num[Tensor, "*tasks"], count: Tensor, dtype: torch.dtype) -> Tensor:
    """`corrected` for tensors."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=dtype, device=count.device)
    result: Tensor = corrected(TENSORS, step, count.to(dtype))
    return result
