"""Weights of targets: weight 0 is absent to the bit, whatever the target holds, in every reduction over samples."""

from __future__ import annotations

import math

import pytest
import torch
from random_heads import FLOAT32, FLOAT64, random_state

import popart_func as pf
from popart_func.moments import Moments, join, moments

REDUCTIONS = ["mean", "sum", "sequential"]


def weighted_batch(samples=12, tasks=3, dtype=FLOAT64):
    targets = torch.randn(samples, tasks, dtype=dtype) * torch.tensor([1.0, 30.0, 1e3]) + torch.tensor([5.0, -7.0, 1e4])
    weights = torch.rand(samples, tasks) * (torch.rand(samples, tasks) < 0.6)
    return targets.to(dtype), weights


def equal(first, second):
    return all(map(torch.equal, first, second))


def test_a_mask_leaves_padding_out():
    targets = torch.tensor([[10.0, 12, 14], [11, torch.nan, torch.inf]])
    alive = torch.tensor([[True, True, True], [True, False, False]])
    state = pf.art(pf.init_state(1), targets, weights=alive, step_size=1.0)
    assert state.shift == 11.75
    assert float(state.variance) == pytest.approx(2.1875, rel=1e-6)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf, -math.inf, 3e38])
def test_weight_0_is_absent_to_the_bit(junk, reduction, bias_correction):
    """By axis and by index, for bools and floats; a task without a target keeps its entries, its count included."""
    options = {"step_size": 1e-2, "reduction": reduction, "bias_correction": bias_correction}
    state = random_state(3, FLOAT32)
    targets = torch.randn(8, 3) * 50 + 20
    mask = torch.rand(8, 3) < 0.5
    mask[:, 2], mask[0, :2] = False, True
    held = torch.where(mask, targets, junk)
    by_axis = [pf.art(state, held, weights=kind, **options) for kind in (mask, mask.float(), mask.long())]
    of_task = torch.arange(3).expand(8, 3)
    by_index = pf.art(state, held, of_task, mask, **options)
    # As if the targets were not there at all. In another number of samples sums are rounded elsewhere.
    left_out = pf.art(state, targets[mask], of_task[mask], **options)
    for one in (*by_axis, by_index):
        for field, expected in zip(one, left_out, strict=True):
            torch.testing.assert_close(field, expected, rtol=1e-6, atol=1e-4)
        assert equal(one.count, left_out.count)
        assert equal([field[2] for field in one], [field[2] for field in state])
    assert all(equal(one, by_axis[0]) for one in by_axis)
    # To the bit: nothing of what an absent target holds is left.
    assert equal(by_axis[0], pf.art(state, torch.where(mask, targets, 1.5), weights=mask, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_is_a_number_of_targets(reduction):
    targets, _ = weighted_batch()
    times = torch.randint(0, 4, (12,))
    options = {"step_size": 1e-2, "reduction": reduction}
    state = random_state(3)
    weighted = pf.art(state, targets, weights=times[:, None], **options)
    repeated = pf.art(state, targets.repeat_interleave(times, 0), **options)
    for field, expected in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-12, atol=1e-11)


def test_moments_are_weighted_means():
    targets, weights = weighted_batch()
    got = moments(targets, None, 3, weights.double())
    for task in range(3):
        share, y = weights[:, task].double(), targets[:, task]
        mean = (share * y).sum() / share.sum()
        spread = (share * (y - mean) ** 2).sum() / share.sum()
        torch.testing.assert_close(got.mean[task] + got.residue[task], mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(got.spread[task], spread, rtol=1e-12, atol=0)
    halves = [moments(targets[rows], None, 3, weights[rows].double()) for rows in (slice(0, 5), slice(5, 12))]
    together = join(Moments(*map(torch.stack, zip(*halves, strict=True))))
    for field, expected in zip(together, got, strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_only_their_ratios_count_in_a_mean(reduction):
    targets, weights = weighted_batch()
    state, factor = random_state(3), 0.25 if reduction == "mean" else 1.0
    small = pf.art(state, targets, weights=weights * factor, step_size=1e-3, reduction=reduction)
    large = pf.art(state, targets, weights=weights, step_size=1e-3, reduction=reduction)
    for field, expected in zip(small, large, strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-13, atol=0)


def test_a_sequence_of_weighted_targets_comes_one_by_one():
    targets, weights = weighted_batch(6)
    options = {"step_size": 0.3, "bias_correction": True}
    together = pf.art(pf.init_state(3), targets, weights=weights, reduction="sequential", **options)
    state = pf.init_state(3)
    for row, weight in zip(targets, weights, strict=True):
        state = pf.art(state, row, weights=weight, **options)
    assert equal(together, state)
    assert together.count.tolist() == (weights > 0).sum(0).tolist()


@pytest.mark.parametrize("offset", [1e3, 1e7])
def test_float32_is_as_good_as_float64_with_weights(offset):
    """The scale within 1e-4 of float64, at offsets of 1e7, in 400 batches of targets ±1 with random weights."""
    narrow, wide = pf.init_state(2), pf.init_state(2, dtype=FLOAT64)
    for _ in range(400):
        targets = offset + torch.where(torch.rand(16, 2) < 0.4, 1.0, -1.0)
        weights = torch.rand(16, 2) * (torch.rand(16, 2) < 0.7)
        options = {"weights": weights, "step_size": 1e-2, "bias_correction": True}
        narrow = pf.art(narrow, torch.where(weights > 0, targets, torch.nan), **options)
        wide = pf.art(wide, targets.double(), **options)
    torch.testing.assert_close(narrow.scale.double(), wide.scale, rtol=1e-4, atol=0)
    distance = narrow.shift.double() + narrow.residue.double() - wide.shift - wide.residue
    assert (distance.abs() <= 1e-4 * wide.scale).all()


def test_bias_correction_counts_updates_with_targets_only():
    """β = 1/2: after targets 3 and 9, with empty batches before, between and behind, the mean is 3/3 + 2·9/3 = 7."""
    state = pf.init_state(1)
    for target, weight in ((99.0, 0.0), (3.0, 0.2), (math.nan, 0.0), (9.0, 7.0), (math.inf, 0.0)):
        weights = torch.tensor([weight])
        state = pf.art(state, torch.tensor([target]), weights=weights, step_size=0.5, bias_correction=True)
    assert float(state.shift + state.residue) == pytest.approx(7.0, rel=1e-6)
    assert state.count.tolist() == [2]


def test_errors():
    state, y = pf.init_state(2), torch.ones(3, 2)
    for weights, kind, message in (
        (torch.ones(3), ValueError, r"art: `weights` must have the shape of `targets`, \(3, 2\), or broadcast to it"),
        (torch.tensor([1.0, -1.0]), ValueError, "art: `weights` must be finite and at least 0"),
        (torch.tensor([1.0, torch.nan]), ValueError, "art: `weights` must be finite and at least 0"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "art: `weights` must be bools or real numbers"),
    ):
        with pytest.raises(kind, match=message):
            pf.art(state, y, weights=weights, step_size=0.1)
    with pytest.raises(ValueError, match=r"a task's 3 targets at step size 0.5 make one step of 1.5"):
        pf.art(state, y, weights=torch.tensor([1.0, 0.5]), step_size=0.5, reduction="sum")
