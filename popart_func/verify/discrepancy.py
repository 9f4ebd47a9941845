"""Discrepancy: the difference of two computations of one quantity, and the difference that rounding can explain.

The size of a rounding error depends on the numbers that were added: ``1e6 + 1 − 1e6`` is off by 0.06 in float32, and
that is correct rounding. A difference is therefore divided by its *terms*, the sum of the absolute values that a
rounding can act on. Relative to the terms, one rounding costs at most u, half of the dtype's eps, and k roundings cost
k u. Comparisons run in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._typing import Float
from popart_func.tree import PyTree

__all__ = ["Discrepancy", "compare", "compare_to_bound", "ratio", "rounding_sides", "unit_roundoff", "worst"]


class Discrepancy(NamedTuple):
    """The difference found for one seed; each field is 0-d float64 (``[seeds]`` after a `torch.vmap`).

    Attributes:
        max_abs: the largest absolute difference.
        max_rel: the largest difference relative to the larger of the two numbers; at most 2.
        max_ulp: the largest difference in units in the last place of the larger of the two numbers.
        error: the largest difference relative to its terms. The verdict depends on this field.
        allowed: the largest ``error`` that rounding can cause.
    """

    max_abs: Float[Tensor, "*lanes"]
    max_rel: Float[Tensor, "*lanes"]
    max_ulp: Float[Tensor, "*lanes"]
    error: Float[Tensor, "*lanes"]
    allowed: Float[Tensor, "*lanes"]


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: half of the dtype's eps.

    >>> unit_roundoff(torch.float32) == 2**-24
    True
    """
    return torch.finfo(dtype).eps / 2


def rounding_sides(dtype: torch.dtype) -> int:
    """How many sides of a comparison with a float64 reference round as coarsely as ``dtype``.

    In float32 the library alone does; in float64 the reference does, too.

    >>> rounding_sides(torch.float32), rounding_sides(torch.float64)
    (1, 2)
    """
    return 2 if dtype == torch.float64 else 1


def compare(
    got: PyTree, expected: PyTree, terms: PyTree, roundings: int | float | Tensor, dtype: torch.dtype
) -> Discrepancy:
    """The discrepancy of two trees: the worst of their leaves.

    Args:
        got: the library's result, computed in ``dtype``.
        expected: the reference, with the same structure and shapes.
        terms: the sizes that roundings act on, with the same structure; leaves broadcast.
        roundings: the number of roundings of the terms between the two, as a number or a 0-d tensor; 0 asks for
            equality to the bit.
        dtype: the dtype that rounds.

    Raises:
        ValueError: a leaf of ``got`` and its leaf of ``expected`` differ in shape.
    """
    leaves = zip(*(optree.tree_leaves(tree) for tree in (got, expected, terms)), strict=True)
    return worst(*(_compare(one, other, size, roundings, dtype) for one, other, size in leaves))


def compare_to_bound(
    values: Tensor, bound: Tensor, terms: Tensor, roundings: int | float, dtype: torch.dtype
) -> Discrepancy:
    """The discrepancy of values that must not exceed a bound: only the excess counts. Arguments as in `compare`."""
    return compare(torch.maximum(values.double(), bound.double()), bound, terms, roundings, dtype)


def worst(*discrepancies: Discrepancy) -> Discrepancy:
    """The largest of each measure; ``error`` and ``allowed`` come together from where their ratio is largest."""
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
    """``error / allowed``: 0 for an error of 0; infinite for any other error if none is allowed, and for NaN."""
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
    # Equal infinities differ by 0. A NaN on either side counts as an infinite difference.
    difference = torch.where(got == expected, 0, _nan_to_inf((got - expected).abs()))
    larger = torch.maximum(got.abs(), expected.abs())

    def largest(size: Tensor) -> Tensor:
        """The largest difference relative to a size that may be 0 where the difference is."""
        return torch.where(difference == 0, 0, _nan_to_inf(difference / size)).amax()

    allowed = torch.as_tensor(roundings, dtype=torch.float64, device=got.device) * unit_roundoff(dtype)
    return Discrepancy(
        max_abs=difference.amax(),
        max_rel=largest(larger),
        max_ulp=largest(_spacing(larger, dtype)),
        error=largest(terms.double()),
        allowed=allowed.expand(()),
    )


def _spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from a number to the next larger number of a dtype."""
    narrow = size.to(dtype).clamp(max=torch.finfo(dtype).max / 2)
    return torch.nextafter(narrow, torch.full_like(narrow, torch.inf)).double() - narrow.double()


def _nan_to_inf(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.inf, values)
