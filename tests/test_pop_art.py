"""The laws of ART and POP, against closed forms in float64 and against rlax."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optree
import pytest
import rlax
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import popart_func as pf

FLOAT32, FLOAT64 = torch.float32, torch.float64


def random_state(tasks, dtype=FLOAT64):
    variance = torch.rand(tasks, dtype=dtype) * 9 + 0.5
    return pf.PopArtState(
        shift=torch.randn(tasks, dtype=dtype) * 100 + 30,
        scale=variance.sqrt(),
        variance=variance,
        count=torch.randint(1, 9, (tasks,), dtype=torch.int32),
        residue=torch.randn(tasks, dtype=dtype) * 1e-3,
    )


def random_head(outputs, dtype=FLOAT64, inputs=5):
    return {"weight": torch.randn(outputs, inputs, dtype=dtype) + 0.3, "bias": torch.randn(outputs, dtype=dtype) - 0.7}


def outputs_of(head, state, hidden):
    return pf.unnormalize(state, hidden @ head["weight"].mT + head["bias"])


# -------------------- ART


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
        step = step_size / (1 - (1 - step_size) ** time) if bias_correction and time > 1 else step_size
        step = 1.0 if bias_correction and time == 1 else step
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
    state = pf.init_state(1)
    for _ in range(3):
        state = pf.art(state, torch.tensor([1.0]), step_size=step_size, bias_correction=True)
    # A constant target from a corrected start: the mean is the target after any number of updates.
    assert float(state.shift + state.residue) == pytest.approx(1.0, rel=3e-7)


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
    target = torch.tensor([3.0], requires_grad=True)
    assert not any(field.requires_grad for field in pf.art(pf.init_state(1), target, step_size=0.5))


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


# -------------------- POP


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT64, 1e-12), (FLOAT32, 1e-4), (torch.bfloat16, 10.0)])
def test_outputs_are_preserved(dtype, tolerance):
    """Outputs are of the order 1e3: the tolerances are a few roundings of that."""
    head, hidden = random_head(3, dtype), torch.randn(20, 5).to(FLOAT64)
    state = random_state(3, FLOAT64 if dtype == FLOAT64 else FLOAT32)
    wide = {name: value.double() for name, value in head.items()}
    popped, new = pf.popart(3, 0.3).update(head, state, torch.tensor([900.0, -4.0, 50.0], dtype=state.shift.dtype))
    assert {value.dtype for value in popped.values()} == {dtype}
    assert (new.scale / state.scale).amax() > 2
    after = outputs_of({name: value.double() for name, value in popped.items()}, new, hidden)
    torch.testing.assert_close(after, outputs_of(wide, state, hidden), rtol=0, atol=tolerance)


def test_fold_is_what_pop_preserves():
    head, old, new = random_head(3), random_state(3), random_state(3)
    before, after = pf.fold(head, old), pf.fold(pf.pop(head, old, new), new)
    assert pf.tree.max_difference(before, after) < 1e-12
    hidden = torch.randn(5, dtype=FLOAT64)
    folded = hidden @ before["weight"].mT + before["bias"]
    torch.testing.assert_close(folded, outputs_of(head, old, hidden), rtol=1e-13, atol=1e-12)


def test_pop_composes_and_inverts():
    head, a, b, c = random_head(3), random_state(3), random_state(3), random_state(3)
    direct, detour = pf.pop(head, a, c), pf.pop(pf.pop(head, a, b), b, c)
    assert pf.tree.max_difference(direct, detour) < 1e-11
    assert pf.tree.max_difference(pf.pop(pf.pop(head, a, b), b, a), head) < 1e-11


def test_pop_to_the_same_statistics_is_the_identity_to_the_bit():
    head, state = random_head(3, FLOAT32), random_state(3, FLOAT32)
    assert all(torch.equal(value, head[name]) for name, value in pf.pop(head, state, state).items())


def test_pop_takes_prefixed_names_and_leading_axes():
    params = pf.init_params(lambda: pf.UnifiedModel(16, 10, 2), 0)
    upper = pf.split(params).upper
    old, new = random_state(2, FLOAT32), random_state(2, FLOAT32)
    popped = pf.pop(upper, old, new)
    assert list(popped) == list(upper)
    bare = pf.pop({name.rpartition(".")[2]: value for name, value in upper.items()}, old, new)
    assert torch.equal(popped["output_linear.weight"], bare["weight"])
    ensemble = optree.tree_map(lambda value: torch.stack([value, 2 * value]), upper)
    together = pf.pop(ensemble, old, new)
    assert torch.equal(together["output_linear.bias"][0], popped["output_linear.bias"])


def test_one_statistic_shared_by_all_outputs():
    head, old, new = random_head(4), random_state(1), random_state(1)
    hidden = torch.randn(5, dtype=FLOAT64)
    after = outputs_of(pf.pop(head, old, new), new, hidden)
    torch.testing.assert_close(after, outputs_of(head, old, hidden), rtol=1e-12, atol=1e-11)


def test_a_head_without_bias():
    head, state = {"weight": torch.randn(2, 3)}, random_state(2, FLOAT32)
    wider = state._replace(scale=state.scale * 2)
    torch.testing.assert_close(pf.pop(head, state, wider)["weight"], head["weight"] / 2)
    assert pf.fold(head, state)["bias"].shape == (2,)
    with pytest.raises(ValueError, match=r"pop: `params` has no bias.*shift that moves\. Give"):
        pf.pop(head, state, state._replace(shift=state.shift + 1))
    with pytest.raises(ValueError, match="inside a transform whether it moves cannot be known"):
        vmap(lambda shift: pf.pop(head, state, state._replace(shift=shift)))(state.shift[None])


def test_pop_can_be_differentiated():
    old, new = random_state(1), random_state(1)

    def output(weight):
        return pf.pop({"weight": weight, "bias": torch.zeros(1, dtype=FLOAT64)}, old, new)["weight"].sum()

    gradient = grad(output)(torch.ones(1, 2, dtype=FLOAT64))
    torch.testing.assert_close(gradient, (old.scale / new.scale).expand(1, 2))


# -------------------- normalize, unnormalize


def test_round_trip_with_indices_and_shapes():
    state = random_state(3)
    values = torch.randn(4, 2, dtype=FLOAT64)
    indices = torch.randint(0, 3, (4, 2))
    by_index = pf.normalize(state, values, indices)
    for place in np.ndindex(4, 2):
        task = int(indices[place])
        mean = state.shift[task] + state.residue[task]
        assert float(by_index[place]) == pytest.approx(float((values[place] - mean) / state.scale[task]), rel=1e-12)
    torch.testing.assert_close(pf.unnormalize(state, by_index, indices), values, rtol=1e-12, atol=1e-12)
    rows = torch.randn(2, 5, 3, dtype=FLOAT64)
    torch.testing.assert_close(pf.unnormalize(state, pf.normalize(state, rows)), rows, rtol=1e-12, atol=1e-12)
    one = random_state(1)
    for shape in ((), (1,), (7,), (7, 1)):
        assert pf.normalize(one, torch.zeros(shape)).shape == shape


def test_low_precision_values_are_normalized_in_the_statistics_dtype():
    state = pf.init_state(1)._replace(shift=torch.tensor([1000.0]))
    assert pf.normalize(state, torch.tensor(1002.0, dtype=torch.bfloat16)).dtype == FLOAT32
    assert pf.unnormalize(state, torch.tensor(3)).item() == 1003


# -------------------- parity


def test_rlax_parity():
    """rlax's rule is the sum: tasks twice and absent, bounds that bind. Small offsets: rlax cancels."""
    generator = np.random.default_rng(0)
    tasks, step_size, lower, upper = 4, 0.05, 0.5, 2.0
    _, rlax_update = rlax.popart(tasks, step_size, lower, upper)
    init, update = pf.popart(tasks, step_size, lower, upper, reduction="sum")
    head, state = random_head(tasks, FLOAT32), init()
    rlax_head = {"w": jnp.array(head["weight"].T.numpy()), "b": jnp.array(head["bias"].numpy())}
    rlax_state = rlax.PopArtState(jnp.zeros(tasks), jnp.ones(tasks), jnp.ones(tasks))
    clamped = set()
    for _ in range(60):
        indices = generator.integers(0, tasks - 1, 5)
        targets = (generator.standard_normal(5) * [0.1, 1, 3, 0.2, 1] * (indices + 0.1)).astype(np.float32)
        head, state = update(head, state, torch.tensor(targets), torch.tensor(indices))
        rlax_head, rlax_state = rlax_update(rlax_head, rlax_state, jnp.array(targets), jnp.array(indices))
        clamped |= {float(scale) for scale in state.scale if float(scale) in (lower, upper)}
        # rlax's own ν − μ² rounds at 1e-7 of ν, which is a few times σ² here.
        np.testing.assert_allclose(state.shift, rlax_state.shift, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.scale, rlax_state.scale, rtol=3e-6)
        np.testing.assert_allclose(head["weight"].T, rlax_head["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(head["bias"], rlax_head["b"], rtol=1e-5, atol=2e-6)
    assert clamped == {lower, upper}
    np.testing.assert_allclose(
        pf.normalize(state, torch.tensor(targets), torch.tensor(indices)),
        rlax.normalize(rlax_state, jnp.array(targets), jnp.array(indices)),
        rtol=1e-5,
        atol=1e-5,
    )


# -------------------- transforms


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_everything_is_a_lane(reduction):
    """vmap over head, state, targets, indices and every hyper-parameter gives what single calls give."""
    lanes, tasks = 5, 3
    heads = pf.tree.stack([random_head(tasks) for _ in range(lanes)])
    states = pf.tree.stack([random_state(tasks) for _ in range(lanes)])
    targets, indices = torch.randn(lanes, 4, dtype=FLOAT64) * 10, torch.randint(0, tasks, (lanes, 4))
    step_size = torch.linspace(0.01, 0.2, lanes, dtype=FLOAT64)
    lower, upper = torch.linspace(0.1, 3, lanes, dtype=FLOAT64), torch.linspace(3, 5, lanes, dtype=FLOAT64)

    def update(head, state, targets, indices, step_size, lower, upper, bias_correction):
        chosen = pf.popart(tasks, step_size, lower, upper, reduction=reduction, bias_correction=bias_correction)
        return chosen.update(head, state, targets, indices)

    for bias_correction in (False, True):
        arguments = (heads, states, targets, indices, step_size, lower, upper)
        together = vmap(lambda *lane: update(*lane, bias_correction))(*arguments)  # noqa: B023
        for lane, got in enumerate(pf.tree.unstack(together)):
            single = optree.tree_map(lambda leaf: leaf[lane], arguments)  # noqa: B023
            numbers = (float(value) for value in single[4:])
            alone = update(*single[:4], *numbers, bias_correction)
            # float64 numbers of order 1e2, a few roundings apart.
            assert pf.tree.max_difference(got, alone) < 1e-11


def test_inputs_are_left_alone():
    head, state = random_head(2), random_state(2)
    targets, indices = torch.ones(3, dtype=FLOAT64), torch.tensor([0, 1, 1])
    arguments = (head, state, targets, indices)
    before = optree.tree_map(torch.clone, arguments)
    for bias_correction in (False, True):
        pf.popart(2, 0.1, bias_correction=bias_correction).update(*arguments)
    pf.fold(head, state)
    pf.normalize(state, targets, indices)
    pf.unnormalize(state, targets, indices)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(arguments)))


