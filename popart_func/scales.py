"""Other scales than the mean and deviation of the targets, with the same interface: each gives a `pop_art.PopArt`.

State: PopArtState(shift, scale, variance, count, residue), as in `pop_art`; ``variance`` is the square of the scale
       before its bounds
init:   deviation(num_outputs, step_size).init() -> PopArtState
update: deviation(num_outputs, step_size).update(params, state, targets, indices, weights) -> (params, PopArtState)

| scale | shift | scale | when to use it |
|---|---|---|---|
| `pop_art.popart` | mean | deviation | by default |
| `running_moments` | mean of all targets | deviation of all | the targets' distribution stands still |
| `deviation` | 0 | root mean square | the sign of a target matters, or the head has no bias |
| `percentiles` | middle of two percentiles | half their distance | a few targets are far from all others |
| `largest_return` | 0 | largest absolute target so far | outputs must stay within a range |
| `return_based` | 0 | from rewards and discounts | bootstrapped targets, whose size follows the critic |
| `fixed` | given | given | the range is known |

All have `normalize`, `unnormalize`, `pop`, `fold`, tasks, groups, weights and lanes in common, and POP is exact for
each: at learning rate 0 no prediction moves. Targets carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from popart_func._checks import as_samples, check_art_options, check_count, check_groups, check_scalar, is_known
from popart_func._typing import Scalar
from popart_func.models import Params
from popart_func.moments import two_sum
from popart_func.pop_art import PopArt, PopArtState, init_like, popart
from popart_func.target_statistics import bias_corrected

__all__ = ["deviation", "fixed", "largest_return", "percentiles", "return_based", "running_moments"]

_SMALLEST_STEP = 1e-20
"""A step that is corrected for its start values is 1/t at this size, to the last bit."""


def running_moments(
    num_outputs: int, scale_lb: Scalar = 1e-4, scale_ub: Scalar = 1e6, *, groups: Tensor | None = None, **options: Any
) -> PopArt:
    """The mean and deviation of all targets so far: ``β_t = 1/t``.

    Args:
        num_outputs: the number of tasks.
        scale_lb: least scale.
        scale_ub: greatest scale.
        groups: the task of each output, as in `pop_art.popart`.
        **options: ``reduction`` and ``gather`` of `pop_art.popart`. Each batch counts as one update.

    Source: Welford (1962); as in the running statistics of OpenAI's baselines.

    >>> init, update = running_moments(1)
    >>> head, state = {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}, init()
    >>> for target in (2.0, 4.0, 9.0):
    ...     head, state = update(head, state, torch.tensor([target]))
    >>> state.shift
    tensor([5.])
    """
    return popart(num_outputs, _SMALLEST_STEP, scale_lb, scale_ub, bias_correction=True, groups=groups, **options)


def deviation(
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    bias_correction: bool = False,
    groups: Tensor | None = None,
) -> PopArt:
    """The root of the mean square, without a shift: ``v' = v + β (E[y²] − v)``, ``σ' = √v'``.

    Arguments as in `pop_art.popart`.

    Source: as the scaling of rewards in OpenAI's baselines, `VecNormalize`, with a mean of 0.
    """

    def measure(targets: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, ((weights / total) * _square(targets)).sum(0).sqrt()

    return _scale(
        "deviation", num_outputs, step_size, scale_lb, scale_ub, bias_correction, groups, measure, squared=True
    )


def percentiles(
    num_outputs: int,
    step_size: Scalar = 0.01,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    low: float = 0.05,
    high: float = 0.95,
    bias_correction: bool = False,
    groups: Tensor | None = None,
) -> PopArt:
    """Moving averages of two percentiles of each batch: the shift is their middle, the scale half their distance.

    Percentiles between two targets are interpolated in a line, as `torch.quantile` does; with weights, between the
    middles of the targets' weights. DreamerV3 has ``scale_lb=1`` (and divides by the whole distance). One target alone
    has no distance: a batch of one is refused, and a task with one keeps its statistics.

    Args:
        num_outputs: the number of tasks.
        step_size: β of the moving averages.
        scale_lb: least scale.
        scale_ub: greatest scale.
        low: the lower percentile, in [0, 1).
        high: the upper one, in (low, 1].
        bias_correction: forget the start values at once.
        groups: the task of each output, as in `pop_art.popart`.

    Source: Hafner et al., *Mastering diverse domains through world models* (2023); torchrl's ``PercentileValueNorm``.
    """
    check_scalar("percentiles", "low", low, least=0, below=1)
    check_scalar("percentiles", "high", high, above=low, most=1)

    def measure(targets: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor | None, Tensor]:
        below, above = _quantiles(targets, weights, (low, high))
        return below + (above - below) / 2, (above - below) / 2

    return _scale("percentiles", num_outputs, step_size, scale_lb, scale_ub, bias_correction, groups, measure, least=2)


def largest_return(
    num_outputs: int,
    normalized_max: Scalar = 1.0,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    groups: Tensor | None = None,
) -> PopArt:
    """The largest absolute target so far, without a shift: normalized targets stay within ``±normalized_max``.

    Args:
        num_outputs: the number of tasks.
        normalized_max: what the largest target is normalized to, > 0.
        scale_lb: least scale.
        scale_ub: greatest scale.
        groups: the task of each output, as in `pop_art.popart`.

    Source: Nauman et al., *Bigger, regularized, categorical* (2025), per task; SimbaV2 (2025) has the larger of this,
    with ``normalized_max=5``, and the returns' deviation.
    """
    check_scalar("largest_return", "normalized_max", normalized_max, above=0)

    def measure(targets: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor | None, Tensor]:
        sizes = torch.where(weights > 0, targets.abs(), 0)
        largest = sizes.amax(0) if sizes.shape[0] else sizes.sum(0)
        return None, largest / (normalized_max.to(largest) if isinstance(normalized_max, Tensor) else normalized_max)

    return _scale("largest_return", num_outputs, 1.0, scale_lb, scale_ub, False, groups, measure, largest=True)


def return_based(
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    bias_correction: bool = False,
    groups: Tensor | None = None,
) -> PopArt:
    """``σ² = V[R] + V[γ] E[G²]`` of each batch, in a moving average: from rewards, discounts and returns.

    Targets have a last axis of three: the return G, the reward R and the discount γ (0 at the end of an episode), so
    ``[..., tasks, 3]``, or with indices ``[..., 3]``. One target alone has no variance: a batch of one is refused, and
    a task with one keeps its statistics. For `PopArt.update` and `PopArt.update_network`; a learner's targets have no
    such axis.

    Args: as in `pop_art.popart`.

    Source: Schaul et al., *Return-based scaling: yet another normalisation trick for deep RL* (2021), equation 3.
    """

    def measure(targets: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor | None, Tensor]:
        returns, rewards, discounts = targets.unbind(-1)
        share = weights / total

        def variance(values: Tensor) -> Tensor:
            return (share * _square(values - (share * values).sum(0))).sum(0)

        # A sum of squares may still overflow by a rounding, and 0 times infinity is NaN.
        size = (share * _square(returns)).sum(0).clamp(max=torch.finfo(returns.dtype).max)
        return None, (variance(rewards) + variance(discounts) * size).sqrt()

    return _scale(
        "return_based",
        num_outputs,
        step_size,
        scale_lb,
        scale_ub,
        bias_correction,
        groups,
        measure,
        squared=True,
        parts=3,
        least=2,
    )


def fixed(shift: Tensor, scale: Tensor, *, groups: Tensor | None = None) -> PopArt:
    """A shift and a scale that stand still.

    Args:
        shift: μ, ``[tasks]``.
        scale: σ > 0, ``[tasks]``.
        groups: the task of each output, as in `pop_art.popart`.

    Raises:
        ValueError: shapes, groups, or a scale that is not above 0, where it can be read (on the CPU, outside of
            transforms).

    >>> fixed(torch.tensor([10.0]), torch.tensor([2.0])).init().shift
    tensor([10.])
    """
    if shift.ndim != 1 or shift.shape != scale.shape:
        raise ValueError(
            f"fixed: `shift` and `scale` must have shape [tasks], got {tuple(shift.shape)} and {tuple(scale.shape)}."
        )
    if is_known(scale) and not bool((scale > 0).all()):
        raise ValueError(f"fixed: `scale` must be > 0, got {scale.tolist()}.")
    check_groups("fixed", groups, shift.shape[0])

    def init(params: Params | None = None) -> PopArtState:
        state = init_like(shift.shape[0], params)
        value = state._replace(shift=shift.to(state.shift), scale=scale.to(state.scale))
        return value._replace(variance=value.scale.square())

    def stay(
        state: PopArtState, targets: Tensor, indices: Tensor | None = None, weights: Tensor | None = None
    ) -> PopArtState:
        return state

    return PopArt(init, stay, groups)


_Measure = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor]]
"""``measure(targets, weights, total)``, ``[samples, tasks]`` -> a batch's shift (None for 0) and size, ``[tasks]``."""


