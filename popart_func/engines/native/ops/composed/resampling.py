"""Sampling an image at the places of a grid: PyTorch's decomposition, and its kernel's values at places without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import core_decompositions

__all__ = ["RESAMPLING"]

_LINEAR, _ZEROS, _BORDER = 0, 0, 1


def _grid_sample(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Tensor:
    """`grid_sampler_2d`; its decomposition reads an element, or 0, where the kernel has NaN or reads another one.

    Where a place is NaN or infinite, the kernel's linear result is NaN with zeros around the image. With a border the
    kernel takes NaN for 0, and with reflection infinity, too; -1 in the grid is that place for either alignment.
    """
    sizes = x.shape[3], x.shape[2]
    places = [grid[..., axis] * (0.5 * (size - align)) for axis, size in enumerate(sizes)]
    lost = [place != place if padding == _BORDER else ~(place.abs() < torch.inf) for place in places]
    if padding != _ZEROS and mode <= 1:
        grid = torch.where(torch.stack(lost, -1), -1, grid)
    decomposed: Callable[..., Any] = core_decompositions()[1][torch.ops.aten.grid_sampler_2d.default]
    result: Tensor = decomposed(x, grid, mode, padding, align)
    if padding == _ZEROS and mode == _LINEAR:
        result = torch.where((lost[0] | lost[1]).unsqueeze(1), torch.nan, result)
    return result


RESAMPLING: dict[str, Callable[..., Any]] = {"grid_sampler_2d": _grid_sample}
"""Every op that samples at the places of a grid, by its name in ATen."""
