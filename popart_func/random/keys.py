"""Keys, as in `jax.random`: `key`, `split`, `fold_in`, and Threefry-2x32 (Salmon et al., 2011) below them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from popart_func._typing import Integer
from popart_func.random._arguments import as_shape, check_integers, check_key

__all__ = ["counters", "fold_in", "key", "shift_right", "signed", "split", "threefry"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


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
        check_integers("key", "seed", seed)
        if seed.ndim:
            raise ValueError(f"key: `seed` must be 0-d, got shape {tuple(seed.shape)}. For many seeds, use torch.vmap.")
        high = seed >> 32 if seed.dtype == torch.int64 else torch.zeros_like(seed)
        return torch.stack([high.to(torch.int32), seed.to(torch.int32)])
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"key: `seed` must be an integer or a 0-d integer tensor, got {type(seed).__name__}.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"key: `seed` must lie in [0, 2**64), got {seed}.")
    return torch.tensor([signed(seed >> 32), signed(seed & 0xFFFFFFFF)], dtype=torch.int32)


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
    check_key("split", key)
    shape = as_shape("split", (num,) if isinstance(num, int) else num)
    return torch.stack(threefry(key, *counters(shape, key)), dim=-1)


def fold_in(key: Integer[Tensor, "2"], data: int | Integer[Tensor, ""]) -> Integer[Tensor, "2"]:
    """A key for each value of a counter, such as a step: `jax.random.fold_in`.

    Args:
        key: may be used again with other counters.
        data: an integer or a 0-d integer tensor; only its lower 32 bits are used.

    >>> fold_in(key(0), 1)
    tensor([ 928981903, -841280227], dtype=torch.int32)
    """
    check_key("fold_in", key)
    if isinstance(data, Tensor):
        check_integers("fold_in", "data", data)
        low = data.to(torch.int32)
    else:
        low = torch.full((), signed(data & 0xFFFFFFFF), dtype=torch.int32, device=key.device)
    return torch.stack(threefry(key, torch.zeros_like(low), low))


def threefry(key: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011), for keys ``[..., 2]`` that broadcast to the counters.

    Addition of int32 wraps as that of uint32 does.
    """
    words = key[..., 0], key[..., 1], key[..., 0] ^ key[..., 1] ^ 0x1BD11BDA
    first, second = first + words[0], second + words[1]
    for group in range(5):
        for by in _ROTATIONS[group % 2]:
            first = first + second
            second = ((second << by) | shift_right(second, 32 - by)) ^ first
        first, second = first + words[(group + 1) % 3], second + words[(group + 2) % 3] + (group + 1)
    return first, second


def counters(shape: Sequence[int], key: Tensor) -> tuple[Tensor, Tensor]:
    """Each element's position as 64 bits: the upper and the lower 32."""
    low = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).reshape(tuple(shape))
    return torch.zeros_like(low), low


def shift_right(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right: zeros come in from the left."""
    return (words >> by) & ((1 << (32 - by)) - 1)


def signed(word: int) -> int:
    """The int32 of the same bits as an unsigned word."""
    return word - 2**32 if word >= 2**31 else word
