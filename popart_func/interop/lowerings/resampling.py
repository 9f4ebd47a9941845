"""Lowerings of the interpolation of images; `table` says how an op is called.

Interpolation is linear and goes axis by axis: each element of the result is a weighted sum of a few elements, **taps**.
PyTorch itself says with which weights: it interpolates unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["RESAMPLING"]


def _matrix(kind: str, rank: int, size: int, outs: int, *setting: Any) -> Any:
    """The matrix ``[out, in]`` of an interpolation along an axis: PyTorch's results for unit vectors."""
    others = (2,) * (rank - 1)  # of length 1, the antialiasing kernels of PyTorch go wrong
    image = torch.eye(size, dtype=torch.float64).reshape(1, size, size, *(1 for _ in others))
    image = image.expand(1, size, size, *others).contiguous()
    nothing = [None] * (rank - 1)
    result = getattr(torch.ops.aten, kind)(image, [outs, *others], *setting, *nothing)
    return result.reshape(size, outs, -1)[..., 0].T.numpy()


def _weighted(x: Any, axis: int, matrix: Any) -> Any:
    """The product of a matrix with an axis. Elements of weight 0 are left out, since they may be infinite."""
    count = max(int((matrix != 0).sum(-1).max(initial=0)), 1)
    places = np.argsort(matrix == 0, axis=-1, kind="stable")[:, :count]
    weights = np.take_along_axis(matrix, places, -1)
    total: Any = 0
    for tap in range(count):
        shape = [1] * x.ndim
        shape[axis] = len(matrix)
        weight = jnp.asarray(weights[:, tap].reshape(shape), x.dtype)
        total = total + jnp.where(weight == 0, 0, jnp.take(x, places[:, tap], axis) * weight)
    return total


def _interpolate(kind: str, back: bool = False) -> Callable[..., Any]:
    rank = next(int(letter) for letter in kind if letter.isdigit())

    def op(out: TensorSpec, x: Any, outs: Any, *setting: Any) -> Any:
        sizes, setting = (setting[0], setting[1:]) if back else (x.shape, setting)
        aligned, scales = setting[:-rank], setting[-rank:]
        for axis in range(-rank, 0):
            matrix = _matrix(kind, rank, sizes[axis], outs[axis], *aligned, scales[axis])
            x = _weighted(x, axis % x.ndim, matrix.T if back else matrix)
        return x

    return op


_INTERPOLATIONS = (
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
# Only their backward ops need a lowering: tracing replaces the forward ops by simpler ones.
_BACKWARD_ONLY = (
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)

RESAMPLING: dict[str, Lowering] = {
    **{kind: _interpolate(kind) for kind in _INTERPOLATIONS},
    **{f"{kind}_backward": _interpolate(kind, back=True) for kind in (*_INTERPOLATIONS, *_BACKWARD_ONLY)},
}
"""Every interpolation, by its name in ATen."""
