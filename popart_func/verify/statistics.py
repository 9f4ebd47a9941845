"""The running statistics against their closed form, and Proposition 2, for targets of any magnitude and offset.

A running mean is a weighted mean: target j of a task that has had n since weighs ``β (1−β)ⁿ``, the start what is left.
The closed form takes all targets at once, in float64, relative to the first statistics' shift (so that an offset costs
it nothing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popart_func import pop_art
from popart_func.pop_art import PopArtState, Reduction
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, exceed, unit_roundoff, worst

__all__ = ["CHECKS"]

STEPS = 10
BATCH = 6
LONG = 64

PER_STEP = 8
"""Roundings that one update adds: three of the deviation, the step and its product, three of the variance.

Earlier ones are weighted down as the targets they came with are, so that a step's share of the terms carries its own.
"""


class _Stream(NamedTuple):
    start: PopArtState
    targets: Tensor
    indices: Tensor
    step_size: Tensor


def _draw(key: Tensor, settings: Settings, steps: int) -> _Stream:
    """Targets of several tasks: a magnitude and an offset each, heavy tails, both signs; some tasks may have none."""
    dtype, tasks = settings.dtype, settings.architecture.tasks
    shapes = dict.fromkeys(("scale", "offset", "start", "wide"), (tasks,))
    numbers = draw.uniforms(key, dtype, targets=(steps,), task=(steps,), step=(), far=(tasks,), **shapes)
    scale = draw.magnitude(numbers["scale"])
    centre = scale * draw.heavy_tailed(numbers["offset"]) * draw.log_between(1, 1e4, numbers["far"])
    indices = (numbers["task"] * tasks).long().clamp(max=tasks - 1)
    targets = centre[indices] + scale[indices] * draw.heavy_tailed(numbers["targets"])
    shift = centre + scale * draw.normal(numbers["start"])
    start = draw.statistics(shift, scale * draw.log_between(0.1, 10, numbers["wide"]), torch.zeros_like(shift))
    return _Stream(start, targets, indices, draw.log_between(1e-4, 0.7, numbers["step"]))


class _Moments(NamedTuple):
    """Of each task, ``[tasks]``, in float64: the mean relative to the start's shift, the variance, the mean's terms."""

    mean: Tensor
    variance: Tensor
    terms: Tensor


def _closed_form(start: PopArtState, targets: Tensor, weights: Tensor, rest: Tensor) -> _Moments:
    """Mean and variance of weighted targets and of the start; the weights add up to one.

    Args:
        start: the first statistics.
        targets: ``[samples]``, or one for each task, ``[samples, tasks]``.
        weights: ``[samples, tasks]``.
        rest: the start's weight, ``[tasks]``.
    """
    targets = targets if targets.ndim == 2 else targets[:, None]
    deviations = targets.double() - start.shift.double()
    mean = (weights * deviations).sum(0)
    variance = (weights * (deviations - mean).square()).sum(0) + rest * (start.variance.double() + mean.square())
    return _Moments(mean, variance, (weights * deviations.abs()).sum(0) + mean.abs())


def _weights(indices: Tensor, tasks: int, step_size: Tensor) -> tuple[Tensor, Tensor]:
    """``β (1−β)ⁿ`` of each target in its task, n the number of that task's later ones; ``(1−β)ᴺ`` of the start."""
    belongs = _belongs(indices, tasks)
    later = belongs.sum(0) - belongs.cumsum(0)
    step = step_size.double()
    return belongs * step * (1 - step) ** later, (1 - step) ** belongs.sum(0)


def _belongs(indices: Tensor, tasks: int) -> Tensor:
    return (indices[:, None] == torch.arange(tasks, device=indices.device)).double()


def _compare(
    state: PopArtState, start: PopArtState, expected: _Moments, roundings: int, dtype: torch.dtype
) -> Discrepancy:
    """Mean, variance and scale; an error of the mean moves the variance by twice σ times as much."""
    u = unit_roundoff(dtype)
    # Subtracting the shifts first is exact, or as good as relative to the result.
    mean = (state.shift.double() - start.shift.double()) + state.residue.double()
    # The residue is itself rounded: a rounding of a rounding of the shift.
    mean_terms = expected.terms + u * state.shift.double().abs()
    variance, scale = expected.variance, expected.variance.sqrt().clamp(draw.SCALE_LB, draw.SCALE_UB)
    variance_terms = variance + variance.sqrt() * mean_terms + u * mean_terms.square()
    return worst(
        compare(mean, expected.mean, mean_terms, roundings, dtype),
        compare(state.variance, variance, variance_terms, roundings, dtype),
        compare(state.scale, scale, scale + variance_terms / scale, roundings, dtype),
    )


