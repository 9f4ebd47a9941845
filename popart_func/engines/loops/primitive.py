"""The primitive behind each loop: one call that every transform of `torch.func` and autograd can take.

A transform turns the loop into another loop, whose body is the old body traced under that transform. While a step is
traced, the innermost call is recorded as one node of the graph. Elsewhere it runs in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from popart_func._torch import get_unwrapped, is_functorch_wrapped_tensor
from popart_func.engines.tracing.loop_nodes import LoopTarget
from popart_func.engines.tracing.recorder import recorder_here
from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["Loop", "is_real", "wants_gradient"]

Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]


def is_real(spec: TensorSpec | Tensor) -> bool:
    """Whether a value can have a derivative."""
    return spec.dtype.is_floating_point or spec.dtype.is_complex


def wants_gradient(tensor: Tensor) -> bool:
    """Whether a gradient in reverse mode is taken through a tensor, by autograd or a transform of `torch.func`."""
    return tensor.requires_grad or (is_functorch_wrapped_tensor(tensor) and wants_gradient(get_unwrapped(tensor)))


class Loop(LoopTarget):
    """A loop over flat tensors, with its rules under transforms.

    Attributes:
        caller: the function that the user has called, for errors.
        outputs: specs of the results.
    """

    caller: str

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the results."""
        raise NotImplementedError

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The results for these operands."""
        return list(_Call.apply(self, *tensors))

    def run(self, tensors: Tensors) -> list[Tensor]:
        """The results, computed in Python."""
        raise NotImplementedError

    def for_engines(self) -> tuple[Loop, list[Tensor]]:
        """The loop with its ops taken apart, and further operands that it needs for that."""
        raise NotImplementedError

    def mapped(self, size: int, axes: Sequence[int | None], tensors: Tensors) -> tuple[list[Tensor], list[int | None]]:
        """The results for operands with an axis of lanes, and where the results have it.

        Args:
            size: how many lanes.
            axes: for each operand its axis of lanes; None where all lanes share it.
            tensors: the operands.
        """
        raise NotImplementedError

    def pushed_forward(self, tensors: Tensors, tangents: Maybe) -> Maybe:
        """The tangents of the results; None where there is none."""
        raise NotImplementedError

    def pulled_back(self, needed: Sequence[bool], tensors: Tensors, cotangents: Maybe) -> Maybe:
        """The gradients of the operands; None where none is needed."""
        raise NotImplementedError


class _Call(torch.autograd.Function):
    """Calls a loop."""

    @staticmethod
    def forward(loop: Loop, *tensors: Tensor) -> tuple[Tensor, ...]:
        recording = recorder_here()
        if recording is None:
            return tuple(loop.run(tensors))
        more: list[Tensor] = []
        if not recording.keeps_ops:
            loop, more = loop.for_engines()
        return tuple(recording.call(loop, [*tensors, *more], loop.outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.loop, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.outputs = len(output)
        ctx.mark_non_differentiable(*(value for value in output if not is_real(value)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, *ctx.loop.pulled_back(ctx.needs_input_grad[1:], ctx.saved_tensors, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        inputs = [forward_ad.unpack_dual(value).primal for value in ctx.saved_tensors]
        moved = ctx.loop.pushed_forward(inputs, tangents[1:])
        return tuple(
            torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) if one is None and is_real(spec) else one
            for one, spec in zip(moved, ctx.loop.outputs, strict=True)
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, loop: Loop, *tensors: Tensor) -> Any:
        results, axes = loop.mapped(info.batch_size, in_dims[1:], tensors)
        return tuple(results), tuple(axes)
