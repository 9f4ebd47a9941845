"""Gradients of composed ops, most of them by differentiating what composes the op itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import OpOverload, core_decompositions
from popart_func.engines.native.kernel import NotLoweredError

__all__ = ["GRADIENTS"]

_aten = torch.ops.aten


def _decomposed(op: OpOverload) -> Callable[..., Any]:
    """PyTorch's decomposition of an op: calling the op itself would ask for its gradient again."""
    found: Callable[..., Any] = core_decompositions()[1][op]
    return found


def _of_upsampling(
    op: OpOverload, gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], *options: Any
) -> Tensor:
    forward = _decomposed(op)
    pull_back = torch.func.vjp(lambda x: forward(x, output_size, *options), gradient.new_zeros(input_size))[1]
    result: Tensor = pull_back(gradient)[0]
    return result


def _of_grid_sample(
    gradient: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool, wanted: Sequence[bool]
) -> list[Tensor | None]:
    if padding != 0:  # where a place is clipped, or reflected, at just the border, PyTorch takes another slope
        raise NotLoweredError("the gradient with padding_mode='border' or 'reflection'")
    forward = _decomposed(_aten.grid_sampler_2d.default)
    pull_back = torch.func.vjp(lambda x, grid: forward(x, grid, mode, padding, align), x, grid)[1]
    return [part if want else None for part, want in zip(pull_back(gradient), wanted, strict=True)]


def _of_replication_pad(op: OpOverload, gradient: Tensor, x: Tensor, pads: Sequence[int]) -> Tensor:
    forward = _decomposed(op)
    result: Tensor = torch.func.vjp(lambda x: forward(x, pads), x)[1](gradient)[0]
    return result


def _of_shrinking(gradient: Tensor, x: Tensor, bound: float) -> Tensor:
    return torch.where((x >= -bound) & (x <= bound), 0, gradient)


def _of_masked_scatter(gradient: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    mask = mask.expand(gradient.shape).reshape(-1)
    result = gradient.new_zeros(shape).reshape(-1)
    if not result.numel():
        return result.reshape(shape)
    places = (mask.long().cumsum(0) - 1).clamp(0, result.numel() - 1)
    return result.index_put((places,), torch.where(mask, gradient.reshape(-1), 0), accumulate=True).reshape(shape)


_UPSAMPLING = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
)

GRADIENTS: dict[str, Callable[..., Any]] = {
    **{f"{name}_backward": functools.partial(_of_upsampling, getattr(_aten, name).default) for name in _UPSAMPLING},
    **{
        f"replication_pad{rank}d_backward": functools.partial(
            _of_replication_pad, getattr(_aten, f"replication_pad{rank}d").default
        )
        for rank in (1, 2, 3)
    },
    "grid_sampler_2d_backward": _of_grid_sample,
    "softshrink_backward": _of_shrinking,
    "hardshrink_backward": _of_shrinking,
    "masked_scatter_backward": _of_masked_scatter,
}
"""Gradients of composed ops, by their name in ATen."""
