"""Checks of arguments, made once where they enter the library. The value of a traced tensor is never read.

``check_*`` raises or returns nothing; ``as_*`` returns the argument in the form that the library works with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from popart_func._torch import FakeTensor, dispatch_modes, is_functorch_wrapped_tensor
from popart_func._typing import Scalar

__all__ = [
    "Reduction",
    "as_indices",
    "as_samples",
    "as_weights",
    "check_art_options",
    "check_count",
    "check_factors",
    "check_groups",
    "check_head_name",
    "check_in_range",
    "check_params",
    "check_real",
    "check_rescale_moments",
    "check_same_mean",
    "check_scalar",
    "check_sum_of_samples",
    "check_task_axis",
    "is_known",
]

Reduction = Literal["mean", "sum", "sequential"]
"""How the targets that a task has in one batch act together: see `pop_art.art`."""

_REDUCTIONS = get_args(Reduction)


def is_known(*tensors: Tensor) -> bool:
    """Whether values can be read here, at no cost: on the CPU, outside of every transform and trace."""
    if torch.compiler.is_compiling() or dispatch_modes():
        return False
    for tensor in tensors:
        if not tensor.is_cpu or is_functorch_wrapped_tensor(tensor) or isinstance(tensor, FakeTensor):
            return False
    return True


def check_count(caller: str, name: str, value: Any) -> None:
    """Raises unless a value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: `{name}` must be an integer, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{caller}: `{name}` must be at least 1, got {value}.")


def check_params(caller: str, params: Any) -> None:
    """Raises unless parameters are a flat, non-empty mapping from name to tensor."""
    if isinstance(params, Mapping) and params and all(isinstance(value, Tensor) for value in params.values()):
        return
    got = type(params).__name__
    if isinstance(params, Mapping):
        wrong = sorted({type(value).__name__ for value in params.values() if not isinstance(value, Tensor)})
        got = f"one that holds {' and '.join(wrong)}" if wrong else "an empty one"
    raise TypeError(
        f"{caller}: `params` must be a mapping from name to tensor, as `init_params` and `unify` give it, got {got}."
    )


def check_scalar(
    caller: str,
    name: str,
    value: Scalar,
    *,
    above: int | float | None = None,
    least: int | float | None = None,
    below: int | float | None = None,
    most: int | float | None = None,
) -> None:
    """Raises unless a hyper-parameter is a number within bounds, or a real 0-d tensor, whose value is not read."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{caller}: `{name}` must be a number or a real 0-d tensor, "
                f"got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}. "
                f"For one value per lane, use torch.vmap over the lanes."
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: `{name}` must be a number or a 0-d tensor, got {type(value).__name__}.")
    fits = (
        (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
        and value == value
    )
    if not fits:
        low = "" if above is None and least is None else f"> {above}" if least is None else f">= {least}"
        high = "" if below is None and most is None else f"< {below}" if most is None else f"<= {most}"
        expected = " and ".join(part for part in (low, high) if part)
        raise ValueError(f"{caller}: `{name}` must be {expected}, got {value}.")


def check_factors(caller: str, factors: Mapping[str, Tensor]) -> None:
    """Raises if a factor is known to be infinite, as σ/σ' is for σ' = 0."""
    for name, factor in factors.items():
        if is_known(factor) and factor.isinf().any():
            raise ValueError(f"{caller}: `factors` must be finite, got {factor.tolist()} for {name!r}.")


def check_art_options(caller: str, step_size: Scalar, scale_lb: Scalar, scale_ub: Scalar, reduction: str) -> None:
    check_scalar(caller, "step_size", step_size, above=0, most=1)
    check_scalar(caller, "scale_lb", scale_lb, above=0)
    if isinstance(scale_lb, Tensor):
        check_scalar(caller, "scale_ub", scale_ub, above=0)
    else:
        check_scalar(caller, "scale_ub", scale_ub, least=scale_lb)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{caller}: `reduction` must be one of {list(_REDUCTIONS)}, got {reduction!r}.")


def check_real(caller: str, name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{caller}: `{name}` must be a tensor, got {type(values).__name__}.")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{caller}: `{name}` must be real numbers, got dtype {values.dtype}.")


def check_task_axis(caller: str, shift: Tensor, name: str, values: Tensor) -> None:
    tasks = shift.shape[-1]
    if values.ndim == 0 or values.shape[-1] != tasks:
        raise ValueError(
            f"{caller}: the last axis of `{name}` must be the {tasks} tasks, got shape {tuple(values.shape)}. "
            f"Pass `indices` to say which task each value belongs to."
        )


def as_indices(caller: str, shift: Tensor, name: str, values: Tensor, indices: Tensor) -> Tensor:
    """Checked indices of tasks, in the shape of the values."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{caller}: `indices` must be a tensor, got {type(indices).__name__}.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{caller}: `indices` must be integers, got dtype {indices.dtype}.")
    check_in_range(caller, "indices", indices, shift.shape[-1])
    return _broadcast(caller, name, values, "indices", indices)


