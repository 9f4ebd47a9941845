"""Scales behind one interface: every test runs over all of them, and each has its own closed form."""

from __future__ import annotations

import math

import pytest
import torch
from random_heads import FLOAT64, random_head

import popart_func as pf
from popart_func import scales

SCALES = {
    "mean and deviation": lambda tasks, **options: pf.popart(tasks, 0.3, **options),
    "running moments": lambda tasks, **options: scales.running_moments(tasks, **options),
    "deviation": lambda tasks, **options: scales.deviation(tasks, 0.3, **options),
    "percentiles": lambda tasks, **options: scales.percentiles(tasks, 0.3, **options),
    "largest return": lambda tasks, **options: scales.largest_return(tasks, **options),
    "return-based": lambda tasks, **options: scales.return_based(tasks, 0.3, **options),
    "fixed": lambda tasks, **options: scales.fixed(torch.full((tasks,), 3.0), torch.full((tasks,), 7.0), **options),
}
EVERY = pytest.mark.parametrize("name", SCALES)
NO_SHIFT = {"deviation", "largest return", "return-based"}


def batch(name, samples=40, tasks=2):
    """Targets of a scale: return-based scaling has rewards and discounts beside the returns."""
    y = torch.randn(samples, tasks, dtype=FLOAT64) * torch.tensor([1e3, 0.1]) + torch.tensor([500.0, -3.0])
    if name != "return-based":
        return y.double()
    discounts = 0.99 * (torch.rand(samples, tasks) < 0.8)
    return torch.stack([y.double(), y.double() / 10, discounts.double()], -1)


def moved(name, state=None, y=None, tasks=2, **arguments):
    art = SCALES[name](tasks).art
    state = SCALES[name](tasks).init({"w": torch.zeros(1, dtype=FLOAT64)}) if state is None else state
    return art(state, batch(name, tasks=tasks) if y is None else y, **arguments)


@EVERY
def test_pop_preserves_predictions_and_normalize_inverts(name):
    popart, head, h = SCALES[name](2), random_head(2), torch.randn(9, 5, dtype=FLOAT64)
    state = popart.init(head)
    for _ in range(3):
        before = pf.unnormalize(state, h @ head["weight"].mT + head["bias"])
        folded = pf.fold(head, state)
        head, state = popart.update(head, state, batch(name))
        torch.testing.assert_close(
            pf.unnormalize(state, h @ head["weight"].mT + head["bias"]), before, rtol=1e-11, atol=1e-9
        )
        for key, leaf in pf.fold(head, state).items():
            torch.testing.assert_close(leaf, folded[key], rtol=1e-11, atol=1e-9)
    y = torch.randn(4, 2, dtype=FLOAT64)
    torch.testing.assert_close(pf.unnormalize(state, pf.normalize(state, y)), y, rtol=1e-12, atol=1e-12)
    if name != "fixed":
        assert state.scale[0] > 20 * state.scale[1]
        assert state.count.tolist() == [3, 3]
    assert not state.shift.any() or name not in NO_SHIFT


@EVERY
def test_weight_0_is_absent_and_a_task_without_targets_stays(name):
    y = batch(name)
    mask = torch.rand(40, 2) < 0.5
    state = moved(name)
    held = torch.where(mask[..., None] if name == "return-based" else mask, y, math.nan)
    got = moved(name, state, held, weights=mask)
    of = torch.arange(2).expand(40, 2)
    by_index = moved(name, state, y[mask], indices=of[mask])
    for field, expected in zip(got, by_index, strict=True):
        torch.testing.assert_close(field, expected, rtol=1e-11, atol=1e-9)
    assert got.count.dtype == torch.int32
    mask[:, 1] = False
    held = torch.where(mask[..., None] if name == "return-based" else mask, y, math.inf)
    alone = moved(name, state, held, weights=mask.double())
    assert all(torch.equal(field[1], before[1]) for field, before in zip(alone, state, strict=True))


