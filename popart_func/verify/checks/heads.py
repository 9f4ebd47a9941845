"""Checks of POP on heads and statistics of any magnitude: Proposition 1 and its consequences.

Values are compared in units of the new statistics, in which the head computes, with the formulas in float64. The terms
are the sums of the absolute values that the formulas add up.

POP rounds a weight ``(σ/σ') W`` twice. It rounds the bias at most four times: ratio, product and sum; or difference
(shifts and residues alike), sum, quotient and sum.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from popart_func import pop_art
from popart_func.pop_art import PopArtState
from popart_func.verify import draw
from popart_func.verify.check import Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare, rounding_sides, unit_roundoff, worst

__all__ = ["CHECKS"]

POP, FOLD = 4, 3
"""The roundings of a bias in `pop` and in `fold`."""


class _Example(NamedTuple):
    head: dict[str, Tensor]
    h: Tensor
    first: PopArtState
    second: PopArtState
    third: PopArtState
    values: Tensor

    @property
    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and h in float64."""
        return self.head["head.weight"].double(), self.head["head.bias"].double(), self.h.double()


def _draw(key: Tensor, settings: Settings) -> _Example:
    """Draws a head, its inputs, values to normalize, and three statistics.

    The second statistics are far from the first; the third are near it, as after a small step. Shifts are up to
    thousands of scales away from zero, so that between the near statistics the residues move the most. Residues are
    larger than `pop_art.art` leaves them, so that a forgotten residue shows everywhere. Variances are not the squares
    of the scales, as under a bound that binds, since only the clamped scale counts.
    """
    architecture, dtype = settings.architecture, settings.dtype
    outputs, tasks = architecture.outputs, architecture.tasks
    shapes = dict.fromkeys(("scale", "jump", "offset", "first", "second", "third", "near", "nearer"), (tasks,))
    numbers = draw.uniforms(
        key, dtype, weight=(outputs, 6), bias=(outputs,), h=(6,), values=(outputs,), residues=(3, tasks), **shapes
    )
    scale = draw.magnitude(numbers["scale"])
    shift = scale * draw.heavy_tailed(numbers["first"]) * draw.log_between(1, 1e4, numbers["offset"])
    far = scale * draw.log_between(1e-3, 1e3, numbers["jump"])
    residues = draw.between(-90, 100, numbers["residues"]) * unit_roundoff(dtype)
    means = (
        shift,
        shift + far * draw.heavy_tailed(numbers["second"]),
        shift + scale * 1e-4 * draw.normal(numbers["third"]),
    )
    scales = (scale, far, scale * draw.between(0.9, 1.2, numbers["near"]))
    states = []
    for mean, deviation, residue, factor in zip(means, scales, residues, (4.0, 0.25, 9.0), strict=True):
        state = draw.statistics(mean, deviation, residue * mean)
        states.append(state._replace(variance=state.variance * factor))
    head = {"head.weight": draw.normal(numbers["weight"]) + 0.3, "head.bias": draw.normal(numbers["bias"]) - 0.2}
    first, second, third = states
    return _Example(
        head, draw.normal(numbers["h"]) + 0.1, first, second, third, values=draw.heavy_tailed(numbers["values"])
    )


def _wide(state: PopArtState) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, residue and scale in float64. Shift and residue stay apart: float64 can't hold their sum, either."""
    return state.shift.double(), state.residue.double(), state.scale.double()


def _shift_between(old: PopArtState, new: PopArtState) -> tuple[Tensor, Tensor]:
    """``μ − μ'``, and the sum of the absolute values of its two parts."""
    (old_shift, old_residue, _), (new_shift, new_residue, _) = _wide(old), _wide(new)
    shift, residue = old_shift - new_shift, old_residue - new_residue
    return shift + residue, shift.abs() + residue.abs()


