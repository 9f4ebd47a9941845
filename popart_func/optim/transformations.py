"""Gradient transformations, SGD and Adam, with optax's contract, for flat or nested parameters.

State: NamedTuples and dicts of tensors
init:   sgd(learning_rate).init(params) -> state
update: sgd(learning_rate).update(grads, state, params) -> (updates, state); the new parameters are ``params + updates``

A rate is a number, a 0-d tensor (so that each lane can have its own), or a schedule: a function from the number of
updates so far, a 0-d int32 tensor, to a 0-d tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._checks import check_scalar
from popart_func._typing import Scalar
from popart_func.optim.elementwise import map_elements
from popart_func.optim.rescaling import register_state
from popart_func.tree import PyTree

__all__ = [
    "AdamState",
    "GradientTransformation",
    "LearningRateState",
    "MomentumState",
    "Rate",
    "adam",
    "apply_updates",
    "as_dtype",
    "chain",
    "check_rate",
    "one_minus_power",
    "rate_at",
    "scale_by_adam",
    "scale_by_learning_rate",
    "sgd",
    "squared_magnitude",
    "trace",
    "zero_count",
]

Rate = Scalar | Callable[[Tensor], Tensor]
"""A number, a 0-d tensor, or a schedule ``count -> 0-d tensor``."""


class GradientTransformation(NamedTuple):
    """A pair: ``init(params) -> state`` and ``update(grads, state, params=None) -> (updates, state)``."""

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[PyTree, Any]]


@register_state
class LearningRateState(NamedTuple):
    """The number of updates so far, a 0-d int32 tensor."""

    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not missed


@partial(register_state, trace=1)
class MomentumState(NamedTuple):
    """The decaying sum of gradients, a tree like the parameters."""

    trace: PyTree


@partial(register_state, mu=1, nu=2)
class AdamState(NamedTuple):
    """Adam's number of updates (0-d int32), and its first and second moments, trees like the parameters."""

    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not missed
    mu: PyTree
    nu: PyTree


def sgd(learning_rate: Rate, *, momentum: Scalar | None = None, nesterov: bool = False) -> GradientTransformation:
    """Stochastic gradient descent: ``u = −α g``; with momentum ρ: ``m' = g + ρ m``, ``u = −α m'``.

    Args:
        learning_rate: α.
        momentum: ρ in [0, 1), or None.
        nesterov: ``u = −α (g + ρ m')``.

    Raises:
        ValueError: a number out of range, or nesterov without momentum.

    Source: as `optax.sgd` and `torch.optim.SGD` (dampening 0).

    >>> init, update = sgd(0.1)
    >>> params = {"w": torch.tensor(1.0)}
    >>> updates, state = update({"w": torch.tensor(2.0)}, init(params))
    >>> apply_updates(params, updates)
    {'w': tensor(0.8000)}
    """
    check_rate("sgd", learning_rate)
    if momentum is None:
        if nesterov:
            raise ValueError("sgd: `nesterov` needs `momentum`, got None.")
        return scale_by_learning_rate(learning_rate)
    check_scalar("sgd", "momentum", momentum, least=0, below=1)
    return chain(trace(momentum, nesterov=nesterov), scale_by_learning_rate(learning_rate))


