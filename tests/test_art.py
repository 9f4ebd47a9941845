"""The laws of ART, against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_heads import FLOAT32, FLOAT64, random_head, random_state
from torch.func import grad

import popart_func as pf
from popart_func.moments import Moments, join, moments


def test_init():
    state = pf.popart(3, 0.1).init()
    assert [field.tolist() for field in state] == [[0] * 3, [1] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert state.count.dtype == torch.int32
    assert {field.dtype for field in state} == {FLOAT32, torch.int32}
    assert pf.popart(3, 0.1).init(random_head(3)).shift.dtype == FLOAT64
    assert pf.popart(3, 0.1).init(random_head(3, torch.bfloat16)).shift.dtype == FLOAT32


@settings(deadline=None, max_examples=50)
@given(
    step_size=st.floats(1e-4, 1.0),
    targets=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20),
    bias_correction=st.booleans(),
)
def test_statistics_are_weighted_moments(step_size, targets, bias_correction):
    """One target at a time: μ and σ² are the weighted mean and variance with the weights β_t Π (1 − β_k)."""
    state, weights, values = pf.init_state(1, dtype=FLOAT64), [1.0], [0.0]
    variances = [1.0]  # The start counts as a cloud of mean 0 and variance 1.
    for time, target in enumerate(targets, start=1):
        step = step_size
        if bias_correction and step_size < 1 and time > 1:
            step = step_size / -math.expm1(time * math.log1p(-step_size))
        elif bias_correction:
            step = 1.0
        weights = [weight * (1 - step) for weight in weights] + [step]
        values, variances = [*values, target], [*variances, 0.0]
        state = pf.art(
            state,
            torch.tensor([target], dtype=FLOAT64),
            step_size=step_size,
            bias_correction=bias_correction,
        )
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    variance = math.fsum(w * (s + (v - mean) ** 2) for w, v, s in zip(weights, values, variances, strict=True))
    # float64 over 20 steps on numbers up to 1e3: 20 · 2⁻⁵³ · 1e3, and its square for the variance, with a factor of 10.
    assert float(state.shift + state.residue) == pytest.approx(mean, rel=1e-12, abs=1e-10)
    assert float(state.variance) == pytest.approx(variance, rel=1e-9, abs=1e-8)
    assert int(state.count) == len(targets)


def test_bias_corrected_weights_of_a_running_mean():
    """β = 1/2: weights 1/3 and 2/3 after two updates; and the first step is exactly 1."""
    state = pf.init_state(1)
    for target in (3.0, 9.0):
        state = pf.art(state, torch.tensor([target]), step_size=0.5, bias_correction=True)
        if target == 3.0:
            assert state.shift == 3.0
            assert state.variance == 0.0
    assert float(state.shift + state.residue) == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize("step_size", [1e-4, 0.3, 1.0])
def test_bias_correction_is_exact_for_small_steps(step_size):
    """In float32, 1 − (1−β)^t computed as written is off by 1e-3 at β = 1e-4."""
    narrow, wide = (pf.init_state(1, dtype=dtype) for dtype in (FLOAT32, FLOAT64))
    for target in (1.0, 5.0, -3.0, 20.0):
        narrow = pf.art(narrow, torch.tensor([target]), step_size=step_size, bias_correction=True)
        wide = pf.art(wide, torch.tensor([target], dtype=FLOAT64), step_size=step_size, bias_correction=True)
    assert float(narrow.shift + narrow.residue) == pytest.approx(float(wide.shift), rel=1e-6)
    assert float(narrow.scale) == pytest.approx(float(wide.scale), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 32])
def test_the_variance_does_not_cancel_when_a_step_forgets_everything(batch):
    """Small targets after a variance of 1, or 1e12: at β_1 = 1 nothing of the old one may be left as rounding."""
    targets = torch.randn(3, batch, 1) * 2e-3
    for start in (1.0, 1e12):
        states = []
        for dtype in (FLOAT32, FLOAT64):
            state = pf.init_state(1, dtype=dtype)._replace(variance=torch.tensor([start], dtype=dtype))
            for row in targets:
                state = pf.art(state, row.to(dtype), step_size=3e-4, bias_correction=True)
            states.append(state)
        assert float(states[0].scale) == pytest.approx(float(states[1].scale), rel=1e-5)
    forgotten = pf.art(pf.init_state(1), torch.tensor([[1e6], [-1e6]]), step_size=1.0)
    assert pf.art(forgotten, torch.tensor([[1.0], [3.0]]), step_size=1.0).scale == 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
@pytest.mark.parametrize("samples", [2, 16, 64])
@pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
def test_the_first_batch_may_be_far_from_everything(offset, samples, reduction):
    """β_1 = 1: the statistics are those of the batch, from whatever start, though float32 can't hold the mean."""
    targets = offset + torch.where(torch.rand(samples, 2) < 0.4, 1.0, -1.0)
    targets[:2] = offset + torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    step_size = 1e-2 / samples if reduction == "sum" else 1e-2
    for start in (0.0, -1234.567, offset + 0.3, -offset):
        first = pf.init_state(2)._replace(shift=torch.full((2,), start))
        wide = pf.PopArtState(*(field.to(FLOAT64) for field in first))._replace(count=first.count)
        options = {"step_size": step_size, "bias_correction": True, "reduction": reduction}
        by_axis, exact = pf.art(first, targets, **options), pf.art(wide, targets.double(), **options)
        by_index = pf.art(first, targets.reshape(-1), torch.arange(2).repeat(samples), **options)
        for state in (by_axis, by_index):
            torch.testing.assert_close(state.scale.double(), exact.scale, rtol=1e-5, atol=0)
            distance = state.shift.double() + state.residue.double() - exact.shift - exact.residue
            assert (distance.abs() <= 1e-5 * exact.scale).all()
    mean = targets.double().mean(0)
    if reduction != "sequential":
        torch.testing.assert_close(exact.shift + exact.residue, mean, rtol=1e-12, atol=0)
        around_zero = targets.double() - offset
        torch.testing.assert_close(exact.scale, around_zero.std(0, correction=0), rtol=1e-12, atol=0)


