"""Weights of targets: weight 0 is absent to the bit, whatever the target holds, in every reduction over samples."""

from __future__ import annotations

import math

import pytest
import torch
from random_heads import FLOAT32, FLOAT64, random_state

import popart_func as pf
from popart_func.learners import losses
from popart_func.moments import Moments, by_task, join, moments, moments_of_all

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


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e7])
def test_moments_of_targets_that_are_all_there(offset):
    targets = torch.randn(7, 3, dtype=FLOAT64) + offset
    targets[:, 2] = targets[0, 2]
    for got, expected in zip(moments_of_all(targets), by_task(moments(targets, None, 3)), strict=True):
        assert got == pytest.approx(expected, rel=1e-13, abs=1e-13)
    assert got[2:] == (0.0, 0.0)


def test_moments_of_nothing_are_zero():
    nothing = moments(torch.full((3, 2), torch.nan), None, 2, torch.zeros(3, 2))
    joined = join(Moments(*map(torch.stack, zip(nothing, nothing, strict=True))))
    empty = moments(torch.zeros(0, 2), None, 2)
    assert not any(field.any() for of in (nothing, joined, empty) for field in of)


def test_a_batch_without_targets_changes_no_bit_of_the_joined_moments():
    """Nor does its mean, 0, become the point from which the others are measured."""
    far = moments(torch.tensor([[-10000001.0], [-10000002.0], [-10000004.0]]), None, 1)
    joined = join(Moments(*map(torch.stack, zip(moments(torch.zeros(0, 1), None, 1), far, strict=True))))
    assert all(map(torch.equal, joined, far))


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


