"""Random numbers without state: the keys and draws of `jax.random`, to the bit, in plain PyTorch operations.

A key is an int32 tensor ``[2]``: the two 32-bit words of JAX's threefry key (`jax.random.key_data` has them as uint32).
The same key gives the same numbers as in JAX 0.5 and newer (`jax_threefry_partitionable`). Draws that round floats
(`uniform` between other bounds than 0 and 1, `normal`, `categorical`) have the bits that XLA computes on CPUs; XLA on
another device may differ in the last bits. Inside `interop.jax.to_jax_function` XLA itself computes them.

Every draw is a pure function of its key. It works under `torch.vmap` (lane *i* gets what seed *i* gets alone), under
`torch.compile`, in a traced step and on every engine.

Use a key once: `split` it, or `fold_in` a counter.

>>> action, noise = split(key(0))
>>> randint(action, (3,), 0, 10)
tensor([1, 1, 7], dtype=torch.int32)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func._typing import Float, Integer, Num, Scalar, Shaped
from popart_func._xla import erfinv, float32, log, multiply_add

__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "uniform",
]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_LEAST = -(2**31)
_BELOW_ONE = 1 - 2**-24
_TINY = 2.0**-126


def key(seed: int | Integer[Tensor, ""]) -> Integer[Tensor, "2"]:
    """The key of a seed: `jax.random.key`.

    Args:
        seed: from 0 to 2**64 − 1, or a 0-d integer tensor. From 2**32 on JAX gives the same key only with x64 enabled.

    Raises:
        TypeError: not an integer.
        ValueError: out of range, or not 0-d.

    >>> key(42)
    tensor([ 0, 42], dtype=torch.int32)
    """
    if isinstance(seed, Tensor):
        _check_integers("key", "seed", seed)
        if seed.ndim:
            raise ValueError(f"key: `seed` must be 0-d, got shape {tuple(seed.shape)}. For many seeds, use torch.vmap.")
        high = seed >> 32 if seed.dtype == torch.int64 else torch.zeros_like(seed)
        return torch.stack([high.to(torch.int32), seed.to(torch.int32)])
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"key: `seed` must be an integer or a 0-d integer tensor, got {type(seed).__name__}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"key: `seed` must lie in [0, 2**64), got {seed}.")
    return torch.tensor([_signed(seed >> 32), _signed(seed & 0xFFFFFFFF)], dtype=torch.int32)


def split(key: Integer[Tensor, "2"], num: int | Sequence[int] = 2) -> Integer[Tensor, "*num 2"]:
    """Splits a key into independent keys: `jax.random.split`.

    Args:
        key: don't use it again.
        num: how many, or the shape of an array of them.

    Returns:
        Keys ``[*num, 2]``.

    >>> split(key(0), 3).shape
    torch.Size([3, 2])
    """
    _check_key("split", key)
    shape = _as_shape("split", (num,) if isinstance(num, int) else num)
    return torch.stack(_threefry(key, *_counters(shape, key)), dim=-1)


def fold_in(key: Integer[Tensor, "2"], data: int | Integer[Tensor, ""]) -> Integer[Tensor, "2"]:
    """A key for each value of a counter, such as a step: `jax.random.fold_in`.

    Args:
        key: may be used again with other counters.
        data: an integer or a 0-d integer tensor; only its lower 32 bits are used.

    >>> fold_in(key(0), 1)
    tensor([ 928981903, -841280227], dtype=torch.int32)
    """
    _check_key("fold_in", key)
    if isinstance(data, Tensor):
        _check_integers("fold_in", "data", data)
        low = data.to(torch.int32)
    else:
        low = torch.full((), _signed(data & 0xFFFFFFFF), dtype=torch.int32, device=key.device)
    return torch.stack(_threefry(key, torch.zeros_like(low), low))


def bits(key: Integer[Tensor, "2"], shape: Sequence[int] = ()) -> Integer[Tensor, "..."]:
    """32 random bits per element, as int32: the bits of `jax.random.bits` with its dtype uint32.

    >>> bits(key(0), (2,))
    tensor([-224768089,  -91998574], dtype=torch.int32)
    """
    _check_key("bits", key)
    first, second = _threefry(key, *_counters(_as_shape("bits", shape), key))
    return first ^ second


def uniform(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), minval: Scalar = 0.0, maxval: Scalar = 1.0
) -> Float[Tensor, "..."]:
    """Uniform numbers in ``[minval, maxval)``, float32, 2²³ equidistant values: `jax.random.uniform`.

    >>> uniform(key(0), (2,))
    tensor([0.9477, 0.9786])
    """
    _check_key("uniform", key)
    units = _units(bits(key, shape))
    if isinstance(minval, int | float) and isinstance(maxval, int | float):
        if (minval, maxval) == (0, 1):
            return units
        low = float32(minval)
        return multiply_add(units, float32(float32(maxval) - low), low).clamp(min=low)
    low_end, high_end = (torch.as_tensor(end, dtype=torch.float32, device=key.device) for end in (minval, maxval))
    return torch.maximum(multiply_add(units, high_end - low_end, low_end), low_end)


def normal(key: Integer[Tensor, "2"], shape: Sequence[int] = ()) -> Float[Tensor, "..."]:
    """Standard normal numbers, float32: `jax.random.normal`, ``√2 erf⁻¹(u)``.

    >>> normal(key(0), (2,))
    tensor([1.6226, 2.0253])
    """
    _check_key("normal", key)
    return erfinv(uniform(key, shape, -_BELOW_ONE, 1.0)) * math.sqrt(2)


def randint(
    key: Integer[Tensor, "2"],
    shape: Sequence[int],
    minval: int | Integer[Tensor, "..."],
    maxval: int | Integer[Tensor, "..."],
) -> Integer[Tensor, "..."]:
    """Uniform integers in ``[minval, maxval)``, int32: `jax.random.randint`. An empty range gives ``minval``.

    Args:
        key: the key.
        shape: the result's shape, to which the bounds broadcast.
        minval: least, within int32.
        maxval: one more than the greatest, at most 2**31 − 1.

    >>> randint(key(0), (4,), 0, 6)
    tensor([1, 0, 2, 1], dtype=torch.int32)
    """
    _check_key("randint", key)
    shape = _as_shape("randint", shape)
    first, second = split(key)
    low, span, power = _range(minval, maxval, shape, key)
    offset = _modulo(bits(first, shape), span) * power + _modulo(bits(second, shape), span)
    return _modulo(offset, span) + low


def bernoulli(
    key: Integer[Tensor, "2"], p: int | float | Float[Tensor, "..."] = 0.5, shape: Sequence[int] | None = None
) -> Shaped[Tensor, "..."]:
    """True with probability p: `jax.random.bernoulli`.

    Args:
        key: the key.
        p: a number or a tensor of probabilities.
        shape: the result's, to which ``p`` broadcasts; by default the shape of ``p``.

    >>> bernoulli(key(0), 0.9, (3,))
    tensor([False, False,  True])
    """
    _check_key("bernoulli", key)
    if not isinstance(p, Tensor):
        return uniform(key, shape or ()) < float32(p)
    return uniform(key, p.shape if shape is None else shape) < p.to(torch.float32)


def categorical(
    key: Integer[Tensor, "2"], logits: Float[Tensor, "..."], axis: int = -1, shape: Sequence[int] | None = None
) -> Integer[Tensor, "..."]:
    """Indices drawn with probabilities ``softmax(logits)``, int64: `jax.random.categorical` (Gumbel's trick).

    Args:
        key: the key.
        logits: unnormalized log probabilities, float32. For other dtypes the draw is float32 too, while JAX draws in
            their dtype and gets other numbers.
        axis: the axis of the categories.
        shape: the result's shape. It must end in the shape of ``logits`` without the axis, which is the default.

    Raises:
        ValueError: ``shape`` does not end in the shape of ``logits`` without the axis.

    >>> categorical(key(0), torch.tensor([0.0, 10.0, 0.0]), shape=(3,))
    tensor([1, 1, 1])
    """
    _check_key("categorical", key)
    axis = axis if axis < 0 else axis - logits.ndim
    batch = [size for position, size in enumerate(logits.shape) if position != axis + logits.ndim]
    shape = batch if shape is None else list(_as_shape("categorical", shape))
    if shape[len(shape) - len(batch) :] != batch:
        raise ValueError(f"categorical: `shape` must end in {tuple(batch)}, got {tuple(shape)}.")
    place = len(shape) + 1 + axis
    drawn = uniform(key, [*shape[:place], logits.shape[axis], *shape[place:]], _TINY, 1.0)
    return torch.argmax(logits - log(-log(drawn)), dim=axis)


def permutation(key: Integer[Tensor, "2"], x: int | Num[Tensor, "..."], axis: int = 0) -> Num[Tensor, "..."]:
    """The elements along an axis in random order: `jax.random.permutation`.

    Args:
        key: the key.
        x: a tensor, or a number n for the integers ``0 .. n − 1`` (int64).
        axis: the axis that is permuted; slices move as a whole.

    >>> permutation(key(0), 5)
    tensor([0, 1, 4, 3, 2])
    """
    _check_key("permutation", key)
    if isinstance(x, Tensor) and not x.ndim:
        raise ValueError("permutation: `x` must be an integer or a tensor with an axis, got a 0-d tensor.")
    size = x.shape[axis] if isinstance(x, Tensor) else x
    order = torch.arange(size, device=key.device)
    for _ in range(math.ceil(3 * math.log(max(1, size)) / math.log(2**32 - 1))):
        key, now = split(key)
        order = order[torch.sort(bits(now, (size,)) ^ _LEAST, stable=True).indices]
    return x.index_select(axis, order) if isinstance(x, Tensor) else order


def _threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011). Addition of int32 wraps as that of uint32 does."""
    words = key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA
    first, second = first + words[0], second + words[1]
    for group in range(5):
        for by in _ROTATIONS[group % 2]:
            first = first + second
            second = ((second << by) | _shift_right(second, 32 - by)) ^ first
        first, second = first + words[(group + 1) % 3], second + words[(group + 2) % 3] + (group + 1)
    return first, second


def _counters(shape: Sequence[int], key: Tensor) -> tuple[Tensor, Tensor]:
    """Each element's position as 64 bits: the upper and the lower 32."""
    low = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).reshape(tuple(shape))
    return torch.zeros_like(low), low