class TestEqualTargets:
    """With bias correction, targets that are all equal leave a scale that a network can live with."""

    @pytest.mark.parametrize("value", [1000.0, -3e-3, 1e5, 5.25])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_the_scale_is_their_distance_from_the_mean_before(self, value, batch):
        state = pf.init_state(1)._replace(shift=torch.tensor([5.0]))
        for _ in range(3):
            state = pf.art(state, torch.full((batch, 1), value), step_size=0.01, bias_correction=True)
            assert state.variance == 0
            assert float(state.scale) == pytest.approx(abs(value - 5), rel=1e-6)
            assert pf.normalize(state, torch.tensor([value])) == 0

    def test_the_scale_stays_where_they_are_the_mean_before(self):
        state = pf.init_state(1)._replace(scale=torch.tensor([7.0]))
        assert pf.art(state, torch.tensor([0.0]), step_size=0.01, bias_correction=True).scale == 7

    def test_from_the_second_value_on_it_is_their_deviation(self):
        state = pf.init_state(1, dtype=FLOAT64)
        for target in (300.0, 300.0, 500.0):
            state = pf.art(state, torch.tensor([target]), step_size=0.5, bias_correction=True)
        # Weights 1/7, 2/7 and 4/7.
        assert float(state.scale) == pytest.approx(200 * math.sqrt(12) / 7, rel=1e-12)

    def test_no_prediction_moves_and_the_head_stays_finite(self):
        head = {"weight": torch.randn(1, 3), "bias": torch.randn(1)}
        init, update = pf.popart(1, 0.01, bias_correction=True)
        new, state = update(head, init(), torch.tensor([1000.0]))
        before, after = pf.fold(head, init()), pf.fold(new, state)
        torch.testing.assert_close(after["weight"], before["weight"])
        torch.testing.assert_close(after["bias"], before["bias"], rtol=0, atol=1e-4)
        assert new["weight"].abs().max() <= head["weight"].abs().max()

    def test_an_offset_is_learned_as_well_as_without_correction(self):
        """``100 + 10 sin``, one target at a time, by Adam: the mean error over the last 1000 of 20,000 steps."""
        lanes, steps = 16, 20_000

        def make():
            return torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

        x = torch.randn(steps, lanes, 4)
        y = 100 + 10 * x.sum(-1, keepdim=True).sin()
        errors = {}
        for bias_correction in (False, True):
            popart = pf.popart(1, 0.01, bias_correction=bias_correction)
            learner = pf.popart_learner(pf.stateless(make()), pf.adam(3e-3), popart, head="2")
            start = torch.vmap(learner.init)(pf.init_lanes(make, range(lanes)))

            def step(state, batch, learner=learner):
                state, info = learner.update(state, batch)
                return state, (info.error, info.loss)

            _, (error, loss) = pf.scan_lanes(step, start, (x, y), shared=False)
            assert loss[0].max() < 100
            errors[bias_correction] = float(error[-1000:].mean())
        assert errors[True] <= 1.25 * errors[False]

    def test_without_correction_a_step_of_1_still_takes_the_lower_bound(self):
        assert pf.art(pf.init_state(1), torch.tensor([9.0]), step_size=1.0, scale_lb=0.5).scale == 0.5


