"""Checks of optimizers against formulas that take all gradients at once, without recursion, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from popart_func import optim
from popart_func.optim import GradientTransformation
from popart_func.tree import PyTree
from popart_func.verify import draw
from popart_func.verify.check import Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare, rounding_sides, worst

__all__ = ["ADAM", "CHECKS", "MOMENTUM", "SGD", "OptimizerCase", "Rates"]

STEPS = 6

NUMBERS = {"b1": 0.75, "b2": 1 - 2.0**-10}
"""Decays as Python numbers, which the library treats differently from tensors; both dtypes hold them exactly."""

Rates = Mapping[str, Tensor]
"""``learning_rate``, ``momentum``, ``b1``, ``b2``, ``eps``."""


class OptimizerCase(NamedTuple):
    """One of the library's optimizers and its formula.

    Attributes:
        make: makes the library's optimizer from rates.
        rule: the formula: ``(all gradients of one parameter so far, rates) -> update``.
        roundings: the roundings in the library's update after some steps, relative to the rule of absolute values.
        moments: ``(all gradients of one parameter so far, rates) -> moments``, those that the optimizer's state keeps.
    """

    make: Callable[[Rates], GradientTransformation]
    rule: Callable[[list[Tensor], Rates], Tensor]
    roundings: Callable[[int], int]
    moments: Callable[[list[Tensor], Rates], list[Tensor]] = lambda history, rates: []


def _nesterov_rule(history: list[Tensor], rates: Rates) -> Tensor:
    look_ahead = history[-1] + rates["momentum"] * _weighted_sum(rates["momentum"], history)
    return -rates["learning_rate"] * look_ahead


def _adam_rule(history: list[Tensor], rates: Rates) -> Tensor:
    first = _weighted_mean(rates["b1"], history)
    second = _weighted_mean(rates["b2"], [gradient.square() for gradient in history])
    return -rates["learning_rate"] * first / (second.sqrt() + rates["eps"])


def _adam_moments(history: list[Tensor], rates: Rates) -> list[Tensor]:
    squares = [gradient.square() for gradient in history]
    return [
        (1 - decay) * _weighted_sum(decay, values) for decay, values in ((rates["b1"], history), (rates["b2"], squares))
    ]


def _with_numbers(rates: Rates) -> Rates:
    return {**rates, **{name: torch.full_like(rates[name], decay) for name, decay in NUMBERS.items()}}


def _weighted_sum(decay: Tensor, values: list[Tensor]) -> Tensor:
    """``Σ decayⁿ v``, where n is the age of a value."""
    ages = torch.arange(len(values) - 1, -1, -1, device=decay.device)
    return torch.tensordot(decay**ages, torch.stack(values), dims=1)


def _weighted_mean(decay: Tensor, values: list[Tensor]) -> Tensor:
    return _weighted_sum(decay, values) / _weighted_sum(decay, [torch.ones_like(decay)] * len(values))


def _adam_roundings(steps: int) -> int:
    """The roundings in Adam's update.

    - A moment: 1 − b and its product, then a product and a sum at each step for the oldest gradient.
    - Bias correction: two roundings each in the logarithm and in expm1 of ``1 − bᵗ``, a product and the quotient.
    - The second moment also has a square. Its root halves the roundings so far. Root, sum with ε and quotient follow.
    - The learning rate: one.
    """
    moment, bias = 2 * steps + 2, 6
    second = (moment + 1 + bias + 1) // 2 + 3
    return moment + bias + second + 1


SGD = OptimizerCase(
    lambda rates: optim.sgd(rates["learning_rate"]),
    lambda history, rates: -rates["learning_rate"] * history[-1],
    lambda steps: 1,
)
SCHEDULED = OptimizerCase(
    lambda rates: optim.sgd(lambda count: rates["learning_rate"] / (1 + count)),
    lambda history, rates: -rates["learning_rate"] / len(history) * history[-1],
    lambda steps: 2,
)
MOMENTUM = OptimizerCase(
    lambda rates: optim.sgd(rates["learning_rate"], momentum=rates["momentum"]),
    lambda history, rates: -rates["learning_rate"] * _weighted_sum(rates["momentum"], history),
    lambda steps: 2 * steps + 1,  # a product and a sum at each step, then the learning rate
    lambda history, rates: [_weighted_sum(rates["momentum"], history)],
)
NESTEROV = OptimizerCase(
    lambda rates: optim.sgd(rates["learning_rate"], momentum=rates["momentum"], nesterov=True),
    _nesterov_rule,
    lambda steps: 2 * (steps + 1) + 1,
    MOMENTUM.moments,
)
ADAM = OptimizerCase(
    lambda rates: optim.adam(rates["learning_rate"], rates["b1"], rates["b2"], rates["eps"]),
    _adam_rule,
    _adam_roundings,
    _adam_moments,
)
ADAM_OF_NUMBERS = OptimizerCase(
    lambda rates: optim.adam(rates["learning_rate"], **NUMBERS, eps=rates["eps"]),
    lambda history, rates: _adam_rule(history, _with_numbers(rates)),
    _adam_roundings,
    lambda history, rates: _adam_moments(history, _with_numbers(rates)),
)


@check("SGD, a schedule, momentum, Nesterov, Adam, and their states = formulas", "README", architectures=(0,))
def optimizers(key: Tensor, settings: Settings) -> Discrepancy:
    """The first and the last update equal the formulas, for gradients of any magnitude, decays near 1 and a tiny ε.

    So do the moments in the state, and each count is the number of updates.
    """
    dtype = settings.dtype
    numbers = draw.uniforms(key, dtype, weight=(STEPS, 3, 2), bias=(STEPS, 3), magnitude=(), rates=(5,))
    magnitude, rates = draw.magnitude(numbers["magnitude"]), numbers["rates"].unbind()
    gradients = {name: magnitude * (draw.normal(numbers[name]) + 0.2) for name in ("weight", "bias")}
    drawn = {
        "learning_rate": draw.log_between(1e-4, 1, rates[0]),
        "momentum": draw.between(0.1, 0.99, rates[1]),
        "b1": 1 - draw.log_between(1e-2, 0.5, rates[2]),
        "b2": 1 - draw.log_between(1e-5, 0.2, rates[3]),
        "eps": magnitude * draw.log_between(1e-8, 1, rates[4]),
    }
    wide = {name: rate.double() for name, rate in drawn.items()}
    parts = []
    for optimizer in (SGD, SCHEDULED, MOMENTUM, NESTEROV, ADAM, ADAM_OF_NUMBERS):
        init, update = optimizer.make(drawn)
        state = init({name: value[0] for name, value in gradients.items()})
        for time in range(STEPS):
            got, state = update({name: value[time] for name, value in gradients.items()}, state)
            if time not in (0, STEPS - 1):
                continue
            history = {name: list(value[: time + 1].double()) for name, value in gradients.items()}
            expected = {name: optimizer.rule(past, wide) for name, past in history.items()}
            terms = {name: optimizer.rule([g.abs() for g in past], wide).abs() for name, past in history.items()}
            count = rounding_sides(dtype) * optimizer.roundings(time + 1)
            parts.append(compare(got, expected, terms, count, dtype))
            parts += _compare_states(optimizer, state, history, wide, dtype)
    return worst(*parts)


def _compare_states(
    optimizer: OptimizerCase, state: PyTree, history: dict[str, list[Tensor]], rates: Rates, dtype: torch.dtype
) -> list[Discrepancy]:
    """The discrepancies of the moments and of the counts in an optimizer's state."""
    leaves: list[Tensor] = optree.tree_leaves(state)
    steps = len(history["weight"])
    counts = [leaf for leaf in leaves if not leaf.is_floating_point()]
    expected, terms = (
        [
            moment
            for moments in zip(*(optimizer.moments(past[name], rates) for name in sorted(past)), strict=True)
            for moment in moments
        ]
        for past in (history, {name: [g.abs() for g in past] for name, past in history.items()})
    )
    got = [leaf for leaf in leaves if leaf.is_floating_point()]
    found = [compare(got, expected, terms, rounding_sides(dtype) * (2 * steps + 3), dtype)] if got else []
    return [*found, compare(counts, [torch.full_like(one, steps) for one in counts], counts, 0, dtype)]


CHECKS = (optimizers,)
