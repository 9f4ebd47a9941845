"""The running statistics against their closed form, and Proposition 2, for targets of any magnitude and offset.

What rounding may do is counted in `running`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func import pop_art
from popart_func.pop_art import PopArtState, Reduction
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, exceed, worst
from popart_func.verify.running import Batches, Bounds, begin, belongs_to, compare_statistics, follow

__all__ = ["CHECKS"]

STEPS = 10
BATCHES, BATCH = 3, 6
LONG = 64

TASKS = (0, 1, 3)
"""Architectures that differ in the number of tasks."""


class _Stream(NamedTuple):
    start: PopArtState
    targets: Tensor
    indices: Tensor
    step_size: Tensor
    bounds: Bounds


def _draw(key: Tensor, settings: Settings, *shape: int) -> _Stream:
    """Targets of several tasks: a magnitude and an offset each, heavy tails, both signs; some tasks may have none."""
    dtype, tasks = settings.dtype, settings.architecture.tasks
    shapes = dict.fromkeys(("scale", "offset", "start", "wide"), (tasks,))
    numbers = draw.uniforms(key, dtype, targets=shape, task=shape, step=(), bounds=(2,), far=(tasks,), **shapes)
    scale = draw.magnitude(numbers["scale"])
    centre = scale * draw.heavy_tailed(numbers["offset"]) * draw.log_between(1, 1e4, numbers["far"])
    indices = (numbers["task"] * tasks).long().clamp(max=tasks - 1)
    targets = centre[indices] + scale[indices] * draw.heavy_tailed(numbers["targets"])
    shift = centre + scale * draw.normal(numbers["start"])
    first = draw.statistics(shift, scale * draw.log_between(0.1, 10, numbers["wide"]), torch.zeros_like(shift))
    step_size = draw.log_between(1e-4, 0.7, numbers["step"])
    return _Stream(first, targets, indices, step_size, draw.bounds(numbers["bounds"]))


def weighted_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """One target at a time, of any task: constant step sizes, and bias-corrected ones."""
    return _against_closed_form(_draw(key, settings, STEPS, 1), settings, "mean")


def batches(key: Tensor, settings: Settings) -> Discrepancy:
    """A task's n targets in one batch weigh s/n each: s is β (``"mean"``) or nβ (``"sum"``); absent tasks stay."""
    stream = _draw(key, settings, BATCHES, BATCH)
    # More than one in all would diverge.
    smaller = stream._replace(step_size=stream.step_size / BATCH)
    return worst(
        _against_closed_form(stream, settings, "mean"),
        _against_closed_form(smaller, settings, "sum"),
    )


def sequential_batches(key: Tensor, settings: Settings) -> Discrepancy:
    """A batch under ``"sequential"`` is its targets one by one, in order."""
    return _against_closed_form(_draw(key, settings, 2, BATCH), settings, "sequential")


def _against_closed_form(stream: _Stream, settings: Settings, reduction: Reduction) -> Discrepancy:
    """Batch by batch, with constant step sizes and with bias-corrected ones."""
    targets, indices = stream.targets, stream.indices
    if reduction == "sequential":
        targets, indices = targets.reshape(-1, 1), indices.reshape(-1, 1)
    belongs = belongs_to(indices, settings.architecture.tasks)
    parts = []
    for bias_correction in (False, True):
        state = stream.start
        for some, tasks in zip(stream.targets.unbind(), stream.indices.unbind(), strict=True):
            state = pop_art.art(
                state,
                some,
                tasks,
                step_size=stream.step_size,
                reduction=reduction,
                bias_correction=bias_correction,
                **stream.bounds,
            )
        updates = Batches.of(
            targets[..., None],
            belongs,
            stream.step_size,
            settings.dtype,
            summed=reduction == "sum",
            bias_correction=bias_correction,
        )
        parts.append(compare_statistics(state, stream.start, updates, stream.bounds, settings.dtype))
    return worst(*parts)