class TestEndsOfTheNumberRange:
    def test_targets_of_the_greatest_magnitude_leave_no_nan(self):
        largest = torch.finfo(torch.float32).max
        state = pf.init_state(1)
        for target in (largest, -largest, largest):
            state = pf.art(state, torch.tensor([[target], [-target], [target]]), step_size=0.1)
            assert all(field.isfinite().all() for field in state)
        for _ in range(2000):
            state = pf.art(state, torch.tensor([[4.0], [6.0]]), step_size=0.1)
        assert float(state.shift) == pytest.approx(5, rel=1e-5)
        assert float(state.scale) == pytest.approx(1, rel=1e-4)

    @pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_what_is_not_finite_makes_nan_of_its_task_alone(self, wrong, batch):
        targets = torch.ones(batch, 2)
        targets[0, 1] = wrong
        state = pf.art(pf.init_state(2), targets, step_size=0.1)
        assert all(field[0].isfinite() for field in state)
        assert state.shift[1].isnan()
        assert state.scale[1].isnan()

    def test_the_scale_never_underflows(self):
        state = pf.art(pf.init_state(1), torch.zeros(1), step_size=1.0, scale_lb=1e-60)
        assert state.scale == torch.finfo(torch.float32).tiny
        assert pf.normalize(state, torch.zeros(1)) == 0

    def test_the_count_stops_at_its_end(self):
        end = 2**31 - 1
        state = pf.init_state(1)._replace(count=torch.tensor([end], dtype=torch.int32))
        state = pf.art(state, torch.tensor([100.0]), step_size=0.1, bias_correction=True)
        assert state.count == end
        assert float(state.shift) == pytest.approx(10)


def test_reciprocal_steps_give_the_sample_moments():
    """β_t = 1/t: mean and biased variance of the sample."""
    targets = torch.randn(50, dtype=FLOAT64) * 3 + 11
    state = pf.init_state(1, dtype=FLOAT64)
    for time, target in enumerate(targets, start=1):
        state = pf.art(state, target[None], step_size=1 / time)
    assert float(state.shift + state.residue) == pytest.approx(float(targets.mean()), rel=1e-13)
    assert float(state.variance) == pytest.approx(float(targets.var(correction=0)), rel=1e-12)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_task_axis_equals_indices(reduction, bias_correction):
    state = random_state(3)
    targets = torch.randn(4, 3, dtype=FLOAT64) * 5 + 2
    options = {"step_size": 0.1, "reduction": reduction, "bias_correction": bias_correction}
    by_axis = pf.art(state, targets, **options)
    indices = torch.arange(3).expand(4, 3)
    if reduction == "sequential":
        by_index = state
        for row in targets:
            by_index = pf.art(by_index, row, torch.arange(3), step_size=0.1, bias_correction=bias_correction)
    else:
        by_index = pf.art(state, targets, indices, **options)
    assert pf.tree.max_difference(by_axis, by_index) < 1e-12
    shuffled = torch.randperm(12)
    if reduction != "sequential":
        again = pf.art(state, targets.reshape(-1)[shuffled], indices.reshape(-1)[shuffled], **options)
        assert pf.tree.max_difference(by_axis, again) < 1e-12


