"""Sampling an image at the places of a grid: PyTorch's decomposition, corrected where a place is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import core_decompositions

__all__ = ["RESAMPLING"]

_LINEAR, _ZEROS, _BORDER = 0, 0, 1


def _grid_sample(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Tensor:
    """`grid_sampler_2d`, with the values of PyTorch's kernel where a place is NaN or infinite.

    There PyTorch's decomposition differs from its kernel. With zeros around the image, the kernel's linear result is
    NaN. With a border, the kernel reads at NaN what it reads at -1; with reflection, also at infinity.
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