def sample_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """With ``β_t = 1/t`` the statistics are the mean and the (biased) variance of the targets, in two passes."""
    stream, tasks = _draw(key, settings, STEPS), settings.architecture.tasks
    # Every task has all the targets, of the first target's magnitude, each with its own sign and factor.
    factors = torch.arange(1, tasks + 1, device=key.device) * (-1) ** torch.arange(tasks, device=key.device)
    targets = stream.targets[:, None] * factors.to(settings.dtype)
    state = stream.start
    for time, target in enumerate(targets.unbind(), start=1):
        state = pop_art.art(state, target, step_size=1 / time, **stream.bounds)
    times = torch.arange(1, STEPS + 1, dtype=torch.float64, device=key.device)[:, None].expand(STEPS, tasks)
    # Every number 1/t is rounded to the dtype, but for the first.
    updates = Batches(targets[:, None], torch.ones_like(targets)[:, None].double(), 1 / times, (times > 1).double())
    return compare_statistics(state, stream.start, updates, stream.bounds, settings.dtype)


def bound_holds(key: Tensor, settings: Settings) -> Discrepancy:
    """``|y − μ'|/σ' <= √((1−w)/w)`` for a target of weight w: β_t alone, ``β/n`` among n in a batch (``"mean"``).

    Of weight 1, a task's first target when the step size is bias-corrected, the normalized target is 0, to the bit.
    A lower bound of the scale may bind; where an upper one does, the proposition does not hold.
    """
    tasks = settings.architecture.tasks
    parts = []
    for bias_correction in (False, True):
        for stream in (_draw(key, settings, STEPS, 1), _draw(key, settings, 1, BATCH)):
            state = pop_art.init_state(tasks, dtype=settings.dtype, device=key.device)
            if not bias_correction:
                state = stream.start
            updates = Batches.of(
                stream.targets[..., None],
                belongs_to(stream.indices, tasks),
                stream.step_size,
                settings.dtype,
                bias_correction=bias_correction,
            )
            for time, (targets, indices) in enumerate(zip(stream.targets, stream.indices, strict=True)):
                after = pop_art.art(
                    state,
                    targets,
                    indices,
                    step_size=stream.step_size,
                    bias_correction=bias_correction,
                    scale_lb=stream.bounds["scale_lb"],
                    scale_ub=draw.SCALE_UB,
                )
                got = pop_art.normalize(after, targets, indices).abs()
                parts.append(exceed(got, *_proposition_2(state, updates, time, settings.dtype), 1, settings.dtype))
                state = after
    return worst(*parts)