def test_mean_is_one_update_on_the_batch_moments():
    state = pf.init_state(1, dtype=FLOAT64)
    targets = torch.tensor([1.0, 2.0, 6.0], dtype=FLOAT64)
    new = pf.art(state, targets, step_size=0.25)
    first, second = 0.25 * 3.0, 0.75 * 1 + 0.25 * float(targets.square().mean())
    assert float(new.shift) == pytest.approx(first, rel=1e-14)
    assert float(new.variance) == pytest.approx(second - first**2, rel=1e-14)
    assert int(new.count) == 1


def test_sequential_is_one_by_one():
    state = random_state(2)
    targets, indices = torch.tensor([3.0, -1.0, 8.0], dtype=FLOAT64), torch.tensor([1, 0, 1])
    expected = state
    for target, index in zip(targets, indices, strict=True):
        expected = pf.art(expected, target, index, step_size=0.2)
    got = pf.art(state, targets, indices, step_size=0.2, reduction="sequential")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_absent_tasks_stay_bit_equal(reduction, bias_correction):
    state = random_state(4, FLOAT32)
    head = random_head(4, FLOAT32)
    update = pf.popart(4, 0.1, reduction=reduction, bias_correction=bias_correction).update
    popped, new = update(head, state, torch.tensor([5.0, 7.0, 1e30]), torch.tensor([2, 0, 2]))
    for absent in (1, 3):
        assert all(torch.equal(before[absent], after[absent]) for before, after in zip(state, new, strict=True))
        assert all(torch.equal(head[name][absent], popped[name][absent]) for name in head)
    for present in (0, 2):
        assert new.shift[present] != state.shift[present]


def test_a_nan_target_stays_in_its_task():
    state = random_state(3, FLOAT32)
    new = pf.art(state, torch.tensor([torch.nan, 2.0]), torch.tensor([1, 0]), step_size=0.1)
    clean = pf.art(state, torch.tensor([2.0]), torch.tensor([0]), step_size=0.1)
    assert torch.isnan(new.shift[1])
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(new, clean, strict=True))


def test_sequential_updates_keep_the_bounds():
    options = {"step_size": 0.5, "scale_lb": 7.0, "scale_ub": 8.0}
    for targets, bound in (([0.0, 0.1], 7.0), ([0.0, 1e3], 8.0)):
        assert pf.art(pf.init_state(1), torch.tensor(targets), reduction="sequential", **options).scale == bound


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_of_any_integer_dtype(dtype):
    state, targets, indices = random_state(3), torch.ones(2, dtype=FLOAT64), torch.tensor([2, 0])
    for call in (lambda i: pf.art(state, targets, i, step_size=0.1), lambda i: pf.normalize(state, targets, i)):
        assert pf.tree.max_difference(call(indices), call(indices.to(dtype))) == 0


def test_an_empty_batch_changes_nothing():
    state = random_state(2, FLOAT32)
    for arguments in ((torch.empty(0, 2),), (torch.empty(0), torch.empty(0, dtype=torch.int64))):
        new = pf.art(state, *arguments, step_size=0.1)
        assert all(torch.equal(a, b) for a, b in zip(state, new, strict=True))


def test_a_bound_that_stops_binding_leaves_no_trace():
    free, bound = pf.init_state(1), pf.init_state(1)
    for target in (5.0, 5.1, 5.0):
        bound = pf.art(bound, torch.tensor([target]), step_size=0.5, scale_lb=10.0, scale_ub=20.0)
        free = pf.art(free, torch.tensor([target]), step_size=0.5)
    assert bound.scale == 10.0
    assert free.scale < 10
    assert torch.equal(bound.variance, free.variance)


def test_statistics_dtype():
    state = pf.init_state(1)
    assert pf.art(state, torch.tensor([1.0], dtype=FLOAT64), step_size=0.1).shift.dtype == FLOAT64
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        assert pf.art(state, torch.tensor([1], dtype=dtype), step_size=0.1).shift.dtype == FLOAT32
    double = pf.init_state(1, dtype=FLOAT64)
    step = torch.tensor(0.1, dtype=FLOAT64)
    assert pf.art(double, torch.tensor([1.0]), step_size=step).shift.item() == pytest.approx(0.1, rel=1e-15)


