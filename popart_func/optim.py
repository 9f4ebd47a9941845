"""Optimizers as gradient transformations, with optax's contract, for flat or nested parameters.

State: NamedTuples and dicts of tensors
init:   sgd(learning_rate).init(params) -> state
update: sgd(learning_rate).update(grads, state, params) -> (updates, state); the new parameters are ``params + updates``

A rate is a number, a 0-d tensor (so that each lane can have its own), or a schedule: a function from the number of
updates so far, a 0-d int32 tensor, to a 0-d tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._checks import check_factors, check_scalar
from popart_func._typing import Scalar
from popart_func.tree import PyTree

__all__ = [
    "AdamState",
    "GradientTransformation",
    "LearningRateState",
    "MomentumState",
    "Rate",
    "adam",
    "apply_updates",
    "chain",
    "gradient_factors",
    "rescale_moments",
    "scale_by_adam",
    "scale_by_learning_rate",
    "sgd",
    "trace",
]

Rate = Scalar | Callable[[Tensor], Tensor]
"""A number, a 0-d tensor, or a schedule ``count -> 0-d tensor``."""


class GradientTransformation(NamedTuple):
    """A pair: ``init(params) -> state`` and ``update(grads, state, params=None) -> (updates, state)``."""

    init: Callable[[PyTree], Any]
    update: Callable[..., tuple[PyTree, Any]]


class LearningRateState(NamedTuple):
    """The number of updates so far, a 0-d int32 tensor."""

    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not missed


class MomentumState(NamedTuple):
    """The decaying sum of gradients, a tree like the parameters."""

    trace: PyTree


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
    _check_rate("sgd", learning_rate)
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
    _check_rate("adam", learning_rate)
    _check_adam("adam", b1, b2, eps)
    return chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other. The state is the tuple of their states.

    >>> init, update = chain(trace(0.9), scale_by_learning_rate(0.1))
    """

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

    def apply(param: Tensor, change: Tensor) -> Tensor:
        if param.shape != change.shape:
            raise ValueError(
                f"apply_updates: `updates` must have the shapes of `params`, "
                f"got {tuple(change.shape)} for {tuple(param.shape)}."
            )
        return (param + change).to(param.dtype)

    return optree.tree_map(apply, params, updates)


def scale_by_learning_rate(learning_rate: Rate) -> GradientTransformation:
    """``u = −α g``. A schedule gets the number of updates so far, which starts at 0.

    Raises:
        ValueError: a negative number.
    """
    _check_rate("scale_by_learning_rate", learning_rate)

    def init(params: PyTree) -> LearningRateState:
        return LearningRateState(_zero_count(params))

    def update(grads: PyTree, state: LearningRateState, params: PyTree = None) -> tuple[PyTree, LearningRateState]:
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        return optree.tree_map(lambda grad: -_as(rate, grad) * grad, grads), LearningRateState(state.count + 1)

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
            return grad + _as(decay, grad) * moment

        moments = optree.tree_map(accumulate, grads, state.trace)
        return optree.tree_map(accumulate, grads, moments) if nesterov else moments, MomentumState(moments)

    return GradientTransformation(init, update)