def weighted_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """One target at a time, of any task: constant step sizes, and bias-corrected ones, whose weights add up to one."""
    stream, tasks = _draw(key, settings, STEPS), settings.architecture.tasks
    plain = corrected = stream.start
    for target, index in zip(stream.targets.unbind(), stream.indices.unbind(), strict=True):
        plain = pop_art.art(plain, target, index, step_size=stream.step_size, **draw.BOUNDS)
        corrected = pop_art.art(
            corrected, target, index, step_size=stream.step_size, bias_correction=True, **draw.BOUNDS
        )
    weights, rest = _weights(stream.indices, tasks, stream.step_size)
    total = weights.sum(0)
    present = total > 0
    of_one = weights / torch.where(present, total, 1)
    expected = _closed_form(stream.start, stream.targets, weights, rest)
    without_start = _closed_form(stream.start, stream.targets, of_one, (~present).double())
    count, dtype = PER_STEP * STEPS, settings.dtype
    return worst(
        _compare(plain, stream.start, expected, count, dtype),
        _compare(corrected, stream.start, without_start, count, dtype),
    )


def batches(key: Tensor, settings: Settings) -> Discrepancy:
    """A task's n targets in one batch weigh β/n each (``"mean"``), or β each (``"sum"``); absent tasks stay."""
    stream, tasks = _draw(key, settings, BATCH), settings.architecture.tasks
    belongs = _belongs(stream.indices, tasks)
    parts = []
    reductions: tuple[tuple[Reduction, Tensor, Tensor], ...] = (
        ("mean", stream.step_size, belongs / belongs.sum(0).clamp(min=1)),
        ("sum", stream.step_size / BATCH, belongs),  # smaller, since more than one in all would diverge
    )
    for reduction, step_size, share in reductions:
        got = pop_art.art(
            stream.start, stream.targets, stream.indices, step_size=step_size, reduction=reduction, **draw.BOUNDS
        )
        weights = share * step_size.double()
        expected = _closed_form(stream.start, stream.targets, weights, 1 - weights.sum(0))
        parts.append(_compare(got, stream.start, expected, PER_STEP + BATCH, settings.dtype))
    return worst(*parts)


def sequential_batch(key: Tensor, settings: Settings) -> Discrepancy:
    """A batch under ``"sequential"`` is its targets one by one, in order."""
    stream, tasks = _draw(key, settings, BATCH), settings.architecture.tasks
    got = pop_art.art(
        stream.start, stream.targets, stream.indices, step_size=stream.step_size, reduction="sequential", **draw.BOUNDS
    )
    weights = _weights(stream.indices, tasks, stream.step_size)
    expected = _closed_form(stream.start, stream.targets, *weights)
    return _compare(got, stream.start, expected, PER_STEP * BATCH, settings.dtype)


def sample_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """With ``β_t = 1/t`` the statistics are the mean and the (biased) variance of the targets, in two passes."""
    stream, tasks = _draw(key, settings, STEPS), settings.architecture.tasks
    # Every task has all the targets, of the first target's magnitude, each with its own sign and factor.
    factors = torch.arange(1, tasks + 1, device=key.device) * (-1) ** torch.arange(tasks, device=key.device)
    targets = stream.targets[:, None] * factors.to(settings.dtype)
    state = stream.start
    for time, target in enumerate(targets.unbind(), start=1):
        state = pop_art.art(state, target, step_size=1 / time, **draw.BOUNDS)
    weights = torch.full_like(targets, 1 / STEPS, dtype=torch.float64)
    expected = _closed_form(stream.start, targets, weights, torch.zeros_like(weights[0]))
    return _compare(state, stream.start, expected, PER_STEP * STEPS, settings.dtype)


def bound_holds(key: Tensor, settings: Settings) -> Discrepancy:
    """``|y − μ'|/σ' <= √((1−w)/w)`` for a target of weight w: β_t alone, ``β/n`` among n in a batch (``"mean"``).

    What it may be exceeded by: roundings of ``|e|/σ'``, which is at most ``1/√(w (1−w))``. Of weight 1, a task's first
    target when the step size is bias-corrected, the normalized target is 0, to the bit.
    """
    stream, tasks = _draw(key, settings, STEPS), settings.architecture.tasks
    step = stream.step_size.double()
    plain, corrected = stream.start, pop_art.init_state(tasks, dtype=settings.dtype, device=key.device)
    times = torch.arange(STEPS, dtype=torch.float64, device=key.device)
    seen = torch.zeros(tasks, dtype=torch.float64, device=key.device)
    parts = []
    for target, index in zip(stream.targets.unbind(), stream.indices.unbind(), strict=True):
        plain = pop_art.art(plain, target, index, step_size=stream.step_size, **draw.BOUNDS)
        parts.append(_exceed(plain, target, index, step, settings))
        corrected = pop_art.art(
            corrected, target, index, step_size=stream.step_size, bias_correction=True, **draw.BOUNDS
        )
        seen = seen + _belongs(index[None], tasks)[0]
        count = seen.index_select(0, index[None]).squeeze(0)
        # β / (1 − (1−β)ᵗ) is one over the first t terms of the geometric series.
        weight = 1 / torch.where(times < count, (1 - step) ** times, 0).sum()
        parts.append(_exceed(corrected, target, index, weight, settings))
    batch = pop_art.art(stream.start, stream.targets, stream.indices, step_size=stream.step_size, **draw.BOUNDS)
    count = _belongs(stream.indices, tasks).sum(0).index_select(0, stream.indices)
    parts.append(_exceed(batch, stream.targets, stream.indices, step / count, settings))
    return worst(*parts)


