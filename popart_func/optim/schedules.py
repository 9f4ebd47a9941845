"""Schedules: a rate that depends on the number of updates so far, a 0-d integer tensor. The names are optax's.

All numbers may be 0-d tensors, so that each lane can have its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from popart_func._checks import check_scalar
from popart_func._typing import Scalar

__all__ = ["Schedule", "cosine_decay_schedule", "linear_schedule", "warmup_cosine_decay_schedule"]

Schedule = Callable[[Tensor], Tensor]
"""``schedule(count)`` -> a 0-d tensor."""


def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: Scalar, transition_begin: Scalar = 0
) -> Schedule:
    """From ``init_value`` in a line to ``end_value``, in ``transition_steps`` updates after ``transition_begin``.

    >>> linear_schedule(1.0, 0.0, 4)(torch.tensor(1))
    tensor(0.7500)
    """
    check_scalar("linear_schedule", "transition_steps", transition_steps, above=0)

    def schedule(count: Tensor) -> Tensor:
        done = _progress(count - transition_begin, transition_steps)
        return init_value + done * (end_value - init_value)

    return schedule


def cosine_decay_schedule(init_value: Scalar, decay_steps: Scalar, alpha: Scalar = 0.0) -> Schedule:
    """From ``init_value`` along half a cosine to ``alpha * init_value``, in ``decay_steps`` updates.

    Source: Loshchilov and Hutter (2017).

    >>> cosine_decay_schedule(1.0, 4)(torch.tensor(2))
    tensor(0.5000)
    """
    check_scalar("cosine_decay_schedule", "decay_steps", decay_steps, above=0)

    def schedule(count: Tensor) -> Tensor:
        cosine = 0.5 * (1 + torch.cos(math.pi * _progress(count, decay_steps)))
        return init_value * ((1 - alpha) * cosine + alpha)

    return schedule


def warmup_cosine_decay_schedule(
    init_value: Scalar, peak_value: Scalar, warmup_steps: Scalar, decay_steps: Scalar, end_value: Scalar = 0.0
) -> Schedule:
    """In a line from ``init_value`` to ``peak_value`` in ``warmup_steps``, then along a cosine to ``end_value``.

    ``decay_steps`` counts the warm-up too, and is larger than ``warmup_steps``, which may be 0.

    >>> warmup_cosine_decay_schedule(0.0, 1.0, 2, 6)(torch.tensor(4))
    tensor(0.5000)
    """
    check_scalar("warmup_cosine_decay_schedule", "warmup_steps", warmup_steps, least=0)
    shortest = None if isinstance(warmup_steps, Tensor) else warmup_steps
    check_scalar("warmup_cosine_decay_schedule", "decay_steps", decay_steps, above=shortest)

    def schedule(count: Tensor) -> Tensor:
        # 0 of 0 steps would be NaN, and with it every gradient, although the decay is chosen.
        warmup = init_value + _progress(count, warmup_steps + (warmup_steps == 0)) * (peak_value - init_value)
        cosine = 0.5 * (1 + torch.cos(math.pi * _progress(count - warmup_steps, decay_steps - warmup_steps)))
        decay = end_value + (peak_value - end_value) * cosine
        return torch.where(count < warmup_steps, warmup, decay)

    return schedule


def _progress(count: Tensor, steps: Scalar) -> Tensor:
    """Which part of some steps is done, within [0, 1]; in float32 at least, for float16 counts to 2048 only."""
    return (count.to(torch.promote_types(torch.float32, torch.get_default_dtype())) / steps).clamp(0, 1)
