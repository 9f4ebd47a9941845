"""Checks of the running statistics against their closed form (which counts the roundings), and of Proposition 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func import pop_art
from popart_func.pop_art import Gather, PopArtState, Reduction
from popart_func.verify import draw
from popart_func.verify.check import Settings, check
from popart_func.verify.closed_form import Bounds, Updates, compare_statistics, task_mask, track, track_update
from popart_func.verify.discrepancy import Discrepancy, compare, compare_to_bound, worst

__all__ = ["CHECKS"]

STEPS = 10
BATCHES, BATCH = 3, 6
LONG = 64

RANKS = ((0, 2), (2, 2), (2, BATCH))
"""The targets of each rank, from and up to."""

REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "sequential")

TASKS = (0, 1, 3)
"""The indices of architectures with 1, 3 and 4 tasks; these checks use nothing else of an architecture."""


class _Stream(NamedTuple):
    start: PopArtState
    targets: Tensor
    indices: Tensor
    step_size: Tensor
    bounds: Bounds


def _draw(key: Tensor, settings: Settings, *shape: int) -> _Stream:
    """Draws targets of several tasks, with heavy tails and both signs; each task has a magnitude and an offset.

    Some tasks may have no target.
    """
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


@check("statistics = weighted mean and variance; constant and corrected β", "2016, eq. 1 to 3", architectures=TASKS)
def weighted_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """Statistics after single targets are weighted moments; steps are constant, then bias-corrected."""
    return _against_closed_form(_draw(key, settings, STEPS, 1), settings, "mean")


@check("a batch, as mean or sum = its weighted mean and variance", "README", architectures=TASKS)
def batches(key: Tensor, settings: Settings) -> Discrepancy:
    """A task's n targets in one batch weigh s/n each, with s = β (``"mean"``) or nβ (``"sum"``).

    A task without targets keeps its statistics.
    """
    stream = _draw(key, settings, BATCHES, BATCH)
    # With "sum" a total weight above 1 diverges.
    smaller = stream._replace(step_size=stream.step_size / BATCH)
    return worst(_against_closed_form(stream, settings, "mean"), _against_closed_form(smaller, settings, "sum"))


@check("a sequential batch = its targets one by one", "README", architectures=TASKS)
def sequential_batch(key: Tensor, settings: Settings) -> Discrepancy:
    """A batch with reduction ``"sequential"`` equals its targets one by one, in order."""
    return _against_closed_form(_draw(key, settings, 2, BATCH), settings, "sequential")


def _against_closed_form(stream: _Stream, settings: Settings, reduction: Reduction) -> Discrepancy:
    """Compares `art`, batch by batch, with the closed form; steps are constant, then bias-corrected."""
    targets, indices = stream.targets, stream.indices
    if reduction == "sequential":
        targets, indices = targets.reshape(-1, 1), indices.reshape(-1, 1)
    mask = task_mask(indices, settings.architecture.tasks)
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
        updates = Updates.from_rules(
            targets[..., None],
            mask,
            stream.step_size,
            settings.dtype,
            summed=reduction == "sum",
            bias_correction=bias_correction,
        )
        parts.append(compare_statistics(state, stream.start, updates, stream.bounds, settings.dtype))
    return worst(*parts)


@check("ranks with a part of a batch each = one process, the same bits on all", "README", architectures=TASKS)
def joined_ranks(key: Tensor, settings: Settings) -> Discrepancy:
    """Statistics of three ranks, one of them without targets, equal those of one process on all their targets.

    In sequence they do to the bit, else up to rounding (`closed_form.JOINED_ROUNDINGS`). All ranks have the same bits.
    """
    stream, tasks = _draw(key, settings, 1, BATCH), settings.architecture.tasks
    targets, indices = stream.targets[0], stream.indices[0]
    smaller = stream.step_size / BATCH
    parts = []
    for reduction in REDUCTIONS:
        for bias_correction in (False, True):
            rules: dict[str, Any] = {"reduction": reduction, "bias_correction": bias_correction, "step_size": smaller}

            def of_rank(rank: int, gather: Gather | None, rules: dict[str, Any] = rules) -> PopArtState:
                own = slice(*RANKS[rank])
                return pop_art.art(stream.start, targets[own], indices[own], gather=gather, **rules, **stream.bounds)

            first, *others = _on_all_ranks(of_rank)
            parts += [compare(other, first, first, 0, settings.dtype) for other in others]
            if reduction == "sequential":
                alone = pop_art.art(stream.start, targets, indices, **rules, **stream.bounds)
                parts.append(compare(first, alone, alone, 0, settings.dtype))
                continue
            mask = task_mask(indices, tasks)[None]
            summed = reduction == "sum"
            updates = Updates.from_rules(
                targets[None, :, None], mask, smaller, settings.dtype, summed=summed, bias_correction=bias_correction
            )
            parts.append(
                compare_statistics(first, stream.start, updates, stream.bounds, settings.dtype, ranks=len(RANKS))
            )
    return worst(*parts)


def _on_all_ranks(of_rank: Callable[[int, Gather], PopArtState]) -> list[PopArtState]:
    """The result of each rank, without processes: all run again and again, each time up to one more collective."""
    known: list[Tensor] = []
    while True:
        own: list[Tensor] = []
        results = []
        for rank in range(len(RANKS)):
            gather = _Gathered(known)
            try:
                results.append(of_rank(rank, gather))
            except _Waiting as waiting:
                own.append(waiting.tensor)
        if not own:
            return results
        known.append(torch.stack(own))


class _Waiting(Exception):  # noqa: N818  # no error: a rank waits for the others
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Gathered:
    """A rank's collectives: the first have the results ``known``; the next one raises `_Waiting`."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known, self.calls = known, 0

    def __call__(self, own: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > len(self.known):
            raise _Waiting(own)
        return self.known[self.calls - 1]


@check("β = 1/t gives the sample's mean and variance", "2016, sec. 2", architectures=TASKS)
def sample_moments(key: Tensor, settings: Settings) -> Discrepancy:
    """With ``β_t = 1/t`` the statistics are the mean and the (biased) variance of the targets so far."""
    stream, tasks = _draw(key, settings, STEPS), settings.architecture.tasks
    # Every task gets all targets, multiplied by a factor and a sign of its own.
    factors = torch.arange(1, tasks + 1, device=key.device) * (-1) ** torch.arange(tasks, device=key.device)
    targets = stream.targets[:, None] * factors.to(settings.dtype)
    state = stream.start
    for time, target in enumerate(targets.unbind(), start=1):
        state = pop_art.art(state, target, step_size=1 / time, **stream.bounds)
    times = torch.arange(1, STEPS + 1, dtype=torch.float64, device=key.device)[:, None].expand(STEPS, tasks)
    # Each number 1/t is rounded to the dtype; the first is exact.
    updates = Updates(targets[:, None], torch.ones_like(targets)[:, None].double(), 1 / times, (times > 1).double())
    return compare_statistics(state, stream.start, updates, stream.bounds, settings.dtype)


@check("normalized targets stay within √((1−β)/β), single and in batches", "2016, Prop. 2", architectures=TASKS)
def bound_holds(key: Tensor, settings: Settings) -> Discrepancy:
    """Proposition 2: ``|y − μ'|/σ' <= √((1−w)/w)`` for a target of weight w.

    The weight is β_t for a single target, and ``β/n`` for each of n in a batch (``"mean"``). A task's first target has
    weight 1 with bias correction, and then is normalized to 0, to the bit. The lower bound of the scale may bind. The
    upper bound does not, since the proposition does not hold where it binds.
    """
    tasks = settings.architecture.tasks
    parts = []
    for bias_correction in (False, True):
        for stream in (_draw(key, settings, STEPS, 1), _draw(key, settings, 1, BATCH)):
            state = pop_art.init_state(tasks, dtype=settings.dtype, device=key.device)
            if not bias_correction:
                state = stream.start
            updates = Updates.from_rules(
                stream.targets[..., None],
                task_mask(stream.indices, tasks),
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
                bound, terms = _proposition_2(state, updates, time, settings.dtype)
                parts.append(compare_to_bound(got, bound, terms, 1, settings.dtype))
                state = after
    return worst(*parts)


def _proposition_2(before: PopArtState, updates: Updates, time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Proposition 2's bound for each target of an update, and how far rounding may exceed it, ``[samples]`` each.

    The bound holds for any statistics before, so that only the roundings of the last update count:

    - the mean's, the variance's (which enter the scale by half), and its root's;
    - three in the normalization ``((y − μ) − r) / σ``;
    - those of the weight w, each of which moves the bound by ``½ / √(w (1−w))``.
    """
    mask, step, roundings = updates.mask[time], updates.steps[time], updates.step_roundings[time]
    targets = updates.targets[time].double() - before.shift.double() - before.residue.double()
    after = track_update(track(before), targets, mask, step, roundings, dtype)
    weight = step / mask.sum(0).clamp(min=1)
    bound = torch.where(weight > 0, (1 - weight) / weight, 0).sqrt()
    variance = after.variance
    apart = (targets - after.mean).abs()
    terms = (after.mean_error + 3 * apart) / variance.sqrt() + bound * (1 + after.variance_error / (2 * variance))
    moved = 0.5 * roundings / (weight * (1 - weight)).sqrt()
    own = mask > 0
    return (own * bound).sum(-1), torch.where(own & (weight < 1), terms + moved, 0).sum(-1)


@check("the bound √((1−β)/β) is tight", "2016, Prop. 2", architectures=TASKS)
def bound_is_reached(key: Tensor, settings: Settings) -> Discrepancy:
    """Proposition 2's bound is reached, alone and in a batch: by a target after targets that were all equal."""
    stream, tasks = _draw(key, settings, BATCH), settings.architecture.tasks
    zero = torch.zeros_like(stream.start.scale)
    still = stream.start._replace(variance=zero, scale=zero + draw.SCALE_LB)
    task = stream.indices[0]
    mean = still.shift.index_select(0, task[None]).squeeze(0)
    parts = []
    for count in (1, BATCH):
        # The other targets of the batch equal the mean.
        targets = torch.cat([stream.targets[:1], mean.expand(count - 1)])
        indices = task.expand(count)
        state = pop_art.art(still, targets, indices, step_size=stream.step_size, **draw.BOUNDS)
        got = pop_art.normalize(state, targets, indices)[0]
        mask = task_mask(indices, tasks)[None]
        updates = Updates.from_rules(targets[None, :, None], mask, stream.step_size, settings.dtype)
        bound, terms = _proposition_2(still, updates, 0, settings.dtype)
        expected = bound[0] * torch.sign(stream.targets[0] - mean)
        parts.append(compare(got, expected, terms[0], 1, settings.dtype))
    return worst(*parts)


@check("popart's update = art, then pop, with the same settings", "2016, Alg. 1", architectures=TASKS)
def popart_update(key: Tensor, settings: Settings) -> Discrepancy:
    """``popart(...).update`` equals `art` with the same settings, then `pop`, to the bit."""
    stream, tasks = _draw(key, settings, BATCHES, BATCH), settings.architecture.tasks
    weight = stream.targets.reshape(-1, 1)[:tasks].expand(tasks, 2)
    head = {"head.weight": weight, "head.bias": weight[:, 0]}
    step_size = stream.step_size / BATCH
    parts = []
    for reduction in REDUCTIONS:
        for bias_correction in (False, True):
            rules: dict[str, Any] = {"reduction": reduction, "bias_correction": bias_correction}
            _, update = pop_art.popart(tasks, step_size, *stream.bounds.values(), **rules)
            # Starts after a first update, since that has a corrected step of 1, which may leave a variance of 0.
            old = new = stream.start._replace(count=stream.start.count + 1)
            got = expected = head
            for some, indices in zip(stream.targets.unbind(), stream.indices.unbind(), strict=True):
                got, old = update(got, old, some, indices)
                before = new
                new = pop_art.art(before, some, indices, step_size=step_size, **stream.bounds, **rules)
                expected = pop_art.pop(expected, before, new)
            parts.append(compare((got, old), (expected, new), (expected, new), 0, settings.dtype))
    return worst(*parts)


@check("no digit of σ is lost for c ± 1, c up to 10⁷ (float64: 10¹⁵)", "README", architectures=TASKS)
def offsets(key: Tensor, settings: Settings) -> Discrepancy:
    """Statistics of targets c ± 1, c up to 10⁷ (float64: 10¹⁵), with steps too small to move a plain mean."""
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
    updates = Updates.from_rules(targets[:, None], ones[:, None], step_size, dtype)
    bounds = {name: torch.as_tensor(value, device=key.device) for name, value in draw.BOUNDS.items()}
    return compare_statistics(state, first, updates, bounds, dtype)


CHECKS = (
    bound_holds,
    bound_is_reached,
    weighted_moments,
    batches,
    sequential_batch,
    joined_ranks,
    popart_update,
    sample_moments,
    offsets,
)