def _units(words: Tensor) -> Tensor:
    """The upper 23 bits as a number in [0, 1)."""
    return _shift_right(words, 9).to(torch.float32) * 2.0**-23


def _shift_right(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right: zeros come in from the left."""
    return (words >> by) & ((1 << (32 - by)) - 1)


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
        return _modulo_large(words, _signed(span)) if span >= 2**31 else _modulo_small(words, span)
    small = _modulo_small(words, torch.where(span > 0, span, 1))
    return torch.where(span > 0, small, _modulo_large(words, span))


def _modulo_small(words: Tensor, span: Any) -> Tensor:
    half = torch.div(_shift_right(words, 1), span, rounding_mode="trunc") << 1
    rest = words - half * span
    return torch.where(_below(rest, span), rest, rest - span)


def _modulo_large(words: Tensor, span: Any) -> Tensor:
    """The remainder for spans of 2³¹ and more: they go into a 32-bit word at most once."""
    return torch.where(_below(words, span), words, words - span)


def _below(first: Tensor, second: Any) -> Tensor:
    """``first < second`` as unsigned numbers."""
    return (first ^ _LEAST) < (second ^ _LEAST)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _bound(name: str, end: Any) -> Any:
    if isinstance(end, Tensor):
        _check_integers("randint", name, end)
    elif not -(2**31) <= end < 2**31:
        raise ValueError(f"randint: `{name}` must lie within int32, got {end}.")
    return end


def _check_key(caller: str, key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int32 or key.shape != (2,):
        got = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"{caller}: `key` must be one key, an int32 tensor of shape (2,), got {got}. For many, use torch.vmap."
        )


def _check_integers(caller: str, name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{caller}: `{name}` must be integers, got dtype {value.dtype}.")


def _as_shape(caller: str, shape: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"{caller}: a shape must be made of integers of at least 0, got {tuple(shape)}.")
    if math.prod(shape) >= 2**31:
        raise ValueError(f"{caller}: at most 2**31 - 1 elements can be drawn from one key, got {math.prod(shape)}.")
    return tuple(shape)
