"""Checks of what draws are given: keys, shapes, dtypes and parameters of distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_shape", "check_draw", "check_dtype", "check_integers", "check_key", "parameters"]


def check_key(caller: str, key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int32 or key.shape != (2,):
        got = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"{caller}: `key` must be one key, an int32 tensor of shape (2,), got {got}. For many, use torch.vmap."
        )


def check_integers(caller: str, name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{caller}: `{name}` must be integers, got dtype {value.dtype}.")


def as_shape(caller: str, shape: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"{caller}: a shape must be made of integers of at least 0, got {tuple(shape)}.")
    if math.prod(shape) >= 2**31:
        raise ValueError(f"{caller}: at most 2**31 - 1 elements can be drawn from one key, got {math.prod(shape)}.")
    return tuple(shape)


def check_dtype(caller: str, dtype: Any, expected: torch.dtype = torch.float32) -> None:
    """Refuses dtypes other than the one that is drawn: other dtypes have other streams of bits in JAX."""
    if dtype is None or dtype == expected:
        return
    got = dtype if isinstance(dtype, torch.dtype) else f"{type(dtype).__name__} {dtype!r}"
    raise TypeError(
        f"{caller}: `dtype` must be {expected} or None, got {got}. Convert the numbers that are drawn; "
        "give what follows `dtype` by name."
    )


def check_draw(caller: str, key: Tensor, dtype: Any, expected: torch.dtype = torch.float32) -> None:
    """Checks the key of a draw, and its dtype."""
    check_key(caller, key)
    check_dtype(caller, dtype, expected)


def parameters(
    caller: str, key: Tensor, shape: Sequence[int] | None, **given: Any
) -> tuple[tuple[int, ...], list[Tensor]]:
    """The shape of a draw, and the parameters of its distribution as float32 tensors that broadcast to it.

    Args:
        caller: the public function.
        key: the parameters' device is the key's.
        shape: None for the shape to which the parameters broadcast.
        given: the parameters: numbers, and float32 or integer tensors.
    """
    tensors = [_parameter(caller, name, value, key) for name, value in given.items()]
    needed = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    if shape is None:
        return tuple(needed), tensors
    shape = as_shape(caller, shape)
    try:
        fits = torch.broadcast_shapes(needed, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        names = ", ".join(f"`{name}`" for name in given)
        raise ValueError(f"{caller}: {names} must broadcast to `shape`, got {tuple(needed)} for {shape}.")
    return shape, tensors


def _parameter(caller: str, name: str, value: Any, key: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.int32, torch.int64):
            raise TypeError(f"{caller}: `{name}` must be float32 or integers, got dtype {value.dtype}.")
        return value.to(torch.float32)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: `{name}` must be a number or a tensor, got {type(value).__name__}.")
    return torch.as_tensor(value, dtype=torch.float32, device=key.device)
