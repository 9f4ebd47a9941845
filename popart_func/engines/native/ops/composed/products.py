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


def _distance(difference: Tensor, p: float) -> Tensor:
    """The p-norm along the last axis; its derivative at 0 is not asked for here."""
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == 1:
        return size.sum(-1)
    if p == 2:
        return (size * size).sum(-1).sqrt()
    if p == math.inf:
        return size.amax(-1)
    return size.pow(p).sum(-1).pow(1 / p)


def _cdist(left: Tensor, right: Tensor, p: float, _: int | None = None) -> Tensor:
    difference = left.unsqueeze(-2) - right.unsqueeze(-3)
    return _distance(difference, p) if difference.numel() else difference.new_zeros(difference.shape[:-1])


def _pdist(x: Tensor, p: float = 2) -> Tensor:
    rows = x.shape[0]
    if rows < 2 or not x.shape[1]:
        return x.new_zeros(rows * (rows - 1) // 2)
    return torch.cat([_distance(x[row : row + 1] - x[row + 1 :], p) for row in range(rows - 1)])


def _slope(difference: Tensor, gradient: Tensor, distance: Tensor, p: float) -> Tensor:
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


def _cdist_backward(gradient: Tensor, left: Tensor, right: Tensor, p: float, distance: Tensor) -> Tensor:
    if not gradient.numel() or not left.shape[-1]:
        return torch.zeros_like(left)
    return _slope(left.unsqueeze(-2) - right.unsqueeze(-3), gradient, distance, p).sum(-2)


def _pdist_backward(gradient: Tensor, x: Tensor, p: float, distance: Tensor) -> Tensor:
    rows, start = x.shape[0], 0
    total = torch.zeros_like(x)
    for row in range(rows - 1):
        count = rows - 1 - row
        part = slice(start, start + count)
        slope = _slope(x[row : row + 1] - x[row + 1 :], gradient[part], distance[part], p)
        total = total + torch.cat([torch.zeros_like(x[:row]), slope.sum(0, keepdim=True), -slope])
        start += count
    return total


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
