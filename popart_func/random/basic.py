"""Bits, and the draws made of them directly: uniform and normal numbers, integers, coins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func._typing import Float, Integer, Scalar, Shaped
from popart_func._xla import erfinv, float32, multiply_add
from popart_func.random import keys
from popart_func.random._arguments import as_shape, check_draw, check_integers, check_key

__all__ = [
    "bernoulli",
    "bits",
    "normal",
    "rademacher",
    "randint",
    "scaled_normal",
    "to_normal",
    "to_unit",
    "uniform",
]

_LEAST = -(2**31)
_BELOW_ONE = 1 - 2**-24


def bits(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Integer[Tensor, "..."]:
    """32 random bits per element, as int32: the bits of `jax.random.bits` with its dtype uint32.

    >>> bits(keys.key(0), (2,))
    tensor([-224768089,  -91998574], dtype=torch.int32)
    """
    check_draw("bits", key, dtype, torch.int32)
    first, second = keys.threefry(key, *keys.counters(as_shape("bits", shape), key))
    return first ^ second


def uniform(
    key: Integer[Tensor, "2"],
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    minval: Scalar | Float[Tensor, "..."] = 0.0,
    maxval: Scalar | Float[Tensor, "..."] = 1.0,
) -> Float[Tensor, "..."]:
    """Uniform numbers in ``[minval, maxval)``, float32, 2²³ equidistant values: `jax.random.uniform`.

    Args:
        key: the key.
        shape: the result's, to which the bounds broadcast.
        dtype: float32.
        minval: a number or a tensor.
        maxval: likewise.

    >>> uniform(keys.key(0), (2,))
    tensor([0.9477, 0.9786])
    """
    check_draw("uniform", key, dtype)
    units = to_unit(bits(key, shape))
    if isinstance(minval, int | float) and isinstance(maxval, int | float):
        if (minval, maxval) == (0, 1):
            return units
        return _between(units, float32(minval), float32(maxval))
    low_end, high_end = (torch.as_tensor(end, dtype=torch.float32, device=key.device) for end in (minval, maxval))
    return torch.maximum(multiply_add(units, high_end - low_end, low_end), low_end)


def normal(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Standard normal numbers, float32: `jax.random.normal`, ``√2 erf⁻¹(u)``.

    >>> normal(keys.key(0), (2,))
    tensor([1.6226, 2.0253])
    """
    check_draw("normal", key, dtype)
    return to_normal(to_unit(bits(key, shape)))


def randint(
    key: Integer[Tensor, "2"],
    shape: Sequence[int],
    minval: int | Integer[Tensor, "..."],
    maxval: int | Integer[Tensor, "..."],
    dtype: torch.dtype | None = None,
) -> Integer[Tensor, "..."]:
    """Uniform integers in ``[minval, maxval)``, int32: `jax.random.randint`. An empty range gives ``minval``.

    Args:
        key: the key.
        shape: the result's shape, to which the bounds broadcast.
        minval: least, within int32.
        maxval: one more than the greatest, at most 2**31 − 1.
        dtype: int32.

    >>> randint(keys.key(0), (4,), 0, 6)
    tensor([1, 0, 2, 1], dtype=torch.int32)
    """
    check_draw("randint", key, dtype, torch.int32)
    shape = as_shape("randint", shape)
    first, second = keys.split(key)
    low, span, power = _range(minval, maxval, shape, key)
    offset = _modulo(bits(first, shape), span) * power + _modulo(bits(second, shape), span)
    return _modulo(offset, span) + low


def bernoulli(
    key: Integer[Tensor, "2"],
    p: int | float | Float[Tensor, "..."] = 0.5,
    shape: Sequence[int] | None = None,
    mode: str = "low",
) -> Shaped[Tensor, "..."]:
    """True with probability p: `jax.random.bernoulli`.

    Args:
        key: the key.
        p: a number or a tensor of probabilities.
        shape: the result's, to which ``p`` broadcasts; by default the shape of ``p``.
        mode: ``"low"`` compares with 23 bits, ``"high"`` with 46, for probabilities below 2⁻²³.

    >>> bernoulli(keys.key(0), 0.9, (3,))
    tensor([False, False,  True])
    """
    check_key("bernoulli", key)
    if mode not in ("low", "high"):
        raise ValueError(f"bernoulli: `mode` must be 'low' or 'high', got {mode!r}.")
    if shape is None:
        shape = p.shape if isinstance(p, Tensor) else ()
    limit: Any = p.to(torch.float32) if isinstance(p, Tensor) else float32(p)
    if mode == "high":
        first, second = uniform(key, (2, *as_shape("bernoulli", shape)))
        return second * 2.0**-23 < limit - first
    return uniform(key, shape) < limit