def adam(learning_rate: Rate, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """Adam: ``u = −α m̂ / (√v̂ + ε)`` with bias-corrected moments m̂ and v̂.

    Args:
        learning_rate: α.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: ε >= 0, outside of the root.

    Raises:
        ValueError: a number out of range.

    Complex parameters have a real second moment, the mean of ``|g|²``.

    Source: Kingma and Ba (2015), Algorithm 1; as `optax.adam` and, for real parameters, `torch.optim.Adam`.
    """
    check_rate("adam", learning_rate)
    _check_adam("adam", b1, b2, eps)
    return chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other. The state is the tuple of their states.

    Raises:
        TypeError: something else than a `GradientTransformation`.

    >>> init, update = chain(trace(0.9), scale_by_learning_rate(0.1))
    """
    for one in transforms:
        if not isinstance(one, GradientTransformation):
            raise TypeError(
                f"chain: `transforms` must be popart_func.GradientTransformation, got {type(one).__name__}."
            )

    def init(params: PyTree) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: PyTree, state: tuple[Any, ...], params: PyTree = None) -> tuple[PyTree, tuple[Any, ...]]:
        if len(state) != len(transforms):
            raise ValueError(
                f"chain: `state` must have {len(transforms)} parts, one for each transformation, got {len(state)}."
            )
        new_state = []
        for transform, part in zip(transforms, state, strict=True):
            grads, part = transform.update(grads, part, params)
            new_state.append(part)
        return grads, tuple(new_state)

    return GradientTransformation(init, update)


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters, leaf by leaf, in the parameters' dtypes.

    Raises:
        ValueError: a leaf of the updates has another shape than that of the parameters. Nothing is broadcast.
    """

    def apply(param: Tensor, change: Tensor) -> tuple[Tensor]:
        if param.shape != change.shape:
            raise ValueError(
                f"apply_updates: `updates` must have the shapes of `params`, "
                f"got {tuple(change.shape)} for {tuple(param.shape)}."
            )
        return ((param + change).to(param.dtype),)

    (new,) = map_elements(apply, params, updates)
    return new


def scale_by_learning_rate(learning_rate: Rate) -> GradientTransformation:
    """``u = −α g``. A schedule gets the number of updates so far, which starts at 0.

    Raises:
        ValueError: a negative number.
    """
    check_rate("scale_by_learning_rate", learning_rate)

    def init(params: PyTree) -> LearningRateState:
        return LearningRateState(zero_count(params))

    def update(grads: PyTree, state: LearningRateState, params: PyTree = None) -> tuple[PyTree, LearningRateState]:
        rate = rate_at(learning_rate, state.count)
        (updates,) = map_elements(lambda grad: (-as_dtype(rate, grad) * grad,), grads)
        return updates, LearningRateState(state.count + 1)

    return GradientTransformation(init, update)


def trace(decay: Scalar, *, nesterov: bool = False) -> GradientTransformation:
    """Momentum: ``m' = g + ρ m``, and ``u = m'``, or ``u = g + ρ m'`` (Nesterov).

    Raises:
        ValueError: ``decay`` out of range.
    """
    check_scalar("trace", "decay", decay, least=0, below=1)

    def init(params: PyTree) -> MomentumState:
        return MomentumState(optree.tree_map(torch.zeros_like, params))

    def update(grads: PyTree, state: MomentumState, params: PyTree = None) -> tuple[PyTree, MomentumState]:
        def accumulate(grad: Tensor, moment: Tensor) -> Tensor:
            return grad + as_dtype(decay, grad) * moment

        def step(grad: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
            moment = accumulate(grad, moment)
            return accumulate(grad, moment) if nesterov else moment, moment

        updates, moments = map_elements(step, grads, state.trace)
        return updates, MomentumState(moments)

    return GradientTransformation(init, update)


def scale_by_adam(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """``u = m̂ / (√v̂ + ε)``: `adam` without its learning rate.

    Raises:
        ValueError: a number out of range.
    """
    _check_adam("scale_by_adam", b1, b2, eps)

    def init(params: PyTree) -> AdamState:
        mu = optree.tree_map(torch.zeros_like, params)
        return AdamState(zero_count(params), mu=mu, nu=optree.tree_map(squared_magnitude, mu))

    def update(grads: PyTree, state: AdamState, params: PyTree = None) -> tuple[PyTree, AdamState]:
        count = state.count + 1

        def step(grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first = _decayed(b1, first, grad)
            second = _decayed(b2, second, squared_magnitude(grad))
            # Multiplied by reciprocals, which are computed once: a division takes as long as ten multiplications. Each
            # estimate differs from the quotient by at most one unit in the last place.
            mean = first * one_minus_power(b1, count, first.dtype).reciprocal()
            size = (second * one_minus_power(b2, count, second.dtype).reciprocal()).sqrt()
            return mean / (size + as_dtype(eps, second)), first, second

        updates, mu, nu = map_elements(step, grads, state.mu, state.nu)
        return updates, AdamState(count, mu, nu)

    return GradientTransformation(init, update)


def _decayed(rate: Scalar, moment: Tensor, value: Tensor) -> Tensor:
    """A moving average: ``ρ m + (1 − ρ) value``."""
    if isinstance(rate, Tensor):
        rate = rate.to(moment.dtype)
        return rate * moment + (1 - rate) * value
    return torch.add(rate * moment, value, alpha=1 - rate)


def squared_magnitude(grad: Tensor) -> Tensor:
    """``|g|²``, a real tensor."""
    return grad.real.square() + grad.imag.square() if grad.is_complex() else grad.square()


def zero_count(params: PyTree) -> Tensor:
    """0 as an int32 tensor, on the parameters' device."""
    leaves = optree.tree_leaves(params)
    return torch.zeros((), dtype=torch.int32, device=leaves[0].device if leaves else None)


def rate_at(rate: Rate, count: Tensor) -> Scalar:
    """A rate after ``count`` updates."""
    return rate(count) if callable(rate) else rate


def as_dtype(value: Scalar, like: Tensor) -> Scalar:
    """A hyper-parameter in the dtype of a tensor."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def one_minus_power(rate: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 − rate^count`` without cancellation: in float32 the plain form is off by 1e-5 for a rate of 0.999."""
    if isinstance(rate, Tensor):
        return -torch.expm1(count.to(dtype) * rate.to(dtype).log())
    return -torch.expm1(count.to(dtype) * (math.log(rate) if rate > 0 else -math.inf))


def _check_adam(caller: str, b1: Scalar, b2: Scalar, eps: Scalar) -> None:
    check_scalar(caller, "b1", b1, least=0, below=1)
    check_scalar(caller, "b2", b2, least=0, below=1)
    check_scalar(caller, "eps", eps, least=0)


def check_rate(caller: str, rate: Rate) -> None:
    """Raises unless a rate is a schedule, a 0-d tensor or a number of at least 0."""
    if not callable(rate):
        check_scalar(caller, "learning_rate", rate, least=0)
