"""Gradients of ops that tracing replaces by simpler ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import OpOverload, core_decompositions

__all__ = ["GRADIENTS"]


def _of_replication_pad(op: OpOverload, gradient: Tensor, x: Tensor, pads: Sequence[int]) -> Tensor:
    forward = core_decompositions()[1][op]  # calling the op itself would ask for its gradient again
    result: Tensor = torch.func.vjp(lambda x: forward(x, pads), x)[1](gradient)[0]
    return result


def _of_shrinking(gradient: Tensor, x: Tensor, bound: int | float) -> Tensor:
    return torch.where((x >= -bound) & (x <= bound), 0, gradient)


def _of_masked_scatter(gradient: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    mask = mask.expand(gradient.shape).reshape(-1)
    result = gradient.new_zeros(shape).reshape(-1)
    if not result.numel():
        return result.reshape(shape)
    places = (mask.long().cumsum(0) - 1).clamp(0, result.numel() - 1)
    return result.index_put((places,), torch.where(mask, gradient.reshape(-1), 0), accumulate=True).reshape(shape)


GRADIENTS: dict[str, Callable[..., Any]] = {
    **{
        f"replication_pad{rank}d_backward": functools.partial(
            _of_replication_pad, getattr(torch.ops.aten, f"replication_pad{rank}d").default
        )
        for rank in (1, 2, 3)
    },
    "softshrink_backward": _of_shrinking,
    "hardshrink_backward": _of_shrinking,
    "masked_scatter_backward": _of_masked_scatter,
}
"""Gradients, by their name in ATen."""