def test_no_gradient_flows_through_the_statistics():
    def scale(target):
        return pf.art(pf.init_state(1), target[None], step_size=0.5).scale.sum()

    assert grad(scale)(torch.tensor(3.0)) == 0
    assert (
        grad(lambda size: pf.art(pf.init_state(1), torch.tensor([3.0]), step_size=size).shift.sum())(torch.tensor(0.1))
        == 0
    )
    for reduction in ("mean", "sequential"):
        target, size = torch.tensor([3.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
        state = pf.init_state(1)
        state = state._replace(
            shift=state.shift.clone().requires_grad_(), variance=state.variance.clone().requires_grad_()
        )
        new = pf.art(state, target, step_size=size, scale_ub=size * 1e6, reduction=reduction, bias_correction=True)
        assert not any(field.requires_grad for field in new)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_bound_of_proposition_2_is_met_by_one_target_unlike_the_others_of_its_batch(reduction, bias_correction):
    options = {"step_size": 0.125, "reduction": reduction, "bias_correction": bias_correction}
    popart, y = pf.popart(1, **options), torch.zeros(4, 1, dtype=FLOAT64)
    state = pf.init_state(1, dtype=FLOAT64)._replace(variance=torch.zeros(1, dtype=FLOAT64))
    state = pf.art(state, y, **options)
    y[2] = 1e4
    state = pf.art(state, y, **options)
    bound = popart.bound(state.count, 0.25, 4.0, FLOAT64)
    torch.testing.assert_close(pf.normalize(state, y[2]).abs(), bound.reshape(1), rtol=1e-6, atol=0)


def test_a_step_of_1_leaves_nothing_but_the_batch():
    assert pf.popart(1, 1.0).bound(torch.tensor([3]), 1.0, 1.0, FLOAT32) == 0
    assert pf.popart(1, 0.1, reduction="sequential").bound is None


def test_a_sequence_is_gathered_from_processes_that_have_different_numbers_of_targets():
    """Another process has the same targets and two more."""
    targets, more = torch.randn(3, 2, dtype=FLOAT64), torch.tensor([[5.0, 7.0], [8.0, -3.0]], dtype=FLOAT64)

    def gather(own):
        if not own.ndim:
            return torch.stack([own, own + 2])
        return torch.stack([own, torch.cat([own[:3], more])])

    state, options = random_state(2), {"step_size": 0.25, "reduction": "sequential"}
    got = pf.art(state, targets, gather=gather, **options)
    expected = pf.art(state, torch.cat([targets, targets, more]), **options)
    assert all(map(torch.equal, got, expected))


def test_proposition_2_is_kept_and_reached():
    """|y − μ| / σ <= √((1−β)/β) for the target just taken, with equality after a constant past."""
    for step_size in (0.5, 0.1, 1e-2, 1e-4):
        bound = math.sqrt((1 - step_size) / step_size)
        state = pf.init_state(1, dtype=FLOAT64)._replace(variance=torch.zeros(1, dtype=FLOAT64))
        new = pf.art(state, torch.tensor([1e4], dtype=FLOAT64), step_size=step_size)
        reached = float(pf.normalize(new, torch.tensor([1e4], dtype=FLOAT64)).abs())
        assert reached == pytest.approx(bound, rel=1e-12)
        state = pf.init_state(1)
        for target in torch.randn(40) * 10 ** torch.empty(40).uniform_(-2, 6):
            state = pf.art(state, target[None], step_size=step_size)
            # float32: a few roundings of y, μ and σ.
            assert float(pf.normalize(state, target[None]).abs()) <= bound * (1 + 1e-6)


def test_a_task_without_targets_has_moments_of_zero():
    by_index = moments(torch.tensor([3.0, 5.0]), torch.tensor([0, 0]), 2)
    by_weight = moments(torch.tensor([[3.0, torch.inf]]), None, 2, torch.tensor([[1.0, 0.0]]))
    joined = join(Moments(*(torch.stack([one, other]) for one, other in zip(by_index, by_weight, strict=True))))
    for found in (by_index, by_weight, joined):
        assert [field[1].item() for field in found] == [0] * 4
        assert found.mean[0] > 0
