"""Distributions over counts: geometric and Poisson.

JAX draws Poisson numbers in rounds until all are done. Here there are always `ROUNDS` of them. **A number that they do
not suffice for is −1**: less than one in 10¹⁰.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popart_func._typing import Integer, Num
from popart_func._xla import log, log1p
from popart_func.random import keys
from popart_func.random._arguments import check_dtype, check_key, parameters
from popart_func.random.basic import uniform
from popart_func.random.continuous import divide

__all__ = ["geometric", "poisson"]

ROUNDS = 48
"""How many uniform numbers are drawn for one Poisson number, which must be less."""


def geometric(
    key: Integer[Tensor, "2"],
    p: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Integer[Tensor, "..."]:
    """How many trials of probability p the first success takes, from 1 on, int32: `jax.random.geometric`.

    >>> geometric(keys.key(0), 0.5, (3,))
    tensor([1, 1, 2], dtype=torch.int32)
    """
    check_key("geometric", key)
    check_dtype("geometric", dtype, torch.int32)
    shape, (p,) = parameters("geometric", key, shape, p=p)
    u = uniform(key, shape)
    return (torch.floor(divide(log(torch.where(u == 0, 1.0, u)), log1p(-p))) + 1).to(torch.int32)


def poisson(
    key: Integer[Tensor, "2"],
    lam: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Integer[Tensor, "..."]:
    """Poisson numbers of a rate below 10, int32: `jax.random.poisson`, by Knuth's algorithm.

    Args:
        key: the key.
        lam: the rate, from 0 to below 10. In a tensor, other rates give −1.
        shape: the result's, to which ``lam`` broadcasts.
        dtype: int32.

    Raises:
        ValueError: a number from 10 on, or negative. From 10 on JAX rejects candidates by a test that the last bits of
            its ``lgamma`` decide.

    >>> poisson(keys.key(0), 3.0, (3,))
    tensor([0, 0, 4], dtype=torch.int32)
    """
    check_key("poisson", key)
    check_dtype("poisson", dtype, torch.int32)
    if isinstance(lam, int | float) and not 0 <= lam < 10:
        raise ValueError(f"poisson: `lam` must be at least 0 and below 10, got {lam}.")
    shape, (lam,) = parameters("poisson", key, shape, lam=lam)
    total = torch.zeros(shape, device=key.device)
    count = torch.full(shape, -1, dtype=torch.int32, device=key.device)
    for _ in range(ROUNDS):
        key, now = keys.split(key)
        count = count + (total > -lam)
        total = total + log(uniform(now, shape))
    is_drawn = (lam > 0) & (lam < 10) & (total <= -lam)
    return torch.where(lam == 0, 0, torch.where(is_drawn, count, -1))
