"""Distributions over counts: geometric, Poisson, binomial, multinomial.

JAX draws Poisson and binomial numbers in rounds until all are done. Here there are always `ROUNDS` of them, or
`CANDIDATES` where numbers are accepted or not. **A number for which they do not suffice is −1, or NaN where the result
has floats**: less than one in 10¹⁰.

Candidates are accepted by a test of float32 logarithms, whose last bits XLA rounds in its own way: one number in 10⁴
(one in 500 at a rate of 10⁵) may be another one than JAX's. Each count of `multinomial` depends on the ones before it,
so that more of them are: about one in 1000 at n = 200.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from popart_func._typing import Float, Integer, Num
from popart_func._xla import lgamma, log, log1p, multiply_add, sqrt
from popart_func.random import keys
from popart_func.random._arguments import as_shape, check_draw, parameters
from popart_func.random.basic import uniform
from popart_func.random.continuous import divide

__all__ = ["binomial", "geometric", "multinomial", "poisson"]

ROUNDS = 48
"""How many uniform numbers are drawn for one number of a mean up to 10, which must be less."""

CANDIDATES = 24
"""How many candidates are drawn for one number of a greater mean. About three quarters of candidates are accepted."""

_STIRLING = (
    *(0.0810614667953272, 0.0413406959554092, 0.0276779256849983, 0.02079067210376509, 0.0166446911898211),
    *(0.0138761288230707, 0.0118967099458917, 0.0104112652619720, 0.00925546218271273, 0.00833056343336287),
)
"""What Stirling's formula lacks of the logarithm of a factorial, for 0 to 9."""


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
    check_draw("geometric", key, dtype, torch.int32)
    shape, (p,) = parameters("geometric", key, shape, p=p)
    u = uniform(key, shape)
    return (torch.floor(divide(log(torch.where(u == 0, 1.0, u)), log1p(-p))) + 1).to(torch.int32)