class TestLearners:
    """Weights of a batch reach statistics, losses and gradients: an absent example is as if it were not there."""

    APPLY = staticmethod(pf.stateless(pf.UnifiedModel(4, 6, 2)))
    LEARNERS = pytest.mark.parametrize("name", ["sgd", "art", "popart", "normalized_sgd"])

    def learner(self, name, loss=None):
        make = getattr(pf, f"{name}_learner")
        options = {} if name == "normalized_sgd" or loss is None else {"loss": loss}
        if name == "sgd":
            return make(self.APPLY, pf.sgd(1e-3), **options)
        return make(self.APPLY, pf.sgd(0.05), pf.popart(2, 0.1), **options)

    def batch(self):
        return torch.randn(6, 4, dtype=FLOAT64), torch.randn(6, 2, dtype=FLOAT64) * 20 + 7

    @LEARNERS
    @pytest.mark.parametrize("by_index", [False, True])
    def test_an_absent_example_is_not_there(self, name, by_index):
        learner, (x, y) = self.learner(name), self.batch()
        params = {k: v.double() for k, v in pf.init_params(lambda: pf.UnifiedModel(4, 6, 2), 0).items()}
        state, alive = learner.init(params), torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
        junk = torch.where(alive[:, None], y, math.nan)
        if by_index:
            of = torch.tensor([0, 1, 1, 1, 0, 0])
            one = y.gather(1, of[:, None]).squeeze(1)
            whole = (x, torch.where(alive, one, math.inf), of, alive)
            left = (x[alive], one[alive], of[alive])
        else:
            whole, left = {"x": x, "y": junk, "weights": alive[:, None]}, (x[alive], y[alive])
        got, info = learner.update(state, whole)
        expected, expected_info = learner.update(state, left)
        assert pf.tree.max_difference(got, expected) < 1e-12
        torch.testing.assert_close(info.loss, expected_info.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(info.error[alive], expected_info.error, rtol=1e-12, atol=0)
        assert not info.error[~alive].any()

    @LEARNERS
    def test_weights_of_one_change_nothing_and_those_of_tasks_are_masks(self, name):
        learner, (x, y) = self.learner(name), self.batch()
        params = {k: v.double() for k, v in pf.init_params(lambda: pf.UnifiedModel(4, 6, 2), 0).items()}
        state = learner.init(params)
        got, expected = learner.update(state, (x, y, None, torch.ones(1))), learner.update(state, (x, y))
        assert pf.tree.max_difference(got, expected) < 1e-12
        # One target for each example, named by a mask or by an index.
        of = torch.tensor([0, 1, 1, 1, 0, 0])
        mask = torch.nn.functional.one_hot(of, 2).bool()
        by_mask, _ = learner.update(state, {"x": x, "y": torch.where(mask, y, math.nan), "weights": mask})
        by_index, _ = learner.update(state, (x, y.gather(1, of[:, None]).squeeze(1), of))
        if name != "sgd":  # its one statistic stands still
            assert pf.tree.max_difference(by_mask.statistics, by_index.statistics) < 1e-12
        assert pf.tree.max_difference(by_mask.params, by_index.params) < 1e-12

    def test_losses(self):
        """Huber's and the clipped value loss against their formulas, with weights and by index."""
        x, y = self.batch()
        params = {k: v.double() for k, v in pf.init_params(lambda: pf.UnifiedModel(4, 6, 2), 0).items()}
        weights = torch.tensor([[1.0, 0.5], [0, 2], [1, 1], [0, 0], [3, 1], [1, 0]], dtype=FLOAT64)
        learner = self.learner("popart", losses.huber(0.3))
        _, info = learner.update(learner.init(params), (x, y, None, weights))
        error = (info.normalized_prediction - info.normalized_target).abs()
        expected = torch.nn.functional.huber_loss(error, 0 * error, reduction="none", delta=0.3)
        torch.testing.assert_close(info.loss, (weights * expected).sum() / weights.amax(1).sum(), rtol=1e-12, atol=0)

        of, old = torch.tensor([0, 1, 1, 1, 0, 0]), torch.randn(6, dtype=FLOAT64) * 20
        learner = self.learner("popart", losses.clipped_value(0.2))
        batch = {"x": x, "y": y[:, 0], "indices": of, "old_value": old}
        state, info = learner.update(learner.init(params), batch)
        o, n, t = pf.normalize(state.statistics, old, of), info.normalized_prediction, info.normalized_target
        clipped = torch.minimum(torch.maximum(n, o - 0.2), o + 0.2)
        expected = 0.5 * torch.maximum((n - t) ** 2, (clipped - t) ** 2).mean()
        torch.testing.assert_close(info.loss, expected, rtol=1e-12, atol=0)
        wrong = self.learner("popart", lambda p, t, *_: (p - t).square().mean())
        with pytest.raises(
            ValueError, match=r"popart_learner: `loss` must return the loss of each target, of shape \(6, 2\)"
        ):
            wrong.update(wrong.init(params), (x, y))

    def test_info_tells_of_the_statistics(self):
        """The bound is met by the one target unlike all before; ratios and counts are the state's."""
        learner = pf.popart_learner(self.APPLY, pf.sgd(0.0), pf.popart(2, 0.01))
        params = pf.init_params(lambda: pf.UnifiedModel(4, 6, 2), 0)
        state = learner.init(params)
        for _ in range(3):
            before, (state, info) = state, learner.update(state, (torch.ones(4), torch.tensor([0.0, 1e-3])))
            assert info.bound_use.max() < 0.01
        before, (state, info) = state, learner.update(state, (torch.ones(4), torch.tensor([1e5, 0.0])))
        assert 0.999 < info.bound_use[0] <= 1.0001
        assert info.bound_use[1] < 0.01
        assert torch.equal(info.scale_ratio, before.statistics.scale / state.statistics.scale)
        assert info.count.tolist() == [4, 4]
        y, weights = torch.tensor([[1e7, 1.0], [5.0, 2.0], [5.0, 2.0]]), torch.tensor([[0.2], [1.0], [0.0]])
        _, info = learner.update(state, (torch.ones(3, 4), y, None, weights))
        assert 0.99 < info.bound_use[0, 0] <= 1.0001
        _, light = learner.update(state, (torch.ones(3, 4), y, None, weights / 8))
        torch.testing.assert_close(light.bound_use, info.bound_use)
        of = torch.tensor([0, 1, 0])
        _, info = learner.update(state, (torch.ones(3, 4), y[:, 0], of))
        assert 0.99 < info.bound_use[0] <= 1.0001

    @pytest.mark.parametrize("weights", [None, torch.tensor(2.0)])
    def test_info_of_a_0_d_target_is_0_d(self, weights):
        apply, popart = pf.stateless(pf.UnifiedModel(4, 6, 1)), pf.popart(1, 0.1, bias_correction=True)
        learner = pf.popart_learner(apply, pf.sgd(0.0), popart)
        state = learner.init(pf.init_params(lambda: pf.UnifiedModel(4, 6, 1), 0))
        _, info = learner.update(state, (torch.ones(4), torch.tensor(3.0), None, weights))
        assert {value.shape for value in info[:6]} == {info.bound_use.shape} == {()}

    @pytest.mark.parametrize("bias_correction", [False, True])
    @pytest.mark.parametrize("tasks", [1, 2])
    def test_a_sum_meets_its_bound_too(self, tasks, bias_correction):
        """By the target unlike all others, in batches with and without weights and indices."""
        popart = pf.popart(tasks, 0.01, reduction="sum", bias_correction=bias_correction)
        model = pf.UnifiedModel(4, 6, tasks)
        learner = pf.popart_learner(pf.stateless(model), pf.sgd(0.0), popart)
        first = learner.init(pf.init_params(lambda: pf.UnifiedModel(4, 6, tasks), 0))
        x, y, weights = torch.ones(3, 4), torch.zeros(3, tasks), torch.tensor([[2.0], [0.5], [0.25]])
        first, _ = learner.update(first, (x, y + torch.tensor([[0.0], [1e-3], [0.0]])))
        y[1, 0] = 1e5
        for batch in ((x, y), (x, y, None, weights), (x, y[:, 0], torch.zeros(3, dtype=torch.int64), weights[:, 0])):
            _, info = learner.update(first, batch)
            use = info.bound_use[1] if info.bound_use.ndim == 1 else info.bound_use[1, 0]
            assert float(use) == pytest.approx(1, abs=1e-3)
