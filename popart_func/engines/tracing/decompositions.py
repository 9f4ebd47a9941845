"""Decompositions: ops replaced by simpler ones while tracing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import core_decompositions, schema

__all__ = ["decomposition"]

Decomposition = Callable[..., Any]


@functools.cache
def decomposition(op: Any) -> Decomposition | None:
    """The function that computes an op with simpler ops; None for an op that a graph may have."""
    wrapped = _table().get(op)
    if wrapped is None or schema(op).is_mutable:
        return wrapped
    if op.overloadpacket in _OWN:
        return _OWN[op.overloadpacket]
    return _light(_lerp if op.overloadpacket is torch.ops.aten.lerp else inspect.unwrap(wrapped), wrapped)


@functools.cache
def _table() -> dict[Any, Decomposition]:
    """PyTorch's core decompositions, and those of ops that it keeps whole for a speed that no engine here gains."""
    aten = torch.ops.aten
    table, every = core_decompositions()
    for packet in (aten.elu, aten.leaky_relu, aten.linalg_vector_norm, aten.native_layer_norm, aten.native_group_norm):
        ops = (getattr(packet, overload) for overload in packet.overloads())
        table |= {op: every[op] for op in ops if op in every}
    return table


def _light(plain: Decomposition, wrapped: Decomposition) -> Decomposition:
    """Calls a decomposition without PyTorch's wrappers around it where they would do nothing.

    The wrappers compute in float32 for narrower dtypes, and find the dtype of the result of several dtypes. To know
    whether they have to, they import sympy and TorchDynamo, which takes a second.
    """

    @functools.wraps(wrapped)
    def light(*args: Any, **kwargs: Any) -> Any:
        dtypes = {part.dtype for part in (*args, *kwargs.values()) if isinstance(part, Tensor)}
        return (plain if dtypes in ({torch.float32}, {torch.float64}) else wrapped)(*args, **kwargs)

    return light


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """`lerp` without PyTorch's check of strides, which imports sympy."""
    weight = weight if isinstance(weight, Tensor) else start.new_full((), weight)
    is_near_end = weight.abs() >= 0.5
    rate = torch.where(is_near_end, weight - 1, weight)
    nearest = torch.where(is_near_end, end, start)
    return rate * (end - start) + nearest


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`take` without PyTorch's read of a 0-d index, which a trace can't follow."""
    return x.reshape(-1)[index.reshape(-1)].reshape(index.shape)


def _sinc(x: Tensor) -> Tensor:
    """`sinc` whose derivative at 0 is not NaN, as that of PyTorch's decomposition would be."""
    at_zero = x == 0
    angle = torch.pi * torch.where(at_zero, 1, x)
    return torch.where(at_zero, 1, angle.sin() / angle)


_OWN: dict[Any, Decomposition] = {torch.ops.aten.take: _take, torch.ops.aten.sinc: _sinc}