# -------------------- errors

STATE = pf.init_state(3)
HEAD = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
T3 = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pf.art(STATE, T3, step_size=0.0), ValueError, "art: `step_size` must be > 0 and <= 1, got 0.0"),
        (lambda: pf.art(STATE, T3, step_size=1.5), ValueError, "art: `step_size` must be > 0 and <= 1, got 1.5"),
        (lambda: pf.art(STATE, T3, step_size=math.nan), ValueError, "`step_size` must be .* got nan"),
        (
            lambda: pf.art(STATE, T3, step_size="0.1"),
            TypeError,
            "`step_size` must be a number or a 0-d tensor, got str",
        ),
        (lambda: pf.art(STATE, T3, step_size=T3), ValueError, r"0-d tensor, got a tensor of shape \(3,\).*torch.vmap"),
        (lambda: pf.popart(3, 2), ValueError, "popart: `step_size` must be > 0 and <= 1, got 2"),
        (lambda: pf.popart(0, 0.1), ValueError, "popart: `num_outputs` must be at least 1, got 0"),
        (lambda: pf.popart(3, 0.1, scale_lb=0.0), ValueError, "popart: `scale_lb` must be > 0, got 0.0"),
        (lambda: pf.popart(3, 0.1, 2.0, 1.0), ValueError, "popart: `scale_ub` must be >= 2.0, got 1.0"),
        (
            lambda: pf.popart(3, 0.1, reduction="max"),
            ValueError,
            r"`reduction` must be one of \['mean', 'sum', 'sequential'\], got 'max'",
        ),
        (lambda: pf.art(STATE, [1.0], step_size=0.1), TypeError, "art: `targets` must be a tensor, got list"),
        (
            lambda: pf.art(STATE, T3 > 0, step_size=0.1),
            TypeError,
            "art: `targets` must be real numbers, got dtype torch.bool",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(4), step_size=0.1),
            ValueError,
            r"the last axis of `targets` must be the 3 tasks, got shape \(4,\). Pass `indices`",
        ),
        (lambda: pf.art(STATE, torch.tensor(1.0), step_size=0.1), ValueError, r"must be the 3 tasks, got shape \(\)"),
        (lambda: pf.art(STATE, T3, [0, 1, 2], step_size=0.1), TypeError, "art: `indices` must be a tensor, got list"),
        (
            lambda: pf.art(STATE, T3, T3, step_size=0.1),
            TypeError,
            "`indices` must be integers, got dtype torch.float32",
        ),
        (
            lambda: pf.art(STATE, T3, torch.tensor([0, 1]), step_size=0.1),
            ValueError,
            r"art: `targets` and `indices` must have the same shape, got \(3,\) and \(2,\)",
        ),
        (
            lambda: pf.art(STATE, T3, torch.tensor([0, 1, 3]), step_size=0.1),
            ValueError,
            r"art: `indices` must lie in \[0, 3\), got values from 0 to 3",
        ),
        (
            lambda: pf.normalize(STATE, T3, torch.tensor([0, -1, 2])),
            ValueError,
            r"normalize: `indices` must lie in \[0, 3\), got values from -1 to 2",
        ),
        (
            lambda: pf.unnormalize(STATE, torch.zeros(2)),
            ValueError,
            "unnormalize: the last axis of `values` must be the 3",
        ),
        (
            lambda: pf.art(pf.tree.stack([STATE, STATE]), T3, step_size=0.1),
            ValueError,
            r"fields of `state` must have shape \[tasks\], got \(2, 3\). For many lanes, use torch.vmap",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(20, 3), step_size=0.1, reduction="sum"),
            ValueError,
            "a task's 20 targets at step size 0.1 make one step of 2, which must not exceed 1",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(4), torch.tensor([1, 1, 0, 1]), step_size=0.5, reduction="sum"),
            ValueError,
            "a task's 3 targets at step size 0.5",
        ),
        (lambda: pf.pop({}, STATE, STATE), ValueError, r"pop: `params` must hold one linear layer.* got \[\]"),
        (lambda: pf.pop({"bias": T3}, STATE, STATE), ValueError, r"one linear layer.* got \['bias'\]"),
        (lambda: pf.pop({"w": HEAD["weight"]}, STATE, STATE), ValueError, r"one linear layer.* got \['w'\]"),
        (lambda: pf.pop({**HEAD, "a.weight": T3}, STATE, STATE), ValueError, "`split` cuts a network's parameters"),
        (
            lambda: pf.pop({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, STATE, STATE),
            ValueError,
            r"'weight' must have shape \[..., outputs, inputs\] with outputs = 3 tasks, got \(2, 3\)",
        ),
        (
            lambda: pf.fold({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, STATE),
            ValueError,
            r"fold: 'bias' must have shape \(3,\) to go with 'weight', got \(2,\)",
        ),
        (lambda: pf.init_state(0), ValueError, "init_state: `num_tasks` must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_indices_out_of_range_are_loud_under_vmap_too():
    for index in (3, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of|index"):
            vmap(lambda i: pf.art(STATE, torch.zeros(1), i, step_size=0.1))(torch.tensor([[index]]))
