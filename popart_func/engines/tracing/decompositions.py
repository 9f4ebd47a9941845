"""Which ops a step graph has none of, and what they are made of.

It touches PyTorch's decompositions, which are semi-private: a test fails loudly when they move.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import _core_aten_decompositions_post_autograd, decomposition_table

__all__ = ["decomposition"]

Decomposition = Callable[..., Any]


@functools.cache
def decomposition(op: Any) -> Decomposition | None:
    """What an op is made of; None for those that a graph may have."""
    heavy = _table().get(op)
    if heavy is None or op._schema.is_mutable:
        return heavy
    if op.overloadpacket in _OWN:
        return _OWN[op.overloadpacket]
    return _light(_lerp if op.overloadpacket is torch.ops.aten.lerp else inspect.unwrap(heavy), heavy)


@functools.cache
def _table() -> dict[Any, Decomposition]:
    """The core decompositions, and some that the core keeps whole for speed that no engine here needs."""
    aten = torch.ops.aten
    more = (aten.elu, aten.leaky_relu, aten.linalg_vector_norm, aten.native_layer_norm, aten.native_group_norm)
    table: dict[Any, Decomposition] = _core_aten_decompositions_post_autograd()
    for packet in more:
        ops = (getattr(packet, overload) for overload in packet.overloads())
        table |= {op: decomposition_table[op] for op in ops if op in decomposition_table}
    return table


def _light(plain: Decomposition, decompose: Decomposition) -> Decomposition:
    """The decomposition without what is wrapped around it, where that has nothing to do.

    The wrappers compute in float32 what comes in less, and give the result in the dtype that comes of several. To know
    whether they have to, they import sympy and TorchDynamo, which takes a second.
    """

    @functools.wraps(decompose)
    def light(*args: Any, **kwargs: Any) -> Any:
        dtypes = {part.dtype for part in (*args, *kwargs.values()) if isinstance(part, Tensor)}
        return (plain if dtypes in ({torch.float32}, {torch.float64}) else decompose)(*args, **kwargs)

    return light


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """PyTorch's, without its check of strides, which imports sympy."""
    weight = weight if isinstance(weight, Tensor) else start.new_full((), weight)
    is_near_end = weight.abs() >= 0.5
    rate = torch.where(is_near_end, weight - 1, weight)
    nearest = torch.where(is_near_end, end, start)
    return rate * (end - start) + nearest


def _take(x: Tensor, index: Tensor) -> Tensor:
    """PyTorch's, but that reads the value of a 0-d index."""
    return x.reshape(-1)[index.reshape(-1)].reshape(index.shape)


def _sinc(x: Tensor) -> Tensor:
    """PyTorch's, but that it can be differentiated at 0 by what it is made of."""
    at_zero = x == 0
    angle = torch.pi * torch.where(at_zero, 1, x)
    return torch.where(at_zero, 1, angle.sin() / angle)


_OWN: dict[Any, Decomposition] = {torch.ops.aten.take: _take, torch.ops.aten.sinc: _sinc}
