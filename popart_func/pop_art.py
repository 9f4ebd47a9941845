"""Pop-Art: adaptively rescale targets (ART), preserve outputs precisely (POP).

A head's output is *normalized*, ``n = W h + b``; ``f(x) = σ n + μ`` is *unnormalized*. ART moves the statistics μ
(shift) and σ (scale) with the targets; POP moves the head so that f does not move. Both are pure functions, written
for one lane.

State: PopArtState(shift, scale, variance, count, residue), each ``[tasks]``
init:   popart(num_outputs, step_size).init() -> PopArtState
update: popart(num_outputs, step_size).update(params, state, targets, indices) -> (params, PopArtState)

The statistics are kept in a form that float32 can hold. The textbook's ``σ² = ν − μ²`` cancels: for targets 1000 ± 1 it
comes out negative in float32. Here the variance itself is carried, and what rounding takes from the mean is carried
along as a residue, so that the mean is ``shift + residue``.

Sources: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithm 1 and Propositions 1
and 2; Hessel et al., *Multi-task deep reinforcement learning with PopArt* (2018) for several tasks and the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func._checks import (
    Reduction,
    check_count,
    check_head,
    check_hyper_parameters,
    check_indices,
    check_same_mean,
    check_sum,
    check_targets,
    check_task_axis,
    check_values,
)
from popart_func._typing import Float, Integer, Num, Scalar
from popart_func.models import Params
from popart_func.moments import Moments, moments

__all__ = [
    "PopArt",
    "PopArtState",
    "Reduction",
    "art",
    "fold",
    "init_state",
    "normalize",
    "pop",
    "popart",
    "unnormalize",
]


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


class PopArt(NamedTuple):
    """A pair of pure functions, made by `popart`."""

    init: Callable[..., PopArtState]
    update: Callable[..., tuple[dict[str, Tensor], PopArtState]]


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
    *,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
) -> PopArtState:
    """Moves the statistics toward the targets (ART).

    For one target y, with ``e = y − μ``::

        μ' = μ + β e        v' = v + β ((1 − β) e² − v)        σ' = clip(√v', scale_lb, scale_ub)

    which is ``μ' = (1−β) μ + β y``, ``ν' = (1−β) ν + β y²``, ``σ'² = ν' − μ'²`` without its cancellation. Several
    targets of one task enter through their mean and variance:

    - ``"mean"``: as one update with step β, however many they are.
    - ``"sum"``: every target adds ``β (y − μ)``: one update with step nβ for n targets (the rule of rlax). Above 1 it
      diverges.
    - ``"sequential"``: exactly as if they had come one by one, in order; costs one update each.

    A task without a target keeps its entries to the bit. No gradient flows into the statistics, not even from a step
    size. A target that is NaN or infinite makes its task's statistics NaN, and only its.

    Args:
        state: the statistics, each ``[tasks]``.
        targets: unnormalized targets. Without indices ``[..., tasks]``; with a single task any shape. With indices
            any shape. Computed in the wider of the state's dtype and theirs.
        indices: the task of each target, integers in ``[0, tasks)`` of the targets' shape.
        step_size: β in (0, 1], a number or a 0-d tensor. Not a decay.
        scale_lb: least scale, > 0.
        scale_ub: greatest scale, >= ``scale_lb``.
        reduction: ``"mean"``, ``"sum"`` or ``"sequential"``.
        bias_correction: use ``β_t = β / (1 − (1−β)^t)`` at a task's t-th update, so that the start values are forgotten
            at once: β_1 = 1.

    Raises:
        TypeError: not real tensors, or indices not integers.
        ValueError: shapes, bounds, step size, reduction, or (on the CPU, outside of transforms) indices out of range; a
            ``"sum"`` whose step is known to exceed 1.

    Source: the 2016 paper, equations 1 to 3; the compensated form is this library's.

    >>> state = art(init_state(1), torch.tensor([5.0]), step_size=0.5)
    >>> state.shift, state.variance
    (tensor([2.5000]), tensor([6.7500]))
    """
    check_hyper_parameters("art", step_size, scale_lb, scale_ub, reduction)
    state, targets, indices = prepare("art", state, targets, indices)
    if reduction == "sequential":
        for position in range(targets.shape[0]):
            state = art(
                state,
                targets[position],
                None if indices is None else indices[position],
                step_size=step_size,
                scale_lb=scale_lb,
                scale_ub=scale_ub,
                bias_correction=bias_correction,
            )
        return state
    if reduction == "sum":
        check_sum("art", step_size, state.shift.shape[0], targets, indices)
    return art_from_moments(
        state,
        moments(state.shift, state.residue, targets, indices),
        step_size=step_size,
        scale_lb=scale_lb,
        scale_ub=scale_ub,
        reduction=reduction,
        bias_correction=bias_correction,
    )


def prepare(
    caller: str, state: PopArtState, targets: Tensor, indices: Tensor | None
) -> tuple[PopArtState, Tensor, Tensor | None]:
    """State and targets, checked, in the dtype to compute in and without gradient, as `moments` takes them."""
    targets, indices = check_targets(caller, state.shift, targets, indices)
    dtype = _wider(state, targets)
    cast = PopArtState(*(field.detach().to(dtype) for field in state))._replace(count=state.count.detach())
    return cast, targets.detach().to(dtype), indices


def art_from_moments(
    state: PopArtState,
    batch: Moments,
    *,
    step_size: Scalar,
    scale_lb: Scalar,
    scale_ub: Scalar,
    reduction: Reduction,
    bias_correction: bool,
) -> PopArtState:
    """`art` of a prepared state, from what it needs to know of the targets. ``"mean"`` or ``"sum"``."""
    samples, mean, spread = batch
    dtype = mean.dtype
    step_size, scale_lb, scale_ub = (_cast(value, dtype) for value in (step_size, scale_lb, scale_ub))
    count = state.count + 1
    step = step_size * samples if reduction == "sum" else step_size
    if bias_correction:
        step = _bias_corrected(step, count, dtype)

    # A square beyond the dtype's range would stay infinite for ever; the largest number is forgotten in time.
    largest = torch.finfo(dtype).max
    shift, residue = _two_sum(state.shift, step * mean + state.residue)
    square = (spread + (1 - step) * mean.square().clamp(max=largest)).clamp(max=largest)
    # v + β (square − v), or square − (1−β) (square − v) where β > ½: the smaller part is rounded.
    variance = torch.lerp(state.variance, square, step)
    scale = variance.clamp(min=0).sqrt().clamp(min=scale_lb).clamp(max=scale_ub)
    new = PopArtState(shift, scale, variance, count, residue)
    return PopArtState(*(torch.where(samples > 0, after, before) for after, before in zip(new, state, strict=True)))


def pop(params: Params, old: PopArtState, new: PopArtState) -> dict[str, Tensor]:
    """Moves a head so that its unnormalized outputs stay where they are while the statistics move (POP).

    ``W' = (σ/σ') W`` and ``b' = (σ b + μ − μ') / σ'``. Everything that is normalized by the same statistics needs it:
    target networks, Polyak averages, every head of an ensemble.

    Args:
        params: one linear layer: ``"weight"`` ``[..., outputs, inputs]`` and ``"bias"`` ``[..., outputs]``, under
            these names or with a common prefix (``"critic.head.weight"``), as `models.split` cuts it. ``outputs`` is
            the number of tasks; a single task may be shared by all outputs.
        old: the statistics before.
        new: the statistics after.

    Returns:
        The head, same names, shapes and dtypes. Computed in the statistics' dtype.

    Raises:
        ValueError: not one layer, shapes that do not fit, or no bias while the shift moves (or may move: in a
            transform its value cannot be known).

    Source: the 2016 paper, Proposition 1.

    >>> old = init_state(1)
    >>> new = art(old, torch.tensor([1000.0]), step_size=0.1)
    >>> head = pop({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, old, new)
    >>> unnormalize(new, torch.ones(2) @ head["weight"].T + head["bias"])
    tensor([2.])
    """
    weight, bias = check_head("pop", params, old.shift)
    if old.shift.shape != new.shift.shape:
        raise ValueError(
            f"pop: `old` and `new` must have the same tasks, got shapes {tuple(old.shift.shape)} and "
            f"{tuple(new.shift.shape)}."
        )
    if bias is None:
        check_same_mean("pop", (old.shift, old.residue), (new.shift, new.residue))
    moved: dict[str, Tensor] = dict(params)
    ratio = old.scale / new.scale
    moved[weight] = (params[weight] * ratio[..., None]).to(params[weight].dtype)
    if bias is not None:
        difference = (old.shift - new.shift) + (old.residue - new.residue)
        # As in the equation, but written so that a task whose statistics stay keeps its bias to the bit.
        moved[bias] = (ratio * params[bias] + difference / new.scale).to(params[bias].dtype)
    return moved


def fold(params: Params, state: PopArtState) -> dict[str, Tensor]:
    """The head that gives unnormalized outputs directly, ``(σW, σb + μ)``: what POP preserves.

    Args:
        params: one linear layer, as in `pop`.
        state: its statistics.

    Returns:
        The folded head in the statistics' dtype. A head without bias gets one.

    >>> state = init_state(1)._replace(scale=torch.tensor([2.0]), shift=torch.tensor([7.0]))
    >>> fold({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, state)
    {'weight': tensor([[2., 2.]]), 'bias': tensor([9.])}
    """
    weight, bias = check_head("fold", params, state.shift)
    folded: dict[str, Tensor] = dict(params)
    folded[weight] = params[weight] * state.scale[..., None]
    if bias is None:
        bias = weight.removesuffix("weight") + "bias"
        folded[bias] = (state.shift + state.residue).expand(params[weight].shape[:-1])
    else:
        folded[bias] = (params[bias] * state.scale + state.residue) + state.shift
    return folded


def normalize(
    state: PopArtState, values: Num[Tensor, "*shape"], indices: Integer[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """``(y − μ) / σ``: from the targets' units to the head's. The inverse of `unnormalize`, also while a bound binds.

    Args:
        state: the statistics, each ``[tasks]``.
        values: without indices ``[..., tasks]``, with a single task any shape; with indices any shape.
        indices: the task of each value, integers of the values' shape.

    Returns:
        A tensor of the values' shape, in the wider of the state's dtype and theirs.

    >>> normalize(init_state(1)._replace(shift=torch.tensor([3.0])), torch.tensor(5.0))
    tensor(2.)
    """
    values, shift, scale, residue = _broadcast_statistics("normalize", state, values, indices)
    return ((values - shift) - residue) / scale


def unnormalize(
    state: PopArtState, values: Num[Tensor, "*shape"], indices: Integer[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """``σ n + μ``: from the head's units to the targets'. Arguments as in `normalize`.

    >>> unnormalize(init_state(1)._replace(shift=torch.tensor([3.0])), torch.tensor(2.0))
    tensor(5.)
    """
    values, shift, scale, residue = _broadcast_statistics("unnormalize", state, values, indices)
    return (values * scale + residue) + shift


def popart(
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
) -> PopArt:
    """Pop-Art as a pair of pure functions.

    ``init(params=None)`` gives the statistics, in float64 and on the device of ``params`` where these are given and
    wide, else in float32. ``update(params, state, targets, indices=None)`` runs `art` and `pop` and returns the
    popped head and the new statistics *together*: keeping one without the other moves every prediction.

    Args:
        num_outputs: the number of tasks; 1 for one statistic shared by all outputs.
        step_size: β, see `art`; so are the others.
        scale_lb: least scale.
        scale_ub: greatest scale.
        reduction: how a batch acts.
        bias_correction: forget the start values at once.

    Raises:
        ValueError, TypeError: as `art` and `pop`.

    Source: the 2016 paper, Algorithm 1, its first half.

    >>> init, update = popart(num_outputs=1, step_size=0.1)
    >>> head, state = update({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, init(), torch.tensor([1000.0]))
    >>> state.shift
    tensor([100.])
    """
    check_count("popart", "num_outputs", num_outputs)
    check_hyper_parameters("popart", step_size, scale_lb, scale_ub, reduction)

    return with_art(
        partial(
            art,
            step_size=step_size,
            scale_lb=scale_lb,
            scale_ub=scale_ub,
            reduction=reduction,
            bias_correction=bias_correction,
        ),
        num_outputs,
    )


def with_art(art: Callable[..., PopArtState], num_outputs: int) -> PopArt:
    """Pop-Art whose statistics are moved by ``art(state, targets, indices)``: see `popart`."""

    def init(params: Params | None = None) -> PopArtState:
        if not params:
            return init_state(num_outputs)
        some = next(iter(params.values()))
        return init_state(num_outputs, dtype=some.dtype, device=some.device)

    def update(
        params: Params, state: PopArtState, targets: Num[Tensor, "..."], indices: Integer[Tensor, "..."] | None = None
    ) -> tuple[dict[str, Tensor], PopArtState]:
        new = art(state, targets, indices)
        return pop(params, state, new), new

    return PopArt(init, update)


def _bias_corrected(step: int | float | Num[Tensor, "*tasks"], count: Tensor, dtype: torch.dtype) -> Tensor:
    """``β / (1 − (1−β)^t)`` without cancellation; exactly 1 at t = 1."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=dtype, device=count.device)
    total = -torch.expm1(count.to(dtype) * torch.log1p(-step))
    return torch.where(count == 1, 1, step / total)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its exact rounding error (Knuth). Needs IEEE arithmetic: no re-association."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _broadcast_statistics(
    caller: str, state: PopArtState, values: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values in the dtype to compute in; shift, scale and residue in the shape in which they act on them."""
    check_values(caller, "values", values)
    statistics = state.shift, state.scale, state.residue
    if indices is not None:
        check_indices(caller, state.shift, "values", values, indices)
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
