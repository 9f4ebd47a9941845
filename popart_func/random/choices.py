"""Draws from a set: categories, permutations, choices with and without replacement, and Gumbel numbers for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from popart_func._typing import Float, Integer, Num
from popart_func._xla import log, log1p
from popart_func.random import keys
from popart_func.random._arguments import as_shape, check_draw, check_key
from popart_func.random.basic import bits, randint, uniform

__all__ = ["categorical", "choice", "gumbel", "permutation"]

_LEAST = -(2**31)
_TINY = 2.0**-126


def gumbel(
    key: Integer[Tensor, "2"],
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    mode: str | None = None,
) -> Float[Tensor, "..."]:
    """Standard Gumbel numbers, ``−log(−log u)``, float32: `jax.random.gumbel`.

    Args:
        key: the key.
        shape: the result's.
        dtype: float32.
        mode: ``"low"`` (the default) reaches from −4.5 to 16.6, ``"high"``, with twice as many bits, to 32. JAX's
            ``"highest"`` is not here.

    >>> gumbel(keys.key(0), (2,))
    tensor([2.9234, 3.8326])
    """
    check_draw("gumbel", key, dtype)
    return -_negative_gumbel("gumbel", key, as_shape("gumbel", shape), mode)


def categorical(
    key: Integer[Tensor, "2"],
    logits: Float[Tensor, "..."],
    axis: int = -1,
    shape: Sequence[int] | None = None,
    replace: bool = True,
    mode: str | None = None,
) -> Integer[Tensor, "..."]:
    """Indices drawn with probabilities ``softmax(logits)``, int64: `jax.random.categorical` (Gumbel's trick).

    Args:
        key: the key.
        logits: unnormalized log probabilities, float32. For other dtypes the draw is float32 too, while JAX draws in
            their dtype and gets other numbers.
        axis: the axis of the categories.
        shape: the result's shape. It must end in the shape of ``logits`` without the axis, which is the default.
        replace: False: the draws along the leading axes of ``shape`` differ.
        mode: of the Gumbel numbers, see `gumbel`.

    Raises:
        ValueError: ``shape`` does not end in the shape of ``logits`` without the axis; more draws than categories
            without replacement.

    >>> categorical(keys.key(0), torch.tensor([0.0, 10.0, 0.0]), shape=(3,))
    tensor([1, 1, 1])
    """
    check_key("categorical", key)
    axis = axis if axis < 0 else axis - logits.ndim
    batch = [size for position, size in enumerate(logits.shape) if position != axis + logits.ndim]
    shape = batch if shape is None else list(as_shape("categorical", shape))
    if shape[len(shape) - len(batch) :] != batch:
        raise ValueError(f"categorical: `shape` must end in {tuple(batch)}, got {tuple(shape)}.")
    if not replace:
        count, categories = math.prod(shape[: len(shape) - len(batch)]), logits.shape[axis]
        if count > categories:
            raise ValueError(f"categorical: can't draw {count} of {categories} categories without replacement.")
        ranks = logits - _negative_gumbel("categorical", key, logits.shape, mode)
        return _largest(ranks.movedim(axis, -1), count).movedim(-1, 0).reshape(shape)
    place = len(shape) + 1 + axis
    full = (*shape[:place], logits.shape[axis], *shape[place:])
    return torch.argmax(logits - _negative_gumbel("categorical", key, full, mode), dim=axis)


def permutation(
    key: Integer[Tensor, "2"], x: int | Num[Tensor, "..."], axis: int = 0, independent: bool = False
) -> Num[Tensor, "..."]:
    """The elements along an axis in random order: `jax.random.permutation`.

    Args:
        key: the key.
        x: a tensor, or a number n for the integers ``0 .. n − 1`` (int64).
        axis: the axis that is permuted.
        independent: False: slices move as a whole. True: each row along the axis has an order of its own.

    >>> permutation(keys.key(0), 5)
    tensor([0, 1, 4, 3, 2])
    """
    check_key("permutation", key)
    if isinstance(x, Tensor) and not x.ndim:
        raise ValueError("permutation: `x` must be an integer or a tensor with an axis, got a 0-d tensor.")
    if isinstance(x, Tensor) and independent:
        return _shuffle(key, x, axis)
    order = _shuffle(key, torch.arange(x.shape[axis] if isinstance(x, Tensor) else x, device=key.device), 0)
    return x.index_select(axis, order) if isinstance(x, Tensor) else order


def choice(
    key: Integer[Tensor, "2"],
    a: int | Num[Tensor, "..."],
    shape: Sequence[int] = (),
    replace: bool = True,
    p: Float[Tensor, "..."] | None = None,
    axis: int = 0,
    mode: str | None = None,
) -> Num[Tensor, "..."]:
    """Random elements of a tensor along an axis: `jax.random.choice`.

    Args:
        key: the key.
        a: a tensor, or a number n for the integers ``0 .. n − 1`` (int64).
        shape: of the draws, which takes the place of the axis.
        replace: may an element be drawn twice?
        p: their probabilities; equal by default. Without replacement, those of the first draw.
        axis: the axis from which slices are drawn.
        mode: of the Gumbel numbers behind draws with ``p`` without replacement, see `gumbel`.

    Raises:
        ValueError: nothing to draw from; more draws than elements without replacement; ``p`` has another shape.

    >>> choice(keys.key(0), torch.tensor([2.0, 3.0, 5.0]), (4,))
    tensor([3., 2., 5., 3.])
    """
    check_key("choice", key)
    shape = as_shape("choice", shape)
    if isinstance(a, Tensor) and not a.ndim:
        raise ValueError("choice: `a` must be an integer or a tensor with an axis, got a 0-d tensor.")
    axis = axis % a.ndim if isinstance(a, Tensor) else 0
    size, draws = a.shape[axis] if isinstance(a, Tensor) else a, math.prod(shape)
    if draws and size <= 0:
        raise ValueError("choice: `a` must have elements to draw from, got none.")
    if not replace and draws > size:
        raise ValueError(f"choice: can't draw {draws} of {size} elements without replacement.")
    if p is not None and (p.dtype != torch.float32 or p.shape != (size,)):
        raise ValueError(f"choice: `p` must be float32 of shape ({size},), got {p.dtype} of shape {tuple(p.shape)}.")
    if not draws:
        indices = torch.zeros(shape, dtype=torch.int64, device=key.device)
    elif p is None:
        indices = randint(key, shape, 0, size).long() if replace else permutation(key, size)[:draws]
    elif replace:
        totals = _cumulative_sum(p)
        indices = _count_below(totals, totals[-1] * (1 - uniform(key, shape)))
    else:
        indices = _largest(log(p) - _negative_gumbel("choice", key, (size,), mode), draws)
    if not isinstance(a, Tensor):
        return indices.reshape(shape)
    return a.index_select(axis, indices.reshape(-1)).reshape(*a.shape[:axis], *shape, *a.shape[axis + 1 :])


def _negative_gumbel(caller: str, key: Tensor, shape: Sequence[int], mode: str | None) -> Tensor:
    if mode not in (None, "low", "high"):
        raise ValueError(f"{caller}: `mode` must be None, 'low' or 'high', got {mode!r}.")
    if mode != "high":
        return log(-log(uniform(key, shape, minval=_TINY, maxval=1.0)))
    high, low = uniform(key, (2, *shape))
    return log(-log1p(-torch.where(high >= 0.5, high, high + low * 2.0**-23 + _TINY)))


def _shuffle(key: Tensor, x: Tensor, axis: int) -> Tensor:
    """Sorts by random words, often enough that ties of words are unlikely to matter: JAX's number of rounds."""
    for _ in range(math.ceil(3 * math.log(max(1, x.numel())) / math.log(2**32 - 1))):
        key, now = keys.split(key)
        x = x.gather(axis, torch.sort(bits(now, x.shape) ^ _LEAST, dim=axis, stable=True).indices)
    return x


def _largest(values: Tensor, count: int) -> Tensor:
    """The indices of the largest values along the last axis, the largest first."""
    return torch.sort(-values, dim=-1, stable=True).indices[..., :count]


def _cumulative_sum(x: Tensor) -> Tensor:
    """The sums of the first elements in XLA's order: one by one in blocks of 16, and likewise over the blocks."""
    if len(x) > 16:
        blocks = torch.nn.functional.pad(x, (0, -len(x) % 16)).reshape(-1, 16)
        inside = torch.stack(list(accumulate(blocks.unbind(1))), 1)
        before = torch.nn.functional.pad(_cumulative_sum(inside[:, -1])[:-1], (1, 0))
        return (inside + before[:, None]).reshape(-1)[: len(x)]
    return torch.stack(list(accumulate(x.unbind())))


def _count_below(ascending: Tensor, values: Tensor) -> Tensor:
    """How many of the ascending numbers are less than each value: binary search."""
    size = len(ascending)
    count = torch.zeros_like(values, dtype=torch.int64)
    for power in reversed(range(size.bit_length())):
        more = count + (1 << power)
        is_below = (more <= size) & (ascending[(more - 1).clamp(max=size - 1)] < values)
        count = torch.where(is_below, more, count)
    return count
