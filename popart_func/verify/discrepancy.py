"""How far two computations of one quantity are apart, and how far rounding lets them be.

An error means nothing without the size of what was added up: ``1e6 + 1 − 1e6`` is off by 0.06 in float32, and right.
So a difference is measured relative to its *terms*, the sum of the absolute values that a rounding can act on; one
rounding then costs u, half of the dtype's eps, and k roundings cost k u. Everything is compared in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._typing import Float
from popart_func.tree import PyTree

__all__ = ["Discrepancy", "compare", "exceed", "ratio", "sides", "unit_roundoff", "worst"]


class Discrepancy(NamedTuple):
    """The difference of one seed, each field 0-d float64 (``[seeds]`` after a `torch.vmap`).

    Attributes:
        max_abs: the largest absolute difference.
        max_rel: the largest relative to the larger of the two numbers; at most 2.
        max_ulp: the largest in units in the last place of the larger of the two numbers.
        error: the largest relative to its terms: the one that is judged.
        allowed: what rounding can make of ``error``.
    """

    max_abs: Float[Tensor, "*lanes"]
    max_rel: Float[Tensor, "*lanes"]
    max_ulp: Float[Tensor, "*lanes"]
    error: Float[Tensor, "*lanes"]
    allowed: Float[Tensor, "*lanes"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding.

    >>> unit_roundoff(torch.float32) == 2**-24
    True
    """
    return torch.finfo(dtype).eps / 2


def sides(dtype: torch.dtype) -> int:
    """How many sides of a comparison with float64 round at ``dtype``: float64 itself is held against its like.

    >>> sides(torch.float32), sides(torch.float64)
    (1, 2)
    """
    return 2 if dtype == torch.float64 else 1


def compare(
    got: PyTree, expected: PyTree, terms: PyTree, roundings: int | float | Tensor, dtype: torch.dtype
) -> Discrepancy:
    """The discrepancy of two trees, leaf by leaf.

    Args:
        got: what the library computed, in ``dtype``.
        expected: what it should be, of the same structure and shapes.
        terms: the size that roundings act on, a tree of the same structure; leaves broadcast.
        roundings: how many roundings of the terms lie between the two, a number or a 0-d tensor; 0 for "to the bit".
        dtype: the one that rounds.

    Raises:
        ValueError: a leaf of ``got`` has another shape than that of ``expected``.
    """
    leaves = zip(*(optree.tree_leaves(tree) for tree in (got, expected, terms)), strict=True)
    return worst(*(_compare(one, other, size, roundings, dtype) for one, other, size in leaves))


def exceed(values: Tensor, bound: Tensor, terms: Tensor, roundings: int | float, dtype: torch.dtype) -> Discrepancy:
    """As `compare`, where values must not exceed a bound: only what is above it counts."""
    return compare(torch.maximum(values.double(), bound.double()), bound, terms, roundings, dtype)


def worst(*discrepancies: Discrepancy) -> Discrepancy:
    """The largest of each measure; ``error`` and ``allowed`` stay together, from where their ratio is largest."""
    max_abs, max_rel, max_ulp, errors, alloweds = (torch.stack(field) for field in zip(*discrepancies, strict=True))
    place = ratio(errors, alloweds).argmax(0, keepdim=True)
    return Discrepancy(
        max_abs.amax(0),
        max_rel.amax(0),
        max_ulp.amax(0),
        errors.gather(0, place).squeeze(0),
        alloweds.gather(0, place).squeeze(0),
    )


def ratio(error: Tensor, allowed: Tensor) -> Tensor:
    """``error / allowed``: 0 where there is no error, infinite where there is one and none is allowed, or a NaN."""
    return torch.where(error == 0, 0, torch.where(error.isnan(), torch.inf, error / allowed))


def _compare(
    got: Tensor, expected: Tensor, terms: Tensor, roundings: int | float | Tensor, dtype: torch.dtype
) -> Discrepancy:
    if got.shape != expected.shape:
        raise ValueError(
            f"compare: `got` and `expected` must have the same shapes, got {tuple(got.shape)} and "
            f"{tuple(expected.shape)}."
        )
    got, expected = got.double(), expected.double()
    difference = torch.where(got == expected, 0, (got - expected).abs())
    # What is not a number anywhere, or not on one side alone, is as wrong as can be.
    difference = torch.where(difference.isnan(), torch.inf, difference)
    larger = torch.maximum(got.abs(), expected.abs())
    zero = difference == 0
    allowed = torch.as_tensor(roundings, dtype=torch.float64, device=got.device) * unit_roundoff(dtype)
    return Discrepancy(
        max_abs=_max(difference),
        max_rel=_max(torch.where(zero, 0, _finite_or_inf(difference / larger))),
        max_ulp=_max(torch.where(zero, 0, _finite_or_inf(difference / _spacing(larger, dtype)))),
        error=_max(torch.where(zero, 0, _finite_or_inf(difference / terms.double()))),
        allowed=allowed.expand(()),
    )


def _spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of a dtype."""
    narrow = size.to(dtype).clamp(max=torch.finfo(dtype).max / 2)
    return torch.nextafter(narrow, torch.full_like(narrow, torch.inf)).double() - narrow.double()


def _max(values: Tensor) -> Tensor:
    return values.amax() if values.ndim else values


def _finite_or_inf(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.inf, values)
