"""Traced tensors: the tensors of a function that is being traced, which have no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from popart_func._torch import disabled_torch_function, make_wrapper_tensor
from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["KEEPS_NOTHING", "Traced", "node_of", "stand_in_of"]

KEEPS_NOTHING = "a step must be pure, and keep nothing that it has computed"


class Traced(Tensor):
    """A tensor of the function that is being traced, without values.

    Attributes:
        node: the node of the graph that computes it.
        stand_in: a tensor of its shape, strides and dtype on the CPU; see `shapes`.
        known: its value where that does not depend on inputs, else None; see `KnownValues`.
    """

    node: Any
    stand_in: Any
    known: Tensor | None

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        stand_in: Tensor,
        device: torch.device,
        node: fx.Node | None = None,
        known: Tensor | None = None,
        keys: Any = None,
    ) -> Traced:
        """Takes shape, strides and dtype from the stand-in; ``keys`` are more dispatch keys."""
        traced = make_wrapper_tensor(cls, stand_in, device, keys)
        traced.node, traced.stand_in, traced.known = node, stand_in, known
        return traced

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called on a tensor of an earlier trace: {KEEPS_NOTHING}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({TensorSpec.of(self)})"


def node_of(traced: Any) -> fx.Node:
    """The node that computes a traced tensor."""
    node: fx.Node = traced.node
    return node


def stand_in_of(traced: Any) -> Tensor:
    """The stand-in of a traced tensor."""
    stand_in: Tensor = traced.stand_in
    return stand_in