def scale_by_adam(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """``u = m̂ / (√v̂ + ε)``: `adam` without its learning rate.

    Raises:
        ValueError: a number out of range.
    """
    _check_adam("scale_by_adam", b1, b2, eps)

    def init(params: PyTree) -> AdamState:
        mu = optree.tree_map(torch.zeros_like, params)
        return AdamState(_zero_count(params), mu=mu, nu=optree.tree_map(_squared_magnitude, mu))

    def update(grads: PyTree, state: AdamState, params: PyTree = None) -> tuple[PyTree, AdamState]:
        count = state.count + 1

        def decay(rate: Scalar, moment: Tensor, value: Tensor) -> Tensor:
            rate = _as(rate, moment)
            return rate * moment + (1 - rate) * value

        def direction(first: Tensor, second: Tensor) -> Tensor:
            # Multiplied by reciprocals, which are computed once: a division takes as long as ten multiplications. Each
            # estimate differs from the quotient by at most one unit in the last place.
            first = first * _one_minus_power(b1, count, first.dtype).reciprocal()
            second = second * _one_minus_power(b2, count, second.dtype).reciprocal()
            return first / (second.sqrt() + _as(eps, second))

        mu = optree.tree_map(lambda moment, grad: decay(b1, moment, grad), state.mu, grads)
        nu = optree.tree_map(lambda moment, grad: decay(b2, moment, _squared_magnitude(grad)), state.nu, grads)
        return optree.tree_map(direction, mu, nu), AdamState(count, mu, nu)

    return GradientTransformation(init, update)


def rescale_moments(state: PyTree, factors: Mapping[str, Tensor]) -> PyTree:
    """Rescales an optimizer's moments when the units of gradients change, as POP changes them.

    Where gradients become larger by a factor c, first moments become ``c m`` and second moments ``c² v``, as if all
    earlier gradients had been in the new units. `MomentumState` and `AdamState` are found anywhere in the state. Counts
    and other numbers stay as they are.

    Args:
        state: of any transformation over a flat dict of parameters.
        factors: name of a parameter to the factor of its gradient, of a shape that broadcasts with it. After POP,
            `gradient_factors` gives them.

    Returns:
        The state, with the named parameters' moments rescaled.

    Raises:
        TypeError: tensors of floats that belong to neither of the two: whether they are moments is not known.
        ValueError: a name that the moments do not have; or an infinite factor, where it can be read (on the CPU,
            outside of transforms): it makes NaN of a moment of zero. A factor that is NaN makes its moments NaN.

    >>> state = trace(0.9).init({"w": torch.ones(1), "b": torch.ones(1)})
    >>> state.trace["b"] += 3
    >>> rescale_moments(state, {"b": torch.tensor(2.0)})
    MomentumState(trace={'w': tensor([0.]), 'b': tensor([6.])})
    """
    check_factors("rescale_moments", factors)

    def scaled(moments: Mapping[str, Tensor], power: int) -> dict[str, Tensor]:
        missing = sorted(factors.keys() - moments.keys())
        if missing:
            raise ValueError(
                f"rescale_moments: `factors` must name parameters, one of {sorted(moments)}, got {missing}."
            )
        # Multiply twice: the square of a factor may overflow where the result does not.
        return {
            name: functools.reduce(torch.mul, [factors[name]] * power, moment).to(moment.dtype)
            if name in factors
            else moment
            for name, moment in moments.items()
        }

    def rescale(path: tuple[Any, ...], part: Any) -> Any:
        if isinstance(part, MomentumState):
            return MomentumState(scaled(part.trace, 1))
        if isinstance(part, AdamState):
            return AdamState(part.count, mu=scaled(part.mu, 1), nu=scaled(part.nu, 2))
        if isinstance(part, Tensor) and part.ndim and (part.is_floating_point() or part.is_complex()):
            raise TypeError(
                f"rescale_moments: `state` must be made of the states of popart_func.optim, got a tensor of shape "
                f"{tuple(part.shape)} at {list(path)} that is in none of them and may be a moment. With a learner, "
                f"pass rescale_moments=False, or build the optimizer from popart_func.optim."
            )
        return part

    return optree.tree_map_with_path(rescale, state, is_leaf=lambda part: isinstance(part, MomentumState | AdamState))


def gradient_factors(ratio: Tensor, upper: Iterable[str], lower: Iterable[str] = ()) -> dict[str, Tensor]:
    """The factors by which POP changes the gradients of a loss in normalized units, ``½ (n − (y − μ)/σ)²``.

    With ``r = σ/σ'``, every error becomes r times as large, and so do the gradients of the head, row by row. Gradients
    below the head also pass through its weights, which POP multiplies by r: they become r² times as large. That holds
    for one statistic. With several, a gradient below the head is a sum over outputs with different ratios, and no
    factor turns the old sum into the new one.

    Args:
        ratio: σ/σ', ``[tasks]``.
        upper: the names of the head's parameters.
        lower: the names of the parameters below the head whose moments shall follow too.

    Returns:
        The factors for `rescale_moments`.

    Raises:
        ValueError: ``lower`` with several statistics; `learners.popart_learner` with ``rescale_moments="all"`` raises
            it in its first update.

    Source: derived for this library.

    >>> gradient_factors(torch.tensor([0.5]), ["head.weight", "head.bias"], ["hidden.bias"])
    {'head.weight': tensor([[0.5000]]), 'head.bias': tensor([0.5000]), 'hidden.bias': tensor(0.2500)}
    """
    lower = list(lower)
    if lower and ratio.shape[-1] != 1:
        raise ValueError(
            f"gradient_factors: `lower` can be rescaled with one statistic only, got {ratio.shape[-1]}: a gradient "
            f"below the head is a sum over outputs, each with a ratio of its own."
        )
    factors = {name: ratio[..., None] if name.endswith("weight") else ratio for name in upper}
    # 0-d, so that it broadcasts with a parameter of any shape.
    return factors | {name: ratio.squeeze(-1).square() for name in lower}


def _squared_magnitude(grad: Tensor) -> Tensor:
    """``|g|²``, a real tensor."""
    return grad.real.square() + grad.imag.square() if grad.is_complex() else grad.square()


def _zero_count(params: PyTree) -> Tensor:
    leaves = optree.tree_leaves(params)
    return torch.zeros((), dtype=torch.int32, device=leaves[0].device if leaves else None)


def _as(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _one_minus_power(rate: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 − rate^count`` without cancellation: in float32 the plain form is off by 1e-5 for a rate of 0.999."""
    if isinstance(rate, Tensor):
        return -torch.expm1(count.to(dtype) * rate.to(dtype).log())
    return -torch.expm1(count.to(dtype) * (math.log(rate) if rate > 0 else -math.inf))


def _check_adam(caller: str, b1: Scalar, b2: Scalar, eps: Scalar) -> None:
    check_scalar(caller, "b1", b1, least=0, below=1)
    check_scalar(caller, "b2", b2, least=0, below=1)
    check_scalar(caller, "eps", eps, least=0)


def _check_rate(caller: str, rate: Rate) -> None:
    if not callable(rate):
        check_scalar(caller, "learning_rate", rate, least=0)
