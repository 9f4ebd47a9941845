"""Optimizers against their formulas, which take all gradients at once: no recursions, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func import optim
from popart_func.optim import GradientTransformation
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, sides, worst

__all__ = ["ADAM", "CHECKS", "MOMENTUM", "SGD", "Optimizer", "Rates"]

STEPS = 6

NUMBERS = {"b1": 0.75, "b2": 1 - 2.0**-10}
"""Decays that are Python's numbers, which the library takes another way; every dtype has them to the bit."""

Rates = Mapping[str, Tensor]
"""``learning_rate``, ``momentum``, ``b1``, ``b2``, ``eps``."""


class Optimizer(NamedTuple):
    """An optimizer, twice.

    Attributes:
        make: the library's, from rates.
        rule: ``(the gradients of one parameter so far, rates) -> update``.
        roundings: of the library's update after some steps, relative to the rule's of absolute values.
    """

    make: Callable[[Rates], GradientTransformation]
    rule: Callable[[list[Tensor], Rates], Tensor]
    roundings: Callable[[int], int]


def _sgd_rule(history: list[Tensor], rates: Rates) -> Tensor:
    return -rates["learning_rate"] * history[-1]


def _scheduled_rule(history: list[Tensor], rates: Rates) -> Tensor:
    return -rates["learning_rate"] / len(history) * history[-1]


def _momentum_rule(history: list[Tensor], rates: Rates) -> Tensor:
    return -rates["learning_rate"] * _weighted_sum(rates["momentum"], history)


def _nesterov_rule(history: list[Tensor], rates: Rates) -> Tensor:
    look_ahead = history[-1] + rates["momentum"] * _weighted_sum(rates["momentum"], history)
    return -rates["learning_rate"] * look_ahead


def _adam_rule(history: list[Tensor], rates: Rates) -> Tensor:
    first = _weighted_mean(rates["b1"], history)
    second = _weighted_mean(rates["b2"], [gradient.square() for gradient in history])
    return -rates["learning_rate"] * first / (second.sqrt() + rates["eps"])


def _adam_rule_of_numbers(history: list[Tensor], rates: Rates) -> Tensor:
    decays = {name: torch.full_like(rates[name], decay) for name, decay in NUMBERS.items()}
    return _adam_rule(history, {**rates, **decays})


def _weighted_sum(decay: Tensor, values: list[Tensor]) -> Tensor:
    ages = torch.arange(len(values) - 1, -1, -1, device=decay.device)
    return torch.tensordot(decay**ages, torch.stack(values), dims=1)


def _weighted_mean(decay: Tensor, values: list[Tensor]) -> Tensor:
    return _weighted_sum(decay, values) / _weighted_sum(decay, [torch.ones_like(decay)] * len(values))


def _adam_roundings(steps: int) -> int:
    """A moment's oldest gradient is decayed and added to at each step; 1 − b and its product come first.

    ``1 − bᵗ`` has two in its logarithm and in expm1 each, and a product; then the quotient. The second moment has a
    square as well, and its root halves what went before; root, sum with ε, quotient. Last the learning rate.
    """
    moment, bias = 2 * steps + 2, 6
    second = (moment + 1 + bias + 1) // 2 + 3
    return moment + bias + second + 1


SGD = Optimizer(lambda rates: optim.sgd(rates["learning_rate"]), _sgd_rule, lambda steps: 1)
SCHEDULED = Optimizer(
    lambda rates: optim.sgd(lambda count: rates["learning_rate"] / (1 + count)), _scheduled_rule, lambda steps: 2
)
MOMENTUM = Optimizer(
    lambda rates: optim.sgd(rates["learning_rate"], momentum=rates["momentum"]),
    _momentum_rule,
    lambda steps: 2 * steps + 1,  # a product and a sum at each step, then the learning rate
)
NESTEROV = Optimizer(
    lambda rates: optim.sgd(rates["learning_rate"], momentum=rates["momentum"], nesterov=True),
    _nesterov_rule,
    lambda steps: 2 * (steps + 1) + 1,
)
ADAM = Optimizer(
    lambda rates: optim.adam(rates["learning_rate"], rates["b1"], rates["b2"], rates["eps"]),
    _adam_rule,
    _adam_roundings,
)
ADAM_OF_NUMBERS = Optimizer(
    lambda rates: optim.adam(rates["learning_rate"], **NUMBERS, eps=rates["eps"]),
    _adam_rule_of_numbers,
    _adam_roundings,
)


def updates_are_formulas(key: Tensor, settings: Settings) -> Discrepancy:
    """The first update and the last, for gradients of any magnitude, decays near 1 and an ε that may vanish."""
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
            count = sides(dtype) * optimizer.roundings(time + 1)
            parts.append(compare(got, expected, terms, count, dtype))
    return worst(*parts)


CHECKS = (
    Check(
        "optimizers",
        "SGD, a schedule, momentum, Nesterov and Adam = their formulas",
        "README",
        updates_are_formulas,
        architectures=(0,),
    ),
)