def rademacher(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Integer[Tensor, "..."]:
    """1 or −1 with equal probability, int32: `jax.random.rademacher`.

    >>> rademacher(keys.key(0), (4,))
    tensor([-1, -1,  1,  1], dtype=torch.int32)
    """
    check_draw("rademacher", key, dtype, torch.int32)
    return bernoulli(key, 0.5, shape).to(torch.int32) * 2 - 1


def scaled_normal(key: Tensor, shape: Sequence[int], scale: Tensor) -> Tensor:
    """Normal numbers of mean 0. As XLA does, multiplies √2 by a scale first if that broadcasts."""
    words = bits(key, shape)
    if scale.numel() < words.numel():
        return _quantile(to_unit(words)) * (scale * math.sqrt(2))
    return to_normal(to_unit(words)) * scale


def to_unit(words: Tensor) -> Tensor:
    """The upper 23 bits as a number in [0, 1)."""
    return keys.shift_right(words, 9).to(torch.float32) * 2.0**-23


def to_normal(unit: Tensor) -> Tensor:
    """A standard normal number for each number in [0, 1)."""
    return _quantile(unit) * math.sqrt(2)


def _quantile(unit: Tensor) -> Tensor:
    """Of the normal distribution, over √2."""
    return erfinv(_between(unit, -_BELOW_ONE, 1.0))


def _between(unit: Tensor, low: float, high: float) -> Tensor:
    return multiply_add(unit, float32(high - low), low).clamp(min=low)


def _range(minval: Any, maxval: Any, shape: Sequence[int], key: Tensor) -> tuple[Any, Any, Any]:
    """The least number, how many numbers there are (the span), and 2³² modulo the span.

    Python numbers where the bounds are Python numbers: engines divide by constants fast.
    """
    low, high = (_bound(name, end) for name, end in (("minval", minval), ("maxval", maxval)))
    if isinstance(low, int) and isinstance(high, int):
        span = max(high - low, 1)
        return low, span, ((1 << 16) % span) ** 2 % 2**32 % span  # JAX squares in 32 bits, in which 2³² is 0
    low, high = (torch.as_tensor(end, dtype=torch.int32, device=key.device).expand(shape) for end in (low, high))
    spans = torch.where(high <= low, 1, high - low)
    power = _modulo(torch.full_like(spans, 1 << 16), spans)
    return low, spans, _modulo(power * power, spans)


def _modulo(words: Tensor, span: int | Tensor) -> Tensor:
    """The remainder of unsigned division, in signed arithmetic (Hacker's Delight, 9-3)."""
    if isinstance(span, int):
        return _modulo_large(words, keys.signed(span)) if span >= 2**31 else _modulo_small(words, span)
    small = _modulo_small(words, torch.where(span > 0, span, 1))
    return torch.where(span > 0, small, _modulo_large(words, span))


def _modulo_small(words: Tensor, span: Any) -> Tensor:
    half = torch.div(keys.shift_right(words, 1), span, rounding_mode="trunc") << 1
    rest = words - half * span
    return torch.where(_below(rest, span), rest, rest - span)


def _modulo_large(words: Tensor, span: Any) -> Tensor:
    """The remainder for spans of 2³¹ and more: they go into a 32-bit word at most once."""
    return torch.where(_below(words, span), words, words - span)


def _below(first: Tensor, second: Any) -> Tensor:
    """``first < second`` as unsigned numbers."""
    return (first ^ _LEAST) < (second ^ _LEAST)


def _bound(name: str, end: Any) -> Any:
    if isinstance(end, Tensor):
        check_integers("randint", name, end)
    elif not -(2**31) <= end < 2**31:
        raise ValueError(f"randint: `{name}` must lie within int32, got {end}.")
    return end
