"""Targets and advantages of a rollout: generalized advantages, and V-trace for actions that an older policy took.

Both work backward through time. A state behind a terminated one is worth 0, by ``discount`` 0; behind one that a time
limit truncated it is bootstrapped from ``following``. ``goes_on`` is 0 behind both, where another episode begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popart_func.engines import scan

__all__ = ["Estimates", "generalized_advantages", "v_trace"]


class Estimates(NamedTuple):
    """What a critic and a policy learn from, ``[time]`` each, in the rewards' units.

    Attributes:
        targets: of the values.
        advantages: of the actions.
    """

    targets: Tensor
    advantages: Tensor


def generalized_advantages(
    reward: Tensor, discount: Tensor, goes_on: Tensor, value: Tensor, following: Tensor, trace: float | Tensor
) -> Estimates:
    """Generalized advantage estimation, ``A_t = δ_t + γ λ A_{t+1}``, and the targets ``A_t + V(s_t)``.

    Args:
        reward: ``[time]``, as all of these.
        discount: γ, or 0 behind a terminated state.
        goes_on: 1, or 0 where the episode ends.
        value: of the states.
        following: the values of the states behind them.
        trace: λ.

    Source: Schulman et al., *High-dimensional continuous control using generalized advantage estimation* (2016).
    """
    advantages = _backward(reward + discount * following - value, trace * discount * goes_on)
    return Estimates(advantages + value, advantages)


def v_trace(
    reward: Tensor,
    discount: Tensor,
    goes_on: Tensor,
    value: Tensor,
    following: Tensor,
    ratio: Tensor,
    trace: float | Tensor,
) -> Estimates:
    """V-trace: targets and advantages of a policy whose probabilities differ from those that acted.

    Args:
        reward: ``[time]``, as all of these.
        discount: γ, or 0 behind a terminated state.
        goes_on: 1, or 0 where the episode ends.
        value: of the states.
        following: the values of the states behind them.
        ratio: π(a|s) / μ(a|s) of the policy π that learns and the policy μ that acted; clipped at 1.
        trace: λ.

    Source: Espeholt et al., *IMPALA* (2018), with the λ of `rlax.vtrace_td_error_and_advantage`.
    """
    clipped = ratio.clamp(max=1)
    errors = _backward(clipped * (reward + discount * following - value), trace * clipped * discount * goes_on)
    targets = value + errors
    # The last state has no target behind it, and neither has the end of an episode.
    has_next = torch.cat([goes_on[:-1], torch.zeros_like(goes_on[-1:])])
    later = torch.cat([targets[1:], targets[-1:]])
    bootstrap = following + trace * has_next * (later - following)
    return Estimates(targets, clipped * (reward + discount * bootstrap - value))


def _backward(errors: Tensor, decay: Tensor) -> Tensor:
    """``x_t = errors_t + decay_t x_{t+1}``, from the last one on."""

    def step(later: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        error, decay = now
        total = error + decay * later
        return total, total

    sums: Tensor = scan(step, torch.zeros_like(errors[0]), (errors, decay), reverse=True)[1]
    return sums
