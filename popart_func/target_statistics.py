"""The running statistics of the targets (ART), and both ways between the targets' units and the head's.

State: PopArtState(shift, scale, variance, count, residue), each ``[tasks]``

The statistics are kept in a form that float32 can hold. The textbook's ``σ² = ν − μ²`` cancels: for targets 1000 ± 1 it
is negative in float32. Here the variance itself is carried, and what rounding takes from the mean is carried along as
a residue, so that the mean is ``shift + residue``.

Sources: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithm 1 and Proposition 2;
Hessel et al., *Multi-task deep reinforcement learning with PopArt* (2018) for several tasks and the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func._art_step import FLOATS, TENSORS, ArtOptions, Gather, bias_corrected, moved
from popart_func._checks import (
    Reduction,
    as_indices,
    as_samples,
    check_art_options,
    check_count,
    check_real,
    check_sum_of_samples,
    check_task_axis,
    is_known,
)
from popart_func._typing import Float, Integer, Num, Scalar, Shaped
from popart_func.moments import Moments, TaskMoments, by_task, join, moments, moments_of_all

__all__ = [
    "ArtOptions",
    "Gather",
    "PopArtState",
    "art",
    "art_with",
    "bias_corrected",
    "init_state",
    "largest_normalized",
    "normalize",
    "unnormalize",
]


_FEW_TASKS = 16
"""Up to so many tasks floats are faster than tensors."""


class PopArtState(NamedTuple):
    """The statistics of the targets, each of shape ``[tasks]``.

    Attributes:
        shift: μ, the mean of the targets, rounded; the mean itself is ``shift + residue``.
        scale: σ, ``clip(√variance, scale_lb, scale_ub)``: the one scale that everything uses.
        variance: σ² before the bounds, so that a bound that stops binding leaves no trace.
        count: how many updates each task has had (int32).
        residue: what rounding took from ``shift``.
    """

    shift: Float[Tensor, "*lanes tasks"]
    scale: Float[Tensor, "*lanes tasks"]
    variance: Float[Tensor, "*lanes tasks"]
    count: Integer[Tensor, "*lanes tasks"]  # type: ignore[assignment]  # a tuple's own `count` is not missed
    residue: Float[Tensor, "*lanes tasks"]


def init_state(
    num_tasks: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> PopArtState:
    """Statistics that normalize nothing yet: shift 0, scale 1.

    >>> init_state(2).scale
    tensor([1., 1.])
    """
    check_count("init_state", "num_tasks", num_tasks)
    dtype = torch.promote_types(dtype, torch.float32)
    zeros = torch.zeros(num_tasks, dtype=dtype, device=device)
    ones = torch.ones(num_tasks, dtype=dtype, device=device)
    return PopArtState(
        shift=zeros,
        scale=ones,
        variance=ones.clone(),
        count=torch.zeros_like(zeros, dtype=torch.int32),
        residue=zeros.clone(),
    )


def art(
    state: PopArtState,
    targets: Num[Tensor, "..."],
    indices: Integer[Tensor, "..."] | None = None,
    weights: Shaped[Tensor, "..."] | None = None,
    *,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
    gather: Gather | None = None,
) -> PopArtState:
    """Moves the statistics toward the targets (ART).

    For one target y, with ``e = y − μ``::

        μ' = μ + β e        v' = v + β ((1 − β) e² − v)        σ' = clip(√v', scale_lb, scale_ub)

    This is ``μ' = (1−β) μ + β y``, ``ν' = (1−β) ν + β y²``, ``σ'² = ν' − μ'²`` without the cancellation. Several
    targets of one task enter through their mean and variance:

    - ``"mean"``: one update with step β, however many targets there are.
    - ``"sum"``: every target adds ``β (y − μ)``, so n targets make one update with step nβ (rlax's rule). A step above
      1 diverges.
    - ``"sequential"``: one update per target, in order.

    A target of weight w counts as w targets in ``"mean"`` and ``"sum"``. In ``"sequential"`` each target is a batch of
    its own, in which a weight says no more than present or absent. A target of weight 0 is absent, whatever it holds:
    NaN and infinity, too. A task without a target keeps its entries to the bit, its count included. The statistics
    carry no gradient, not even from a step size.

    At the ends of the number range: a target that is NaN or infinite makes the statistics of its task NaN, and no
    others; a finite one counts as at most a quarter of the dtype's largest number (8.5e37 in float32); the scale is
    never below the smallest normal number (1.2e-38), whatever ``scale_lb``; ``count`` stops at 2³¹ − 1.

    Args:
        state: the statistics, each ``[tasks]``.
        targets: unnormalized targets. Without indices ``[..., tasks]``; with a single task any shape. With indices
            any shape. The result has the wider dtype of the state's and theirs.
        indices: the task of each target, integers in ``[0, tasks)`` that broadcast to the targets' shape.
        weights: the weight of each target, bools or numbers >= 0 that broadcast to the targets' shape; None for 1.
        step_size: β in (0, 1], a number or a 0-d tensor. Not a decay.
        scale_lb: least scale, > 0.
        scale_ub: greatest scale, >= ``scale_lb``.
        reduction: ``"mean"``, ``"sum"`` or ``"sequential"``.
        bias_correction: use ``β_t = β / (1 − (1−β)^t)`` at a task's t-th update. β_1 is 1, so that the start values are
            forgotten at once. As long as all targets of a task have been equal, their variance is 0 and says nothing of
            a scale: it is the distance of the first one from the mean before it or, where that is 0 too, the scale
            before. So it is never below √v', and Proposition 2 stands.
        gather: brings the tensors of several processes together, so that the statistics are those of all their targets;
            `distributed.all_gather` makes one. None for one process.

    Raises:
        TypeError: targets or weights that are not real tensors, or indices that are not integers.
        ValueError: shapes, bounds, step size or reduction; indices out of range, a weight below 0, or a ``"sum"`` whose
            step exceeds 1, where the values can be read (on the CPU, outside of transforms).

    Source: the 2016 paper, equations 1 to 3; the compensated form is this library's.

    >>> state = art(init_state(1), torch.tensor([5.0]), step_size=0.5)
    >>> state.shift, state.variance
    (tensor([2.5000]), tensor([6.7500]))
    >>> targets, alive = torch.tensor([[10.0, 12, 14], [11, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> art(init_state(1), targets, weights=alive, step_size=1.0).shift
    tensor([11.7500])
    """
    check_art_options("art", step_size, scale_lb, scale_ub, reduction)
    options = ArtOptions("art", step_size, scale_lb, scale_ub, reduction, bias_correction, gather)
    return art_with(options, state, targets, indices, weights)


def art_with(
    options: ArtOptions,
    state: PopArtState,
    targets: Tensor,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
) -> PopArtState:
    """`art` with its options in one piece, which have been checked."""
    caller, step_size, gather = options.caller, options.step_size, options.gather
    targets, indices, weights = as_samples(caller, state.shift, targets, indices, weights)
    dtype = _wider(state, targets)
    tasks, quarter = state.shift.shape[0], torch.finfo(dtype).max / 4
    in_floats = tasks <= _FEW_TASKS and not any(isinstance(one, Tensor) for one in options[1:4])
    in_floats = in_floats and is_known(targets, *state, *(part for part in (indices, weights) if part is not None))
    targets = targets.detach().to(torch.float64 if in_floats else dtype)
    if in_floats and options.reduction == "mean" and indices is None and weights is None and targets.shape[0]:
        # Half of what is below does nothing where every target is there and none is too large.
        batches, most = moments_of_all(targets), min(quarter * quarter, 1e300)
        if all(one.samples * (one.mean * one.mean + one.spread) <= most for one in batches):
            if gather is not None:
                batches = by_task(_joined(gather, torch.tensor(batches, dtype=torch.float64, device="cpu").T))
            return _moved_in_floats(options, state, batches, dtype)
    # No difference of two of them overflows. What is infinite stays so, to become NaN.
    targets = torch.where(targets.isinf(), targets, targets.clamp(-quarter, quarter))
    if weights is not None:
        weights = weights.detach().to(targets.dtype)
        targets = torch.where(weights > 0, targets, 0)
    state = PopArtState(*(field.detach().to(dtype) for field in state))._replace(count=state.count.detach())

    def move(state: PopArtState, batch: Moments) -> PopArtState:
        if in_floats:
            return _moved_in_floats(options, state, by_task(batch), dtype)
        return _moved(options, state, batch, dtype)

    if options.reduction == "sequential":
        if gather is not None:
            sizes = gather(torch.tensor(targets.shape[0], device=targets.device)).tolist()
            targets = _gathered_rows(gather, targets, sizes)
            indices = None if indices is None else _gathered_rows(gather, indices, sizes)
            weights = None if weights is None else _gathered_rows(gather, weights, sizes)
        for position in range(targets.shape[0]):
            one = slice(position, position + 1)
            task, weight = (None if part is None else part[one] for part in (indices, weights))
            state = move(state, moments(targets[one], task, tasks, weight))
        return state
    batch = moments(targets, indices, tasks, weights)
    if gather is not None:
        batch = _joined(gather, torch.stack(batch))
    if options.reduction == "sum" and not isinstance(step_size, Tensor):
        if indices is None and gather is None and weights is None:
            check_sum_of_samples(caller, step_size, targets.shape[0])
        elif is_known(batch.samples):
            check_sum_of_samples(caller, step_size, float(batch.samples.max()))
    return move(state, batch)


def _moved(options: ArtOptions, state: PopArtState, batch: Moments, dtype: torch.dtype) -> PopArtState:
    """The statistics after a batch, from its moments."""
    step_size, scale_lb, scale_ub = (_cast(value, dtype) for value in options[1:4])
    options = options._replace(step_size=step_size, scale_lb=scale_lb, scale_ub=scale_ub)
    new = PopArtState(*moved(TENSORS, options, state, batch, dtype))
    present = batch.samples > 0
    return PopArtState(*(torch.where(present, after, before) for after, before in zip(new, state, strict=True)))


def _moved_in_floats(
    options: ArtOptions, state: PopArtState, batches: Sequence[TaskMoments], dtype: torch.dtype
) -> PopArtState:
    """`_moved` in floats, which are float64, task by task."""
    tasks = zip(zip(*(field.tolist() for field in state), strict=True), batches, strict=True)
    new = [moved(FLOATS, options, one, batch, dtype) if batch.samples > 0 else one for one, batch in tasks]
    shifts, scales, variances, counts, residues = zip(*new, strict=True)
    shift = _tensor_of(shifts, dtype)
    lost = [(one - kept) + rest for one, kept, rest in zip(shifts, shift.tolist(), residues, strict=True)]
    scale, variance, residue = (_tensor_of(values, dtype) for values in (scales, variances, lost))
    return PopArtState(shift, scale, variance, _tensor_of(counts, torch.int32), residue)


def _tensor_of(numbers: Sequence[int | float], dtype: torch.dtype) -> Tensor:
    if len(numbers) == 1:  # in a third of the time
        return torch.full((1,), numbers[0], dtype=dtype, device="cpu")
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _joined(gather: Gather, batch: Tensor) -> Moments:
    """The moments of every process's targets together, from this one's, ``[4, tasks]``."""
    return join(Moments(*gather(batch).unbind(1)))


def _gathered_rows(gather: Gather, rows: Tensor, sizes: list[int]) -> Tensor:
    """The rows of every process, ``sizes`` of them, in the order of the processes."""
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - rows.shape[0], *rows.shape[1:])])
    return torch.cat([part[:size] for part, size in zip(gather(padded), sizes, strict=True)])


def normalize(
    state: PopArtState, values: Num[Tensor, "*shape"], indices: Integer[Tensor, "..."] | None = None
) -> Float[Tensor, "*shape"]:
    """``(y − μ) / σ``: from the targets' units to the head's. The inverse of `unnormalize`, also while a bound binds.

    Args:
        state: the statistics, each ``[tasks]``.
        values: without indices ``[..., tasks]``, with a single task any shape; with indices any shape.
        indices: the task of each value, integers that broadcast to the values' shape. So outputs ``[..., outputs]`` of
            which several share a statistic take the statistic of each output, ``[outputs]``.

    Returns:
        A tensor of the values' shape, in the wider of the state's dtype and theirs.

    >>> normalize(init_state(1)._replace(shift=torch.tensor([3.0])), torch.tensor(5.0))
    tensor(2.)
    """
    values, shift, scale, residue = _broadcast_statistics("normalize", state, values, indices)
    return ((values - shift) - residue) / scale


def unnormalize(
    state: PopArtState, values: Num[Tensor, "*shape"], indices: Integer[Tensor, "..."] | None = None
) -> Float[Tensor, "*shape"]:
    """``σ n + μ``: from the head's units to the targets'. Arguments as in `normalize`.

    >>> unnormalize(init_state(1)._replace(shift=torch.tensor([3.0])), torch.tensor(2.0))
    tensor(5.)
    """
    values, shift, scale, residue = _broadcast_statistics("unnormalize", state, values, indices)
    return (values * scale + residue) + shift


def largest_normalized(
    options: ArtOptions, count: Tensor, share: Tensor | float, samples: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """Proposition 2: no normalized target is larger, right after the update that it is in.

    ``√((1/p − β) / β)`` for a target with the share p in its batch, with the step β of the whole batch.

    Args:
        options: of `art`, whose reduction is ``"mean"`` or ``"sum"``.
        count: how many updates the target's task has had.
        share: p.
        samples: how many targets of its task the batch has, or the sum of their weights.
        dtype: that of the result.
    """
    step = _cast(options.step_size, dtype)
    if options.reduction == "sum":
        step = step * samples
    if options.bias_correction:
        step = bias_corrected(step, count, dtype)
    return torch.as_tensor((1 / share - step) / step, dtype=dtype, device=count.device).clamp(min=0).sqrt()


def _broadcast_statistics(
    caller: str, state: PopArtState, values: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values in the dtype to compute in; shift, scale and residue in the shape in which they act on them."""
    check_real(caller, "values", values)
    statistics = state.shift, state.scale, state.residue
    if indices is not None:
        as_indices(caller, state.shift, "values", values, indices)
        rows = indices.reshape(-1).long()
        shift, scale, residue = (field.index_select(0, rows).reshape(indices.shape) for field in statistics)
    elif state.shift.shape[-1] == 1:
        shift, scale, residue = (field.squeeze(-1) for field in statistics)
    else:
        check_task_axis(caller, state.shift, "values", values)
        shift, scale, residue = statistics
    return values.to(_wider(state, values)), shift, scale, residue


def _wider(state: PopArtState, values: Tensor) -> torch.dtype:
    own = state.shift.dtype
    return torch.promote_types(own, values.dtype) if values.is_floating_point() else own


def _cast(value: Scalar, dtype: torch.dtype) -> Scalar:
    return value.detach().to(dtype) if isinstance(value, Tensor) else value
