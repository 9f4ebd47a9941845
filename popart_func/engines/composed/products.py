"""Sums of products, distances and the like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRODUCTS"]


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    summed: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    for axes, position in ((expand_a, 0), (expand_b, 1), (expand_c, 2)):
        for axis in sorted(axes):
            a, b, c = (part.unsqueeze(axis) if place == position else part for place, part in enumerate((a, b, c)))
    product = a * b * c
    return product.sum(list(summed)) if summed else product


def _distance(difference: Tensor, p: int | float) -> Tensor:
    """The p-norm along the last axis; its derivative where it is 0 is 0."""
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == 1:
        return size.sum(-1)
    if p == math.inf:
        return size.amax(-1)
    total = (size * size if p == 2 else size.pow(p)).sum(-1)
    at_zero = total == 0
    inside = torch.where(at_zero, 1, total)
    return torch.where(at_zero, 0, inside.sqrt() if p == 2 else inside.pow(1 / p))


def _cdist(left: Tensor, right: Tensor, p: int | float, _: int | None = None) -> Tensor:
    difference = left.unsqueeze(-2) - right.unsqueeze(-3)
    return _distance(difference, p) if difference.numel() else difference.new_zeros(difference.shape[:-1])


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second row of each pair of rows, in the order of `pdist`."""
    rows = x.shape[0]
    numbers, row = (torch.arange(count, device=x.device) for count in (rows * (rows - 1) // 2, rows - 1))
    starts = row * (2 * rows - 1 - row) // 2
    first = torch.searchsorted(starts, numbers, right=True) - 1
    return first, numbers - starts[first] + first + 1


def _pdist(x: Tensor, p: int | float = 2) -> Tensor:
    rows = x.shape[0]
    if rows < 2 or not x.shape[1]:
        return x.new_zeros(rows * (rows - 1) // 2)
    first, second = _pairs(x)
    return _distance(x[first] - x[second], p)


def _slope(difference: Tensor, gradient: Tensor, distance: Tensor, p: int | float) -> Tensor:
    """The gradient of distances in the differences, as PyTorch takes it: 0 where the distance is 0."""
    gradient, distance = gradient.unsqueeze(-1), distance.unsqueeze(-1)
    sign, size = difference.sign(), difference.abs()
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return gradient * sign
    if p == math.inf:
        return gradient * sign * (size == distance)
    if p == 2:
        return torch.where(distance == 0, 0, gradient * difference / distance)
    if p < 2:
        steep = sign * size.pow(p - 1) * gradient / distance.pow(p - 1)
        return torch.where((distance == 0) | (difference == 0), 0, steep)
    return torch.where(distance == 0, 0, difference * size.pow(p - 2) * gradient / distance.pow(p - 1))


def _cdist_backward(gradient: Tensor, left: Tensor, right: Tensor, p: int | float, distance: Tensor) -> Tensor:
    if not gradient.numel() or not left.shape[-1]:
        return torch.zeros_like(left)
    return _slope(left.unsqueeze(-2) - right.unsqueeze(-3), gradient, distance, p).sum(-2)


def _pdist_backward(gradient: Tensor, x: Tensor, p: int | float, distance: Tensor) -> Tensor:
    if not gradient.numel() or not x.shape[1]:
        return torch.zeros_like(x)
    first, second = _pairs(x)
    slope = _slope(x[first] - x[second], gradient, distance, p)
    return torch.zeros_like(x).index_add(0, first, slope).index_add(0, second, -slope)


def _angle(x: Tensor) -> Tensor:
    is_whole = not x.is_floating_point()
    x = x.to(torch.get_default_dtype()) if is_whole else x
    return torch.where(x < 0, torch.pi, torch.where(x == x, 0.0, x))


PRODUCTS: dict[str, Callable[..., Any]] = {
    "_trilinear": _trilinear,
    "_cdist_forward": _cdist,
    "_cdist_backward": _cdist_backward,
    "_pdist_forward": _pdist,
    "_pdist_backward": _pdist_backward,
    "angle": _angle,
}
"""Sums of products and distances, by their name in ATen."""