def _scale(
    caller: str,
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar,
    scale_ub: Scalar,
    bias_correction: bool,
    groups: Tensor | None,
    measure: _Measure,
    *,
    squared: bool = False,
    largest: bool = False,
    parts: int = 0,
    least: int = 1,
) -> PopArt:
    """A scale that follows a measure of each batch: in a moving average, of its square, or as the largest so far.

    The measure needs at least ``least`` targets; a task with fewer keeps its statistics.
    """
    check_count(caller, "num_outputs", num_outputs)
    check_art_options(caller, step_size, scale_lb, scale_ub, "mean")
    check_groups(caller, groups, num_outputs)

    def art(
        state: PopArtState, targets: Tensor, indices: Tensor | None = None, weights: Tensor | None = None
    ) -> PopArtState:
        values, shares = _by_task(caller, state, targets, indices, weights, parts)
        if 0 < values.shape[0] < least:
            raise ValueError(
                f"{caller}: `targets` must be at least {least} in a batch, got shape {tuple(targets.shape)}: one alone "
                f"has no spread. Collect them, or take `popart`, which needs one."
            )
        state = PopArtState(*(field.detach() for field in state))
        total = shares.sum(0)
        shift, size = measure(values, shares, torch.where(total > 0, total, 1))
        count = state.count + (state.count < torch.iinfo(torch.int32).max)
        step: Any = step_size.detach().to(values.dtype) if isinstance(step_size, Tensor) else step_size
        if bias_correction:
            step = bias_corrected(step, count, values.dtype)
        if largest:
            variance = torch.where(state.count > 0, torch.maximum(state.variance, _square(size)), _square(size))
        elif squared:
            variance = torch.lerp(state.variance, _square(size), step)
        else:
            variance = _square(torch.lerp(state.variance.sqrt(), size, step))
        mean, residue = state.shift, state.residue
        if shift is not None:
            distance, rest = two_sum(shift, -state.shift)
            total_mean, lost = two_sum(state.shift, step * distance)
            mean, residue = two_sum(total_mean, lost + (step * (rest - state.residue) + state.residue))
        scale = variance.sqrt().clamp(min=scale_lb).clamp(max=scale_ub).clamp(min=torch.finfo(values.dtype).tiny)
        new = PopArtState(mean, scale, variance, count, residue)
        enough = (shares > 0).sum(0) >= least
        return PopArtState(*(torch.where(enough, after, before) for after, before in zip(new, state, strict=True)))

    return PopArt(partial(init_like, num_outputs), art, groups, parts=parts)


