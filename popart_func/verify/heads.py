"""POP preserves outputs: Proposition 1 and what follows from it, on heads and statistics of any magnitude.

Everything is judged in the new statistics' units, where the head computes, and against plain float64. The terms are
those of the formulas: the sum of the absolute values of what is added up.

A pop rounds twice in a weight, ``(σ/σ') W``, and four times at most in the bias: ratio, product and sum, or (shifts and
residues alike) difference, sum, quotient and sum.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from popart_func import pop_art
from popart_func.pop_art import PopArtState
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, sides, unit_roundoff, worst

__all__ = ["CHECKS"]

POP, FOLD = 4, 3
"""Roundings in a bias."""


class _Drawn(NamedTuple):
    weight: Tensor
    bias: Tensor
    h: Tensor
    first: PopArtState
    second: PopArtState
    third: PopArtState
    values: Tensor


def _draw(key: Tensor, settings: Settings) -> _Drawn:
    """A head, its inputs and three statistics: the second far from the first, the third near it, as after a small step.

    Shifts are up to thousands of scales away from zero, so that in the near pair the residues are what moves; residues
    are larger than `pop_art.art` leaves them, so that one that is forgotten shows everywhere. The variances say other
    scales, as where bounds bind: only the clamped scale counts.
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
    near = shift + scale * 1e-4 * draw.normal(numbers["third"])
    states = []
    for position, (mean, deviation) in enumerate(
        (
            (shift, scale),
            (shift + far * draw.heavy_tailed(numbers["second"]), far),
            (near, scale * draw.between(0.9, 1.2, numbers["near"])),
        )
    ):
        state = draw.statistics(mean, deviation, residues[position] * mean)
        states.append(state._replace(variance=state.variance * (4.0, 0.25, 9.0)[position]))
    return _Drawn(
        weight=draw.normal(numbers["weight"]) + 0.3,
        bias=draw.normal(numbers["bias"]) - 0.2,
        h=draw.normal(numbers["h"]) + 0.1,
        first=states[0],
        second=states[1],
        third=states[2],
        values=draw.heavy_tailed(numbers["values"]),
    )


def _head(drawn: _Drawn) -> dict[str, Tensor]:
    return {"head.weight": drawn.weight, "head.bias": drawn.bias}


def _wide(state: PopArtState) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, residue and scale in float64: the mean is not added up, for it does not fit there either."""
    return state.shift.double(), state.residue.double(), state.scale.double()


def _shift_between(old: PopArtState, new: PopArtState) -> tuple[Tensor, Tensor]:
    """``μ − μ'``, and the size of its two parts."""
    (old_shift, old_residue, _), (new_shift, new_residue, _) = _wide(old), _wide(new)
    shift, residue = old_shift - new_shift, old_residue - new_residue
    return shift + residue, shift.abs() + residue.abs()


def pop_preserves_outputs(key: Tensor, settings: Settings) -> Discrepancy:
    """``σ' n' + μ' = σ n + μ``: the popped head's output, held against the same output in the new units.

    Roundings: 2 in each popped weight, 6 in the products and sums of a head with 6 inputs, 1 where the bias is added.
    """
    drawn = _draw(key, settings)
    parts = []
    for new in (drawn.second, drawn.third):
        popped = pop_art.pop(_head(drawn), drawn.first, new)
        got = popped["head.weight"] @ drawn.h + popped["head.bias"]
        weight, bias, h = drawn.weight.double(), drawn.bias.double(), drawn.h.double()
        factor = drawn.first.scale.double() / new.scale.double()
        moved, size = _shift_between(drawn.first, new)
        expected = factor * (weight @ h + bias) + moved / new.scale.double()
        terms = factor * (weight.abs() @ h.abs() + bias.abs()) + size / new.scale.double()
        parts.append(compare(got, expected, terms, sides(settings.dtype) * (2 + 6 + 1), settings.dtype))
    return worst(*parts)