def as_weights(caller: str, name: str, values: Tensor, weights: Tensor) -> Tensor:
    """Checked weights, in the shape of the values; not yet in their dtype."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{caller}: `weights` must be a tensor, got {type(weights).__name__}.")
    if weights.is_complex():
        raise TypeError(f"{caller}: `weights` must be bools or real numbers, got dtype {weights.dtype}.")
    if weights.dtype != torch.bool and is_known(weights) and not bool(((weights >= 0) & (weights < math.inf)).all()):
        raise ValueError(f"{caller}: `weights` must be finite and at least 0, got some that are not.")
    return _broadcast(caller, name, values, "weights", weights)


def _broadcast(caller: str, name: str, values: Tensor, other_name: str, others: Tensor) -> Tensor:
    if others.shape == values.shape:
        return others
    try:
        return others.expand(values.shape)
    except RuntimeError:
        raise ValueError(
            f"{caller}: `{other_name}` must have the shape of `{name}`, {tuple(values.shape)}, or broadcast to it, "
            f"got {tuple(others.shape)}."
        ) from None


def check_in_range(caller: str, name: str, indices: Tensor, size: int) -> None:
    """Raises if indices are known to lie outside of ``[0, size)``."""
    if is_known(indices) and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(
            f"{caller}: `{name}` must lie in [0, {size}), got values from {int(indices.min())} to {int(indices.max())}."
        )


def as_samples(
    caller: str, shift: Tensor, targets: Tensor, indices: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked targets and weights as ``[samples, tasks]``, or targets, indices and weights as ``[samples]``."""
    check_real(caller, "targets", targets)
    if shift.ndim != 1:
        raise ValueError(
            f"{caller}: the fields of `state` must have shape [tasks], got {tuple(shift.shape)}. "
            f"For many lanes, use torch.vmap."
        )
    if weights is not None:
        weights = as_weights(caller, "targets", targets, weights)
    if indices is not None:
        indices = as_indices(caller, shift, "targets", targets, indices).reshape(-1).long()
        shape: tuple[int, ...] = (-1,)
    else:
        tasks = shift.shape[0]
        if tasks > 1:
            check_task_axis(caller, shift, "targets", targets)
        shape = (-1, tasks)
    return targets.reshape(shape), indices, None if weights is None else weights.reshape(shape)


def check_sum_of_samples(caller: str, step_size: int | float, samples: int | float) -> None:
    if samples * step_size > 1:
        raise ValueError(
            f"{caller}: with `reduction` 'sum' a task's {samples:g} targets at step size {step_size} make one step of "
            f"{samples * step_size:g}, which must not exceed 1: it would diverge. Use 'mean' or a smaller `step_size`."
        )


def check_head_name(caller: str, params: Iterable[str], head: str) -> None:
    """Raises unless some parameters lie below a layer of this name."""
    if not any(name.startswith(f"{head}.") for name in params):
        layers = sorted({name.rpartition(".")[0] for name in params})
        raise ValueError(f"{caller}: `head` must name a layer of `params`, one of {layers}, got {head!r}.")


def check_groups(caller: str, groups: Tensor | None, tasks: int) -> None:
    """Raises unless the statistic of each output is given as integers ``[outputs]`` in ``[0, tasks)``."""
    if groups is None:
        return
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.dtype == torch.bool or groups.ndim != 1:
        got = f"{groups.dtype} {tuple(groups.shape)}" if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"{caller}: `groups` must be a tensor of integers, [outputs], got {got}.")
    check_in_range(caller, "groups", groups, tasks)


def check_same_mean(caller: str, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Raises if a head without bias would have to follow a mean that moves: shift and residue, before and after."""
    known = is_known(*old, *new)
    if not known or not all(map(torch.equal, old, new)):
        raise ValueError(
            f"{caller}: `params` has no bias, so it cannot absorb a shift that moves"
            + ("." if known else ", and inside a transform whether it moves cannot be known.")
            + " Give the head a bias."
        )


def check_rescale_moments(caller: str, value: Any) -> None:
    if value not in (True, False, "head", "all"):
        raise ValueError(f"{caller}: `rescale_moments` must be a bool, 'head' or 'all', got {value!r}.")
