"""Exploration: ε-greedy actions."""

from __future__ import annotations

import torch
from torch import Tensor

from popart_func import random

__all__ = ["epsilon_greedy"]


def epsilon_greedy(key: Tensor, values: Tensor, epsilon: float | Tensor) -> Tensor:
    """The action of the largest value, or one at random with probability ``epsilon``; 0-d, int64.

    Args:
        key: what is drawn from.
        values: of the actions, ``[actions]``.
        epsilon: ε.
    """
    explore, choice = random.split(key)
    at_random = random.randint(choice, (), 0, values.shape[-1]).long()
    return torch.where(random.uniform(explore) < epsilon, at_random, values.argmax(-1))