def _proposition_2(before: PopArtState, updates: Batches, time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bound for each target of an update, and what rounding may add to it, ``[samples]`` each.

    It holds whatever the statistics were, so that only the last update's roundings count: those of the mean, those of
    the variance (by half in the scale) and of its root; the normalization's three, ``((y − μ) − r) / σ``; and what a
    rounding of the weight w moves the bound by, ``½ / √(w (1−w))``.
    """
    belongs, step, roundings = updates.belongs[time], updates.steps[time], updates.step_roundings[time]
    path = begin(before)
    targets = updates.targets[time].double() - before.shift.double() - before.residue.double()
    after = follow(path, targets, belongs, step, roundings, dtype)
    weight = step / belongs.sum(0).clamp(min=1)
    bound = torch.where(weight > 0, (1 - weight) / weight, 0).sqrt()
    variance = after.variance
    apart = (targets - after.mean).abs()
    terms = (after.mean_error + 3 * apart) / variance.sqrt() + bound * (1 + after.variance_error / (2 * variance))
    moved = 0.5 * roundings / (weight * (1 - weight)).sqrt()
    own = belongs > 0
    return (own * bound).sum(-1), torch.where(own & (weight < 1), terms + moved, 0).sum(-1)


def bound_is_reached(key: Tensor, settings: Settings) -> Discrepancy:
    """After targets that did not vary, one that does lies on Proposition 2's bound; so does one in a batch."""
    stream, tasks = _draw(key, settings, BATCH), settings.architecture.tasks
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
        belongs = belongs_to(indices, tasks)[None]
        updates = Batches.of(targets[None, :, None], belongs, stream.step_size, settings.dtype)
        bound, terms = _proposition_2(still, updates, 0, settings.dtype)
        expected = bound[0] * torch.sign(stream.targets[0] - mean)
        parts.append(compare(got, expected, terms[0], 1, settings.dtype))
    return worst(*parts)


def update_is_art_and_pop(key: Tensor, settings: Settings) -> Discrepancy:
    """``popart(...).update`` is `art` with all of its settings, then `pop`: the same calls, so to the bit."""
    stream, tasks = _draw(key, settings, BATCHES, BATCH), settings.architecture.tasks
    weight = stream.targets.reshape(-1, 1)[:tasks].expand(tasks, 2)
    head = {"head.weight": weight, "head.bias": weight[:, 0]}
    step_size = stream.step_size / BATCH
    reductions: tuple[Reduction, ...] = ("mean", "sum", "sequential")
    parts = []
    for reduction in reductions:
        for bias_correction in (False, True):
            rules: dict[str, Any] = {"reduction": reduction, "bias_correction": bias_correction}
            _, update = pop_art.popart(tasks, step_size, *stream.bounds.values(), **rules)
            # Not at the first update, whose corrected step of 1 may leave no variance at all.
            old = new = stream.start._replace(count=stream.start.count + 1)
            got = expected = head
            for some, indices in zip(stream.targets.unbind(), stream.indices.unbind(), strict=True):
                got, old = update(got, old, some, indices)
                before = new
                new = pop_art.art(before, some, indices, step_size=step_size, **stream.bounds, **rules)
                expected = pop_art.pop(expected, before, new)
            parts.append(compare((got, old), (expected, new), (expected, new), 0, settings.dtype))
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
    first = draw.statistics(shift, torch.ones_like(shift), torch.zeros_like(shift))
    step_size = draw.log_between(1e-4, 1e-2, numbers["step"])
    state = first
    for target in targets.unbind():
        state = pop_art.art(state, target, step_size=step_size, **draw.BOUNDS)
    ones = torch.ones_like(targets, dtype=torch.float64)
    updates = Batches.of(targets[:, None], ones[:, None], step_size, dtype)
    bounds = {name: torch.as_tensor(value, device=key.device) for name, value in draw.BOUNDS.items()}
    return compare_statistics(state, first, updates, bounds, dtype)


CHECKS = (
    Check(
        "bound_holds",
        "normalized targets stay within √((1−β)/β), single and in batches",
        "2016, Prop. 2",
        bound_holds,
        architectures=TASKS,
    ),
    Check("bound_is_reached", "and the bound is tight", "2016, Prop. 2", bound_is_reached, architectures=TASKS),
    Check(
        "weighted_moments",
        "statistics = weighted mean and variance; constant and corrected β",
        "2016, eq. 1 to 3",
        weighted_moments,
        architectures=TASKS,
    ),
    Check(
        "batches", "a batch, as mean or sum = its weighted mean and variance", "README", batches, architectures=TASKS
    ),
    Check(
        "sequential_batch",
        "a sequential batch = its targets one by one",
        "README",
        sequential_batches,
        architectures=TASKS,
    ),
    Check(
        "popart_update",
        "popart's update = art, then pop, with the same settings",
        "2016, Alg. 1",
        update_is_art_and_pop,
        architectures=TASKS,
    ),
    Check(
        "sample_moments",
        "β = 1/t gives the sample's mean and variance",
        "2016, sec. 2",
        sample_moments,
        architectures=TASKS,
    ),
    Check(
        "offsets",
        "no digit of σ is lost for c ± 1, c up to 10⁷ (float64: 10¹⁵)",
        "README",
        offsets,
        architectures=TASKS,
    ),
)
