"""Scattered reductions and writes by plain scatters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCATTERS", "least"]


def _greatest(dtype: torch.dtype) -> int | float:
    return math.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def least(dtype: torch.dtype) -> int | float:
    """The number that a maximum ignores."""
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool = True
) -> Tensor:
    """`scatter_reduce` for means, and for ``include_self=False``, which drops the elements that are scattered to."""
    if not index.numel():
        return x.clone()
    touched = torch.zeros_like(x, dtype=torch.bool).scatter(dim, index, True)
    start: Any = {"sum": 0, "mean": 0, "prod": 1, "amax": least(x.dtype), "amin": _greatest(x.dtype)}[reduce]
    base = x if include_self else torch.where(touched, start, x)
    if reduce != "mean":
        return base.scatter_reduce(dim, index, source, reduce, include_self=True)
    counts = torch.full_like(x, int(include_self)).scatter_add(dim, index, torch.ones_like(source))
    total = base.scatter_add(dim, index, source)
    rounding = None if x.is_floating_point() else "floor"
    return torch.where(touched, torch.div(total, counts.clamp(min=1), rounding_mode=rounding), x)


def _index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool = True) -> Tensor:
    if not x.ndim:
        return _index_reduce(x.reshape(1), 0, index, source.reshape(1), reduce, include_self).reshape(())
    dim %= x.ndim
    full = index.reshape(-1, *(1 for _ in x.shape[dim + 1 :])).expand(source.shape)
    return x.scatter_reduce(dim, full, source, reduce, include_self=include_self)


def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    flat = x.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


SCATTERS: dict[str, Callable[..., Any]] = {
    "scatter_reduce": _scatter_reduce,
    "index_reduce": _index_reduce,
    "put": _put,
}
"""Scattered reductions and writes, by their name in ATen."""