def _square(values: Tensor) -> Tensor:
    """Squares, with the largest number in the place of infinity, which a moving average would never forget."""
    return values.square().clamp(max=torch.finfo(values.dtype).max)


def _by_task(
    caller: str, state: PopArtState, targets: Tensor, indices: Tensor | None, weights: Tensor | None, parts: int
) -> tuple[Tensor, Tensor]:
    """Targets and weights, ``[samples, tasks]``, with 0 for those that are absent."""
    tasks, dtype = state.shift.shape[-1], state.shift.dtype
    if weights is None:
        first = targets[..., 0] if parts else targets
        weights = torch.ones((), dtype=dtype, device=targets.device).expand(first.shape)
    columns = targets.unbind(-1) if parts else (targets,)
    if parts and len(columns) != parts:
        raise ValueError(f"{caller}: the last axis of `targets` must be {parts}, got shape {tuple(targets.shape)}.")
    samples = [as_samples(caller, state.shift, column, indices, weights) for column in columns]
    values = torch.stack([one for one, _, _ in samples], -1) if parts else samples[0][0]
    _, rows, shares = samples[0]
    assert shares is not None
    values, shares = values.detach().to(dtype), shares.detach().to(dtype)
    if rows is not None:
        belongs = torch.eye(tasks, dtype=torch.bool, device=rows.device).index_select(0, rows)
        shares = torch.where(belongs, shares[:, None], 0)
        values = values[:, None]
        values = values.expand(values.shape[0], tasks, *values.shape[2:])
    present = shares > 0
    return torch.where(present[..., None] if parts else present, values, 0), shares


def _quantiles(values: Tensor, weights: Tensor, probabilities: tuple[float, ...]) -> list[Tensor]:
    """Quantiles of each column, of what has a weight, interpolated between the middles of the weights."""
    absent = torch.where(weights > 0, values, torch.inf)
    ordered, order = absent.sort(0)
    shares = weights.gather(0, order)
    if not ordered.shape[0]:
        return [ordered.sum(0) for _ in probabilities]
    positions = shares.cumsum(0) - shares / 2
    positions = positions - positions[:1]
    last = (shares > 0).sum(0, keepdim=True).clamp(min=1) - 1
    end = positions.gather(0, last)
    result = []
    for probability in probabilities:
        place = probability * end
        # The last target at or below the place, and the next one.
        under = torch.minimum(((positions <= place) & (shares > 0)).sum(0, keepdim=True).clamp(min=1) - 1, last)
        over = torch.minimum(under + 1, last)
        start, stop = positions.gather(0, under), positions.gather(0, over)
        part = torch.where(stop > start, (place - start) / torch.where(stop > start, stop - start, 1), 0)
        low, high = ordered.gather(0, under), ordered.gather(0, over)
        low, high = (torch.where(low.isinf() & (shares.sum(0) == 0), 0, one) for one in (low, high))
        result.append((low + part * (high - low)).squeeze(0))
    return result