@pytest.mark.parametrize("name", ["percentiles", "return-based"])
def test_one_target_alone_has_no_spread(name):
    """A spread of 0 would bring the scale down to its lower bound, and the head up by as much."""
    state, y = moved(name), batch(name, samples=3)
    with pytest.raises(ValueError, match=r"`targets` must be at least 2 in a batch, got shape \(1, 2"):
        moved(name, state, y[:1])
    with pytest.raises(ValueError, match="must be at least 2 in a batch"):
        moved(name, state, y[:1, 0], indices=torch.tensor([0]))
    alone = moved(name, state, y[:, 0], indices=torch.tensor([0, 1, 0]))
    masked = moved(name, state, y, weights=torch.tensor([[1.0, 0.3], [0.0, 0.0], [1.0, 0.0]]))
    expected = moved(name, state, y[[0, 2]])
    for got in (alone, masked):
        for field, before, after in zip(got, state, expected, strict=True):
            torch.testing.assert_close(field[0], after[0])
            assert torch.equal(field[1], before[1])
    assert all(map(torch.equal, moved(name, state, y[:0]), state))


@EVERY
@pytest.mark.usefixtures("unchecked")
def test_lanes_are_runs_of_their_own(name):
    y = torch.stack([batch(name), batch(name) * 3, batch(name) - 1])
    weights = torch.rand(3, 40, 2, dtype=FLOAT64)
    lanes = torch.vmap(lambda y, weights: moved(name, y=y, weights=weights))(y, weights)
    for lane in range(3):
        for field, expected in zip(lanes, moved(name, y=y[lane], weights=weights[lane]), strict=True):
            torch.testing.assert_close(field[lane], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", sorted(SCALES.keys() - {"return-based"}))
@pytest.mark.usefixtures("unchecked")
def test_learners_take_it(name):
    """At rate 0 no prediction moves; at another the error falls."""
    apply, init = pf.stateless(pf.UnifiedModel(4, 8, 2)), lambda: pf.UnifiedModel(4, 8, 2)
    x = torch.randn(32, 4)
    y = torch.stack([500 + 100 * x[:, 0], x[:, 1] - 3], -1)
    if name == "fixed":
        y = y / 30
    for rate, steps in ((0.0, 3), (0.1, 25)):
        learner = pf.popart_learner(apply, pf.sgd(rate), SCALES[name](2))
        state = learner.init(pf.init_params(init, 0))
        before, errors = pf.unnormalize(state.statistics, apply(state.params, x)), []
        for _ in range(steps):
            state, info = learner.update(state, (x, y))
            errors.append(info.error.mean(0))
        if not rate:
            after = pf.unnormalize(state.statistics, apply(state.params, x))
            torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
        else:
            assert (errors[-1] < 0.8 * errors[0]).all()


class TestClosedForms:
    def test_deviation(self):
        y = batch("deviation")
        state = moved("deviation", y=y)
        torch.testing.assert_close(state.variance, 0.7 + 0.3 * y.square().mean(0))
        torch.testing.assert_close(state.scale, state.variance.sqrt())

    def test_percentiles(self):
        y = batch("percentiles", samples=41)
        low, high = torch.quantile(y, torch.tensor([0.05, 0.95], dtype=FLOAT64), 0)
        state = scales.percentiles(2, 1.0).art(pf.init_state(2, dtype=FLOAT64), y)
        torch.testing.assert_close(state.shift + state.residue, (low + high) / 2, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.scale, (high - low) / 2, rtol=1e-12, atol=1e-12)
        halfway = scales.percentiles(2, 0.25).art(pf.init_state(2, dtype=FLOAT64), y)
        torch.testing.assert_close(halfway.shift, (low + high) / 8)
        torch.testing.assert_close(halfway.scale, 0.75 + (high - low) / 8)

    def test_largest_return(self):
        y = batch("largest return")
        popart = scales.largest_return(2, 5.0)
        state = popart.art(popart.art(pf.init_state(2, dtype=FLOAT64), y / 10), y)
        torch.testing.assert_close(state.scale, y.abs().amax(0) / 5)
        assert torch.equal(popart.art(state, y / 3).scale, state.scale)
        assert float(pf.normalize(state, y).abs().max()) == pytest.approx(5)

    def test_return_based(self):
        y = batch("return-based")
        returns, rewards, discounts = y.unbind(-1)
        expected = rewards.var(0, correction=0) + discounts.var(0, correction=0) * returns.square().mean(0)
        state = scales.return_based(2, 1.0).art(pf.init_state(2, dtype=FLOAT64), y)
        torch.testing.assert_close(state.variance, expected)
        with pytest.raises(ValueError, match="return_based: the last axis of `targets` must be 3, got shape"):
            scales.return_based(2, 1.0).art(pf.init_state(2), torch.ones(4, 2))

    def test_running_moments(self):
        y = torch.randn(50, 1, dtype=FLOAT64) * 10 + 5
        popart, state = scales.running_moments(1), pf.init_state(1, dtype=FLOAT64)
        for row in y:
            state = popart.art(state, row)
        torch.testing.assert_close(state.shift + state.residue, y.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(state.scale, y.std(0, correction=0), rtol=1e-12, atol=0)

    def test_bounds_and_bias_correction(self):
        y = torch.full((4, 1), 1e3)
        assert scales.deviation(1, 0.5, scale_ub=10.0).art(pf.init_state(1), y).scale == 10
        assert scales.deviation(1, 0.5, scale_ub=10.0).art(pf.init_state(1), y).variance > 1e5
        assert scales.percentiles(1, 0.5, scale_lb=3.0, bias_correction=True).art(pf.init_state(1), y).scale == 3
        corrected = scales.deviation(1, 1e-3, bias_correction=True).art(pf.init_state(1), y)
        assert float(corrected.scale) == pytest.approx(1e3)

    def test_bounds_are_checked(self):
        for name in ("deviation", "percentiles", "return_based"):
            with pytest.raises(ValueError, match=f"^{name}: `scale_ub` must be >= 2.0, got 1.0"):
                getattr(scales, name)(1, 0.1, 2.0, 1.0)
        with pytest.raises(ValueError, match=r"^fixed: `scale` must be > 0, got \[1.0, 0.0\]"):
            scales.fixed(torch.zeros(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("name", "part"), [*((name, 0) for name in SCALES), ("return-based", 1)])
def test_a_target_whose_square_is_infinite_is_forgotten(name, part):
    y = torch.randn(40, 1).clamp(-2, 2)
    if name == "return-based":
        y = torch.stack([y, y, torch.full_like(y, 0.9)], -1)  # discounts without variance: 0 times infinity is NaN
    far = y.clone()
    far.view(40, -1)[:10, part] = 1e21
    popart = SCALES[name](1)
    state = popart.art(popart.init(), far)
    for _ in range(0 if name in ("running moments", "largest return") else 300):  # which never forget a target
        state = popart.art(state, y)
        assert state.scale <= 1e6
    assert all(field.isfinite().all() for field in state)
    if name not in ("running moments", "largest return", "fixed"):
        assert state.scale < 10


@EVERY
def test_a_batch_without_targets_changes_nothing(name):
    state = moved(name)
    after = moved(name, state, batch(name)[:0])
    assert all(torch.equal(*pair) for pair in zip(after, state, strict=True))


def test_the_three_parts_of_a_return_based_target_are_no_outputs():
    """With as many outputs as parts, the statistic of each output is taken along the axis of outputs."""
    groups = torch.tensor([2, 0, 1])
    head = {"head.weight": torch.ones(3, 4), "head.bias": torch.zeros(3)}
    targets = torch.randn(9, 3, 3) * torch.tensor([1.0, 10, 100])[:, None]
    grouped, plain = (pf.scales.return_based(3, 1.0, groups=one) for one in (groups, None))
    _, _, state = grouped.update_network(head, (), grouped.init(head), targets, head="head")
    torch.testing.assert_close(state.scale[groups], plain.art(plain.init(head), targets).scale)
