"""Interpolation of images, by PyTorch's decompositions, and sampling at the places of a grid, with their gradients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import OpOverload, core_decompositions

__all__ = ["RESAMPLING"]

_ZEROS, _BORDER, _REFLECTION = 0, 1, 2
_NEAREST, _CUBIC = 1, 2


def _upsample(op: OpOverload, x: Tensor, *options: Any) -> Tensor:
    """An interpolation by PyTorch's decomposition: calling the op itself would ask for its composition again."""
    result: Tensor = core_decompositions()[1][op](x, *options)
    return result


def _upsample_backward(
    op: OpOverload, gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], *options: Any
) -> Tensor:
    image = gradient.new_zeros(input_size)
    result: Tensor = torch.func.vjp(lambda x: _upsample(op, x, output_size, *options), image)[1](gradient)[0]
    return result


def _unnormalized(place: Tensor, size: int, align: bool) -> Tensor:
    return (place + 1) / 2 * (size - 1) if align else ((place + 1) * size - 1) / 2


def _clipped(place: Tensor, size: int) -> Tensor:
    """A place within a border; NaN is the first place. As in PyTorch, the slope at the border is 0."""
    return torch.where(place >= size - 1, size - 1, torch.where(place > 0, place, 0))


def _reflected(place: Tensor, low: int | float, high: int | float) -> Tensor:
    """A place mirrored at two borders until it lies between them; 0 where it is NaN or infinite."""
    if low == high:
        return torch.zeros_like(place)
    place = torch.where(place.abs() < torch.inf, place, 0)
    distance = torch.where(place < low, low - place, place - low)
    rest = torch.fmod(distance, high - low)
    return torch.where((distance / (high - low)).floor() % 2 == 0, rest + low, high - rest)


def _inside(place: Tensor, size: int, padding: int, align: bool) -> Tensor:
    """The place that is read for one that may be outside: unchanged, at the border, or mirrored."""
    if padding == _ZEROS:
        return place
    if padding == _REFLECTION:
        place = _reflected(place, 0, size - 1) if align else _reflected(place, -0.5, size - 0.5)
    return _clipped(place, size)


def _found(place: Tensor, size: int, padding: int) -> Tensor:
    """A place in a volume: what is no number is the last place, or one outside where zeros surround the volume."""
    is_lost = place.isnan() if padding == _BORDER else ~place.isfinite()
    return torch.where(is_lost, -1 if padding == _ZEROS else size - 1, place)


def _linear_taps(place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The places that are read for a place, and their weights."""
    low = place.floor()
    return [(low, low + 1 - place), (low + 1, place - low)]


def _cubic_taps(place: Tensor, a: float = -0.75) -> list[tuple[Tensor, Tensor]]:
    low = place.floor()
    rest = place - low
    near = [((a + 2) * t - (a + 3)) * t * t + 1 for t in (rest, 1 - rest)]
    far = [((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (rest + 1, 2 - rest)]
    return [(low + number - 1, weight) for number, weight in enumerate((far[0], *near, far[1]))]


def _grid_sample(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Tensor:
    """`grid_sampler_2d` and `grid_sampler_3d`: linear, nearest or, of images, cubic.

    PyTorch's decomposition is of images alone, and gives other values than its kernel where a place is NaN or infinite.
    """
    sizes = x.shape[2:]
    rank, axes = len(sizes), range(len(sizes))
    if not x.numel() or not grid.numel():
        return x.new_zeros((*x.shape[:2], *grid.shape[1:-1]))
    inside = [functools.partial(_inside, size=size, padding=padding, align=align) for size in sizes]
    places = [_unnormalized(grid[..., rank - 1 - axis], sizes[axis], align) for axis in axes]
    if rank == 3:
        places = [_found(place, size, padding) for place, size in zip(places, sizes, strict=True)]
    if mode != _CUBIC:
        places = [inside[axis](places[axis]) for axis in axes]
    images = x.movedim(1, -1)
    image = torch.arange(len(x), device=x.device).reshape(-1, *(1 for _ in sizes))

    def read(positions: Sequence[Tensor]) -> Tensor:
        """The elements at whole places; 0 outside of the image."""
        if mode == _CUBIC:
            positions = [inside[axis](positions[axis]) for axis in axes]
        exist: Any = True
        for position, size in zip(positions, sizes, strict=True):
            exist = exist & (position >= 0) & (position <= size - 1)
        at = [torch.where(exist, position, 0).long() for position in positions]
        return torch.where(exist.unsqueeze(-1), images[(image, *at)], 0)

    if mode == _NEAREST:
        return read([place.round() for place in places]).movedim(-1, 1)
    total: Any = 0
    for taps in itertools.product(*map(_cubic_taps if mode == _CUBIC else _linear_taps, places)):
        weight = functools.reduce(torch.mul, [weight for _, weight in taps])
        total = total + weight.unsqueeze(-1) * read([position for position, _ in taps])
    result: Tensor = total
    return result.movedim(-1, 1)


def _grid_sample_backward(
    gradient: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool, wanted: Sequence[bool]
) -> list[Tensor | None]:
    pull_back = torch.func.vjp(lambda x, grid: _grid_sample(x, grid, mode, padding, align), x, grid)[1]
    return [part if want else None for part, want in zip(pull_back(gradient), wanted, strict=True)]


_COMPOSED_FORWARD = ("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
# Tracing replaces the forward ops of these by simpler ones.
_BACKWARD_ONLY = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)


def _each(names: Sequence[str], end: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"{name}{end}": functools.partial(function, getattr(torch.ops.aten, name).default) for name in names}


RESAMPLING: dict[str, Callable[..., Any]] = {
    **_each(_COMPOSED_FORWARD, "", _upsample),
    **_each((*_COMPOSED_FORWARD, *_BACKWARD_ONLY), "_backward", _upsample_backward),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), _grid_sample),
    **dict.fromkeys(("grid_sampler_2d_backward", "grid_sampler_3d_backward"), _grid_sample_backward),
}
"""Every op that interpolates images, or samples at the places of a grid, by its name in ATen."""