def pop_composes(key: Tensor, settings: Settings) -> Discrepancy:
    """From the first to the second to the third is from the first to the third; there and back again is nothing.

    Roundings: three pops, of 4 each in the bias.
    """
    drawn = _draw(key, settings)
    head, (first, second, third) = _head(drawn), (drawn.first, drawn.second, drawn.third)
    by_way = pop_art.pop(head, first, second)
    parts = []
    for last in (third, first):
        got = pop_art.pop(by_way, second, last)
        expected = pop_art.pop(head, first, last)
        factor = first.scale.double() / last.scale.double()
        # What the way through the second statistics adds up, in units of the last.
        size = (_shift_between(first, second)[1] + _shift_between(second, last)[1]) / last.scale.double()
        terms = {
            "head.weight": (factor[:, None] * drawn.weight.double()).abs(),
            "head.bias": (factor * drawn.bias.double()).abs() + size,
        }
        parts.append(compare(got, expected, terms, 3 * POP, settings.dtype))
    same = pop_art.pop(head, first, first)
    parts.append(compare(same, head, head, 0, settings.dtype))
    return worst(*parts)


def fold_is_invariant(key: Tensor, settings: Settings) -> Discrepancy:
    """``(σW, σb + μ)`` is the same before and after POP, and is what the head's outputs are.

    Roundings: a pop's 4, and the fold's product and two sums.
    """
    drawn = _draw(key, settings)
    head, old, new = _head(drawn), drawn.first, drawn.second
    after = pop_art.fold(pop_art.pop(head, old, new), new)
    shift, residue, scale = _wide(old)
    weight, bias = drawn.weight.double(), drawn.bias.double()
    expected = {"head.weight": scale[:, None] * weight, "head.bias": (scale * bias + residue) + shift}
    size = (scale * bias).abs() + shift.abs()
    terms = {"head.weight": expected["head.weight"].abs(), "head.bias": size}
    moved = {"head.weight": terms["head.weight"], "head.bias": size + _shift_between(old, new)[1] + new.shift.abs()}
    before = compare(pop_art.fold(head, old), expected, terms, sides(settings.dtype) * FOLD, settings.dtype)
    return worst(before, compare(after, expected, moved, sides(settings.dtype) * (POP + FOLD), settings.dtype))


def normalize_inverts_unnormalize(key: Tensor, settings: Settings) -> Discrepancy:
    """``(y − μ)/σ`` and ``σ n + μ``, each against float64, while bounds bind: one scale, clamped, in both.

    Roundings: product and two sums; two differences and a quotient.
    """
    drawn = _draw(key, settings)
    values, count = drawn.values, sides(settings.dtype) * 3
    parts = []
    for state in (drawn.first, drawn.second):
        shift, residue, scale = _wide(state)
        outputs = pop_art.unnormalize(state, values)
        expected = (values.double() * scale + residue) + shift
        parts.append(compare(outputs, expected, (values.double() * scale).abs() + shift.abs(), count, settings.dtype))
        # Targets near the mean, where only the residue is left of it.
        targets = state.shift + state.scale * values
        difference = targets.double() - shift
        expected = (difference - residue) / scale
        terms = (difference.abs() + residue.abs()) / scale
        parts.append(compare(pop_art.normalize(state, targets), expected, terms, count, settings.dtype))
    return worst(*parts)


CHECKS = (
    Check(
        "pop_preserves_outputs",
        "POP moves no unnormalized output",
        "2016, Prop. 1",
        pop_preserves_outputs,
    ),
    Check(
        "pop_composes",
        "POP by a detour = POP; there and back, and to the same = nothing",
        "2016, Prop. 1",
        pop_composes,
    ),
    Check(
        "fold_is_invariant",
        "the folded head (σW, σb + μ) is what POP keeps",
        "2016, Prop. 1",
        fold_is_invariant,
    ),
    Check(
        "normalize_inverts",
        "normalize = (y − μ)/σ, unnormalize = σn + μ, also while a bound binds",
        "2016, sec. 2",
        normalize_inverts_unnormalize,
    ),
)
