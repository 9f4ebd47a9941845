"""Losses of learners: functions of normalized predictions and targets, value by value.

``loss(prediction, target, statistics, indices, **others)`` gives the loss of each target, in the shape of both. The
learner sums over outputs, averages over the batch with its weights, and leaves absent targets out. ``statistics`` and
``indices`` are for `pop_art.normalize`; ``others`` is what else the batch holds. A loss of your own is any such
function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func._checks import check_scalar
from popart_func._typing import Scalar
from popart_func.pop_art import PopArtState, normalize

__all__ = ["Loss", "clipped_value", "half_square", "huber", "quantile"]

Loss = Callable[..., Tensor]
"""``loss(prediction, target, statistics, indices, **others)`` -> the loss of each target."""


def half_square(prediction: Tensor, target: Tensor, *_: Any, **others: Any) -> Tensor:
    """``½ (n − ỹ)²``."""
    return 0.5 * (prediction - target).square()


def huber(delta: Scalar = 1.0) -> Loss:
    """``½ e²`` up to ``|e| = δ``, and ``δ (|e| − ½ δ)`` beyond, in normalized units.

    Source: Huber (1964); as `optax.huber_loss`.
    """
    check_scalar("huber", "delta", delta, above=0)

    def loss(prediction: Tensor, target: Tensor, *_: Any, **others: Any) -> Tensor:
        error = (prediction - target).abs()
        small = torch.minimum(error, torch.zeros_like(error) + delta)
        return small * (error - 0.5 * small)

    return loss


def quantile(quantiles: Tensor, delta: Scalar | None = None) -> Loss:
    """The pinball loss, ``|τ − 1[ỹ < n]| · |ỹ − n|``: output i learns the quantile τ_i of the targets.

    POP preserves such a head exactly. With ``delta`` the absolute value is Huber's, as in QR-DQN.

    Args:
        quantiles: τ of each output, ``[outputs]``, in (0, 1). Where every task has the same, repeat them.
        delta: where `huber` goes from a parabola to a line; None for the absolute value itself.

    Source: Koenker and Bassett (1978); Dabney et al. (2018).
    """
    of_error = None if delta is None else huber(delta)

    def loss(prediction: Tensor, target: Tensor, *_: Any, **others: Any) -> Tensor:
        error = target - prediction
        share = torch.where(error < 0, 1 - quantiles, quantiles).to(error.dtype)
        return share * (error.abs() if of_error is None else of_error(prediction, target))

    return loss


def clipped_value(epsilon: Scalar, name: str = "old_value") -> Loss:
    """PPO's clipped loss of values: ``½ max((n − ỹ)², (clip(n, o − ε, o + ε) − ỹ)²)``.

    o is an earlier prediction, unnormalized, which the batch holds under ``name``, in the shape of the targets. It is
    normalized by the present statistics, so that ε is in their units.

    Source: Schulman et al., *Proximal policy optimization* (2017), as in OpenAI's baselines.
    """
    check_scalar("clipped_value", "epsilon", epsilon, above=0)

    def loss(
        prediction: Tensor, target: Tensor, statistics: PopArtState, indices: Tensor | None = None, **others: Any
    ) -> Tensor:
        old = normalize(statistics, others[name], indices).detach()
        clipped = old + torch.maximum(torch.minimum(prediction - old, 0 * old + epsilon), 0 * old - epsilon)
        return 0.5 * torch.maximum((prediction - target).square(), (clipped - target).square())

    return loss