def _exceed(state: PopArtState, targets: Tensor, indices: Tensor, weight: Tensor, settings: Settings) -> Discrepancy:
    normalized = pop_art.normalize(state, targets, indices).abs()
    bound = ((1 - weight) / weight).sqrt()
    terms = torch.where(weight == 1, 0, bound + 1 / (weight * (1 - weight)).sqrt())
    return exceed(normalized, bound, terms, PER_STEP + STEPS, settings.dtype)


def bound_is_reached(key: Tensor, settings: Settings) -> Discrepancy:
    """After targets that did not vary, one that does lies on Proposition 2's bound; so does one in a batch."""
    stream = _draw(key, settings, BATCH)
    step = stream.step_size.double()
    zero = torch.zeros_like(stream.start.scale)
    still = stream.start._replace(variance=zero, scale=zero + draw.SCALE_LB)
    task = stream.indices[0]
    mean = still.shift.index_select(0, task[None]).squeeze(0)
    parts = []
    for count in (1, BATCH):
        # The others are where the mean is.
        targets = torch.cat([stream.targets[:1], mean.expand(count - 1)])
        indices = task.expand(count)
        state = pop_art.art(still, targets, indices, step_size=stream.step_size, **draw.BOUNDS)
        got = pop_art.normalize(state, targets, indices)[0]
        weight = step / count
        expected = ((1 - weight) / weight).sqrt() * torch.sign(stream.targets[0] - mean).double()
        terms = expected.abs() + 1 / (weight * (1 - weight)).sqrt()
        parts.append(compare(got, expected, terms, PER_STEP + count, settings.dtype))
    return worst(*parts)


def offsets(key: Tensor, settings: Settings) -> Discrepancy:
    """Targets c ± 1, c up to 10⁷ in float32 (10¹⁵ in float64), with steps too small to move a plain mean."""
    tasks, dtype = settings.architecture.tasks, settings.dtype
    shapes = dict.fromkeys(("offset", "sign", "start"), (tasks,))
    numbers = draw.uniforms(key, dtype, targets=(LONG, tasks), step=(), **shapes)
    largest = 1e7 if dtype == torch.float32 else 1e15
    centre = draw.log_between(1, largest, numbers["offset"]) * torch.sign(numbers["sign"] - 0.4)
    targets = centre + torch.sign(numbers["targets"] - 0.4) + 0.1 * draw.normal(numbers["targets"])
    shift = centre - draw.between(-1, 2, numbers["start"])
    start = draw.statistics(shift, torch.ones_like(shift), torch.zeros_like(shift))
    step_size = draw.log_between(1e-4, 1e-2, numbers["step"])
    state = start
    for target in targets.unbind():
        state = pop_art.art(state, target, step_size=step_size, **draw.BOUNDS)
    ages = torch.arange(LONG - 1, -1, -1, dtype=torch.float64, device=key.device)
    weights = step_size.double() * (1 - step_size.double()) ** ages
    rest = (1 - step_size.double()) ** LONG
    expected = _closed_form(start, targets, weights[:, None].expand(targets.shape), rest.expand(tasks))
    return _compare(state, start, expected, PER_STEP * LONG, dtype)


CHECKS = (
    Check(
        "bound_holds",
        "normalized targets stay within √((1−β)/β), single and in batches",
        "2016, Prop. 2",
        bound_holds,
    ),
    Check("bound_is_reached", "and the bound is tight", "2016, Prop. 2", bound_is_reached),
    Check(
        "weighted_moments",
        "statistics = weighted mean and variance; constant and corrected β",
        "2016, eq. 1 to 3",
        weighted_moments,
    ),
    Check("batches", "a batch, as mean or sum = its weighted mean and variance", "README", batches),
    Check("sequential_batch", "a sequential batch = its targets one by one", "README", sequential_batch),
    Check("sample_moments", "β = 1/t gives the sample's mean and variance", "2016, sec. 2", sample_moments),
    Check(
        "offsets",
        "no digit of σ is lost for c ± 1, c up to 10⁷ (float64: 10¹⁵)",
        "README",
        offsets,
    ),
)