def poisson(
    key: Integer[Tensor, "2"],
    lam: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Integer[Tensor, "..."]:
    """Poisson numbers, int32: `jax.random.poisson`.

    By Knuth's algorithm below a rate of 10; from 10 on by Hörmann, "The transformed rejection method for generating
    Poisson random variables" (1993). For a rate that is a number, only one of them is computed.

    Args:
        key: the key.
        lam: the rate, at least 0. In a tensor, negative rates and NaN give −1.
        shape: the result's, to which ``lam`` broadcasts.
        dtype: int32.

    Raises:
        ValueError: a negative number.

    >>> poisson(keys.key(0), 3.0, (3,))
    tensor([0, 0, 4], dtype=torch.int32)
    """
    check_draw("poisson", key, dtype, torch.int32)
    if isinstance(lam, int | float) and not lam >= 0:
        raise ValueError(f"poisson: `lam` must be at least 0, got {lam}.")
    is_small = lam < 10
    shape, (lam,) = parameters("poisson", key, shape, lam=lam)
    if isinstance(is_small, bool):
        drawn = (_few if is_small else _many)(key, lam, shape)
    else:
        few = _few(key, torch.where(is_small, lam, 0.0), shape)
        drawn = torch.where(is_small, few, _many(key, torch.where(is_small, 1e5, lam), shape))
    return torch.where(lam == 0, 0, torch.where(lam > 0, drawn, -1))


def binomial(
    key: Integer[Tensor, "2"],
    n: int | float | Num[Tensor, "..."],
    p: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """How many of n trials of probability p succeed, float32: `jax.random.binomial`.

    By geometric numbers up to a mean of 10, and beyond it by Hörmann, "The generation of binomial random variates"
    (1993).

    Args:
        key: the key.
        n: the number of trials. A negative one gives NaN.
        p: the probability, from 0 to 1; others give NaN.
        shape: the result's, to which ``n`` and ``p`` broadcast.
        dtype: float32.

    >>> binomial(keys.key(0), 10, 0.3, (3,))
    tensor([2., 2., 1.])
    """
    check_draw("binomial", key, dtype)
    shape, (n, p) = parameters("binomial", key, shape, n=n, p=p)
    is_below_half = p < 0.5
    rarer = torch.where(is_below_half, p, 1 - p)
    is_valid = (rarer >= 0) & (n >= 0)
    rarer = torch.where(rarer >= 0, rarer, 0.01)
    is_few = (n * rarer <= 10) | ~(n >= 0)
    trials = n.floor()
    few = _few_successes(key, torch.where(is_few, trials, 0.0), rarer, shape)
    many = _many_successes(key, torch.where(is_few, 1e4, trials), torch.where(is_few, 0.5, rarer), shape)
    drawn = torch.where(is_few, few, many)
    drawn = torch.where(n.isinf(), torch.inf, torch.where(is_below_half, drawn, trials - drawn))
    return torch.where(is_valid, drawn, math.nan)


def multinomial(
    key: Integer[Tensor, "2"],
    n: int | float | Num[Tensor, "..."],
    p: Float[Tensor, "... outcomes"],
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... outcomes"]:
    """How many of n trials have each outcome, float32: `jax.random.multinomial`, one `binomial` for each outcome.

    At n = 200, about 99.9 % of the counts are JAX's: where one `binomial` number differs, so do those after it.

    Args:
        key: the key.
        n: the number of trials, which broadcasts to the shape of ``p`` without the last axis.
        p: probabilities along the last axis.
        shape: the result's, to which ``p`` broadcasts; by default that of ``p``.
        dtype: float32.

    >>> multinomial(keys.key(0), 10, torch.tensor([0.2, 0.3, 0.5]))
    tensor([1., 1., 8.])
    """
    check_draw("multinomial", key, dtype)
    if not isinstance(p, Tensor) or not p.ndim:
        raise ValueError("multinomial: `p` must be a tensor with an axis of outcomes.")
    shape = tuple(p.shape) if shape is None else as_shape("multinomial", shape)
    _, (p,) = parameters("multinomial", key, shape, p=p)
    outcomes = p.expand(shape).unbind(-1)
    _, (left,) = parameters("multinomial", key, shape[:-1], n=n)
    left, counts = left.expand(shape[:-1]), []
    at_least = reversed(list(accumulate(reversed(outcomes))))
    for own, chance, remaining in zip(keys.split(key, shape[-1]), outcomes, at_least, strict=True):
        ratio = chance / torch.where(remaining == 0, 1.0, remaining)
        counts.append(binomial(own, left, ratio.clamp(0, 1)))
        left = left - counts[-1]
    return torch.stack(counts, -1)


def _few(key: Tensor, lam: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Poisson numbers of small rates: how many uniform numbers have a product above ``exp(−lam)``."""
    total = torch.zeros(shape, dtype=torch.float32, device=key.device)
    count = torch.full(shape, -1, dtype=torch.int32, device=key.device)
    for _ in range(ROUNDS):
        key, now = keys.split(key)
        count = count + (total > -lam)
        total = total + log(uniform(now, shape))
    return torch.where(total <= -lam, count, -1)


def _many(key: Tensor, lam: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Poisson numbers of rates from 10 on."""
    log_lam, root = log(lam), sqrt(lam)
    b = multiply_add(root, torch.full_like(root, 2.53), 0.931)
    a = multiply_add(b, torch.full_like(b, 0.02483), -0.059)
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    least = 0.9277 - 3.6224 / (b - 2)

    def candidate(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        away = 0.5 - u.abs()
        k = (multiply_add(2 * a / away + b, u, lam) + 0.43).floor()
        height = log(v * inverse_alpha / (a / (away * away) + b))
        density = multiply_add(k.clamp(min=0), log_lam, -lam) - lgamma(k.clamp(min=0) + 1)
        is_out = (k < 0) | ((away < 0.013) & (v > away))
        return ((away >= 0.07) & (v <= least)) | (~is_out & (height <= density)), k

    return _accepted(key, shape, candidate).nan_to_num(-1).to(torch.int32)


def _few_successes(key: Tensor, n: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Binomial numbers of small means: how many geometric numbers have a sum of at most n."""
    log_failure = log1p(-p)
    total = torch.zeros(shape, dtype=torch.float32, device=key.device)
    count = torch.full(shape, -1.0, dtype=torch.float32, device=key.device)
    for _ in range(ROUNDS):
        now, key = keys.split(key)
        count = count + (total <= n)
        total = total + (log(uniform(now, shape)) / log_failure).ceil()
    return torch.where(total <= n, math.nan, count)


def _many_successes(key: Tensor, n: Tensor, p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Binomial numbers of means above 10."""
    deviation = sqrt(n * p * (1 - p))
    b = multiply_add(deviation, torch.full_like(deviation, 2.53), 1.15)
    a = multiply_add(b, torch.full_like(b, 0.0248), -0.0873) + 0.01 * p
    c, least = n * p + 0.5, 0.92 - 4.2 / b
    odds, alpha = p / (1 - p), (2.83 + 5.1 / b) * deviation
    mode = ((n + 1) * p).floor()
    at_mode = log((mode + 1) / (odds * (n - mode + 1)))
    tails = _stirling_tail(mode) + _stirling_tail(n - mode)

    def candidate(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        away = 0.5 - u.abs()
        k = multiply_add(2 * a / away + b, u, c).floor()
        is_out = (k < 0) | (k > n)
        inside = torch.where(is_out, mode, k)
        height = log(v * alpha / (a / (away * away) + b))
        density = (mode + 0.5) * at_mode + (n + 1) * log((n - mode + 1) / (n - inside + 1))
        density = density + (inside + 0.5) * log(odds * (n - inside + 1) / (inside + 1))
        density = density + tails - _stirling_tail(inside) - _stirling_tail(n - inside)
        return ((away >= 0.07) & (v <= least)) | (~is_out & (height <= density)), k

    return _accepted(key, shape, candidate)


def _accepted(
    key: Tensor, shape: tuple[int, ...], candidate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """For each number the last candidate of the first `CANDIDATES` rounds that was accepted; NaN without one.

    A number takes each further candidate that is accepted, as in JAX, as long as JAX goes on: until all have one.
    """
    result = torch.full(shape, math.nan, dtype=torch.float32, device=key.device)
    for _ in range(CANDIDATES):
        key, first, second = keys.split(key, 3)
        is_accepted, k = candidate(uniform(first, shape) - 0.5, uniform(second, shape))
        goes_on = result.isnan().any()
        result = torch.where(is_accepted & goes_on, k, result)
    return result


def _stirling_tail(k: Tensor) -> Tensor:
    """What Stirling's formula lacks of the logarithm of k!."""
    table = torch.tensor(_STIRLING, dtype=torch.float32, device=k.device)
    square = (k + 1) * (k + 1)
    far = (1 / 12 - (1 / 360 - 1 / 1260 / square) / square) / (k + 1)
    return torch.where(k <= 9, table[k.clamp(0, 9).long()], far)
