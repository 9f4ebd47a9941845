"""Lowerings of interpolation and of sampling on a grid; `table` says how an op is called.

Interpolation is linear and goes axis by axis: each element of the result is a weighted sum of a few elements, **taps**.
PyTorch itself says with which weights: it interpolates unit vectors.
"""

from __future__ import annotations

import functools
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


def _unnormalized(place: Any, size: int, aligned: bool) -> Any:
    return (place + 1) / 2 * (size - 1) if aligned else ((place + 1) * size - 1) / 2


def _reflected(place: Any, low: int | float, high: int | float) -> Any:
    """A place mirrored at two borders until it lies between them."""
    if low == high:
        return jnp.zeros_like(place)
    span = high - low
    distance = jnp.abs(place - low)
    rest = jnp.fmod(distance, span)
    return jnp.where(jnp.floor(distance / span) % 2 == 0, rest + low, high - rest)


def _inside(place: Any, size: int, padding: int, aligned: bool) -> Any:
    """The place to read for a place that may be outside: unchanged (0), at the border (1), or mirrored (2).

    As in PyTorch's kernel, NaN is the first place within a border, and so is infinity where it is mirrored.
    """
    if padding == 2:
        mirrored = _reflected(place, 0, size - 1) if aligned else _reflected(place, -0.5, size - 0.5)
        place = jnp.where(jnp.isfinite(place), mirrored, 0)
    return jnp.clip(jnp.where(jnp.isnan(place), 0, place), 0, size - 1) if padding else place


def _grid_sample(out: TensorSpec, x: Any, grid: Any, mode: int, padding: int, aligned: bool) -> Any:
    """`grid_sampler_2d` and `_3d`: linear (0), nearest (1) or, of images, cubic (2)."""
    rank = x.ndim - 2
    if x.size == 0 or grid.size == 0:
        return jnp.zeros(out.shape, x.dtype)
    sizes = x.shape[2:]
    places = [_unnormalized(grid[..., rank - 1 - axis], sizes[axis], aligned) for axis in range(rank)]
    if rank == 3:  # PyTorch's kernel for volumes takes what is no number for the last place, or for one outside
        is_lost = jnp.isnan if padding == 1 else lambda place: ~jnp.isfinite(place)
        places = [jnp.where(is_lost(p), size - 1 if padding else -1, p) for p, size in zip(places, sizes, strict=True)]
    if mode != 2:
        places = [_inside(place, size, padding, aligned) for place, size in zip(places, sizes, strict=True)]
    images = jnp.moveaxis(x, 1, -1)  # [n, ..., channels]
    which = jnp.arange(x.shape[0]).reshape(-1, *(1 for _ in grid.shape[1:-1]))

    def read(positions: list[Any]) -> Any:
        if mode == 2:
            positions = [_inside(place, size, padding, aligned) for place, size in zip(positions, sizes, strict=True)]
        exist = functools.reduce(
            jnp.logical_and,
            [(position >= 0) & (position <= size - 1) for position, size in zip(positions, sizes, strict=True)],
        )
        at = tuple(
            jnp.nan_to_num(jnp.clip(position, 0, size - 1)).astype(jnp.int32)
            for position, size in zip(positions, sizes, strict=True)
        )
        return jnp.where(exist[..., None], images[(which, *at)], 0)

    if mode == 1:
        result = read([jnp.round(place) for place in places])
    else:
        taps = [_cubic_taps(place) if mode == 2 else _linear_taps(place) for place in places]
        result = jnp.zeros((*grid.shape[:-1], x.shape[1]), x.dtype)
        for combination in np.ndindex(*(len(tap) for tap in taps)):
            chosen = [tap[number] for tap, number in zip(taps, combination, strict=True)]
            weight = functools.reduce(jnp.multiply, [weight for _, weight in chosen])
            result = result + weight[..., None] * read([position for position, _ in chosen])
    return jnp.moveaxis(result, -1, 1)


def _linear_taps(place: Any) -> list[tuple[Any, Any]]:
    low = jnp.floor(place)
    return [(low, low + 1 - place), (low + 1, place - low)]


def _cubic_taps(place: Any, a: float = -0.75) -> list[tuple[Any, Any]]:
    low = jnp.floor(place)
    rest = place - low

    def near(t: Any) -> Any:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Any) -> Any:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    weights = (far(rest + 1), near(rest), near(1 - rest), far(2 - rest))
    return [(low + number - 1, weight) for number, weight in enumerate(weights)]


INTERPOLATIONS = (
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
# Only their backward ops need a lowering: tracing replaces the forward ops by simpler ones.
BACKWARD_ONLY = (
    "upsample_linear1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)

RESAMPLING: dict[str, Lowering] = {
    **{kind: _interpolate(kind) for kind in INTERPOLATIONS},
    **{f"{kind}_backward": _interpolate(kind, back=True) for kind in (*INTERPOLATIONS, *BACKWARD_ONLY)},
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), _grid_sample),
}
"""Every interpolation and sampling, by its name in ATen."""