@check("POP moves no unnormalized output", "2016, Prop. 1")
def pop_preserves_outputs(key: Tensor, settings: Settings) -> Discrepancy:
    """Proposition 1, ``σ' n' + μ' = σ n + μ``: the popped head's outputs are the same outputs in the new units.

    Roundings: 2 in each popped weight, 6 in the products and sums of a head with 6 inputs, 1 where the bias is added.
    """
    example = _draw(key, settings)
    weight, bias, h = example.wide
    parts = []
    for new in (example.second, example.third):
        popped = pop_art.pop(example.head, example.first, new)
        got = popped["head.weight"] @ example.h + popped["head.bias"]
        factor = example.first.scale.double() / new.scale.double()
        moved, size = _shift_between(example.first, new)
        expected = factor * (weight @ h + bias) + moved / new.scale.double()
        terms = factor * (weight.abs() @ h.abs() + bias.abs()) + size / new.scale.double()
        parts.append(compare(got, expected, terms, rounding_sides(settings.dtype) * (2 + 6 + 1), settings.dtype))
    return worst(*parts)


@check("POP by a detour = POP; there and back, and to the same = nothing", "2016, Prop. 1")
def pop_composes(key: Tensor, settings: Settings) -> Discrepancy:
    """POP from the first to the second to the third statistics is POP from the first to the third.

    POP there and back changes nothing, and POP to the same statistics changes no bit.

    Roundings: three pops, of 4 each in the bias.
    """
    example = _draw(key, settings)
    head, first, second = example.head, example.first, example.second
    weight, bias, _ = example.wide
    by_way = pop_art.pop(head, first, second)
    parts = []
    for last in (example.third, first):
        got = pop_art.pop(by_way, second, last)
        expected = pop_art.pop(head, first, last)
        factor = first.scale.double() / last.scale.double()
        # The shifts that the way through the second statistics adds up, in units of the last.
        size = (_shift_between(first, second)[1] + _shift_between(second, last)[1]) / last.scale.double()
        terms = {"head.weight": (factor[:, None] * weight).abs(), "head.bias": (factor * bias).abs() + size}
        parts.append(compare(got, expected, terms, 3 * POP, settings.dtype))
    same = pop_art.pop(head, first, first)
    parts.append(compare(same, head, head, 0, settings.dtype))
    return worst(*parts)


@check("POP keeps the folded head (σW, σb + μ)", "2016, Prop. 1")
def fold_is_invariant(key: Tensor, settings: Settings) -> Discrepancy:
    """The folded head ``(σW, σb + μ)`` equals its formula, before POP and after.

    Roundings: 4 in a pop; the product and two sums of the fold.
    """
    example = _draw(key, settings)
    head, old, new = example.head, example.first, example.second
    after = pop_art.fold(pop_art.pop(head, old, new), new)
    shift, residue, scale = _wide(old)
    weight, bias, _ = example.wide
    expected = {"head.weight": scale[:, None] * weight, "head.bias": (scale * bias + residue) + shift}
    size = (scale * bias).abs() + shift.abs()
    terms = {"head.weight": expected["head.weight"].abs(), "head.bias": size}
    moved = {"head.weight": terms["head.weight"], "head.bias": size + _shift_between(old, new)[1] + new.shift.abs()}
    sides = rounding_sides(settings.dtype)
    before = compare(pop_art.fold(head, old), expected, terms, sides * FOLD, settings.dtype)
    return worst(before, compare(after, expected, moved, sides * (POP + FOLD), settings.dtype))


@check("normalize = (y − μ)/σ, unnormalize = σn + μ, also while a bound binds", "2016, sec. 2")
def normalize_inverts(key: Tensor, settings: Settings) -> Discrepancy:
    """`normalize` is ``(y − μ)/σ`` and `unnormalize` is ``σ n + μ``, with the same clamped scale while a bound binds.

    Roundings: product and two sums; two differences and a quotient.
    """
    example = _draw(key, settings)
    values, count = example.values, rounding_sides(settings.dtype) * 3
    parts = []
    for state in (example.first, example.second):
        shift, residue, scale = _wide(state)
        outputs = pop_art.unnormalize(state, values)
        expected = (values.double() * scale + residue) + shift
        parts.append(compare(outputs, expected, (values.double() * scale).abs() + shift.abs(), count, settings.dtype))
        # For targets near the mean the shift cancels, and the residue becomes visible.
        targets = state.shift + state.scale * values
        difference = targets.double() - shift
        expected = (difference - residue) / scale
        terms = (difference.abs() + residue.abs()) / scale
        parts.append(compare(pop_art.normalize(state, targets), expected, terms, count, settings.dtype))
    return worst(*parts)


CHECKS = (pop_preserves_outputs, pop_composes, fold_is_invariant, normalize_inverts)
