"""Each optimizer against torch.optim and optax, on the change it makes, not on the result."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import optree
import pytest
import torch
from torch.func import vmap

import popart_func as pf
from popart_func import optim

TABLE = {
    "sgd": (lambda: pf.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1), lambda: optax.sgd(0.1)),
    "momentum": (
        lambda: pf.sgd(0.1, momentum=0.8),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8),
        lambda: optax.sgd(0.1, momentum=0.8),
    ),
    "nesterov": (
        lambda: pf.sgd(0.1, momentum=0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True),
        lambda: optax.sgd(0.1, momentum=0.8, nesterov=True),
    ),
    "adam": (
        lambda: pf.adam(0.1, b1=0.7, b2=0.99, eps=1e-3),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.7, 0.99), eps=1e-3),
        lambda: optax.adam(0.1, b1=0.7, b2=0.99, eps=1e-3),
    ),
    "adam_b1_0": (
        lambda: pf.adam(0.1, b1=0.0),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.999)),
        lambda: optax.adam(0.1, b1=0.0),
    ),
}
PARAMS = {
    "w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64),
    "b": torch.tensor([4.0], dtype=torch.float64),
}


def gradients(steps, dtype=torch.float64):
    return [optree.tree_map(lambda p: torch.randn_like(p, dtype=dtype) * 3 + 1, PARAMS) for _ in range(steps)]


@pytest.mark.parametrize("name", TABLE)
def test_change_equals_torch(name):
    make, make_torch, _ = TABLE[name]
    init, update = make()
    params, state = PARAMS, init(PARAMS)
    theirs = {key: value.clone().requires_grad_() for key, value in PARAMS.items()}
    optimizer = make_torch(list(theirs.values()))
    for grads in gradients(6):
        before = {key: value.detach().clone() for key, value in theirs.items()}
        for key, value in theirs.items():
            value.grad = grads[key].clone()
        optimizer.step()
        updates, state = update(grads, state, params)
        params = pf.apply_updates(params, updates)
        for key, value in theirs.items():
            # The subtraction of numbers of order 1 costs 2⁻⁵³ of them.
            torch.testing.assert_close(updates[key], value.detach() - before[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TABLE)
def test_updates_equal_optax(name):
    make, _, make_optax = TABLE[name]
    init, update = make()
    theirs = make_optax()
    params = optree.tree_map(lambda p: p.float(), PARAMS)
    state = init(params)
    their_state = theirs.init({key: jnp.array(value.numpy()) for key, value in params.items()})
    for grads in gradients(6, torch.float32):
        updates, state = update(grads, state, params)
        their_updates, their_state = theirs.update({k: jnp.array(v.numpy()) for k, v in grads.items()}, their_state)
        for key, value in updates.items():
            # optax computes 1 − b2^t in float32 as written: off by 2⁻²⁴ / (1 − b2) = 6e-5 for 0.999, halved by √.
            np.testing.assert_allclose(value, their_updates[key], rtol=4e-5, atol=1e-7)


@pytest.mark.parametrize("name", TABLE)
def test_float32_is_float64_rounded(name):
    init, update = TABLE[name][0]()
    narrow = init(optree.tree_map(lambda p: p.float(), PARAMS))
    wide = init(PARAMS)
    for grads in gradients(6, torch.float32):
        updates, narrow = update(grads, narrow)
        expected, wide = update(optree.tree_map(lambda g: g.double(), grads), wide)
        for key, value in updates.items():
            # Moments forget cancellation slowly: a dozen roundings of terms up to 10 times the result.
            torch.testing.assert_close(value.double(), expected[key], rtol=2e-5, atol=1e-6)


def test_every_rate_is_a_lane():
    lanes = 4
    params = optree.tree_map(lambda p: torch.stack([p] * lanes), PARAMS)
    grads = gradients(3)
    rates = {
        "learning_rate": torch.linspace(0.1, 0.4, lanes, dtype=torch.float64),
        "momentum": torch.linspace(0.0, 0.9, lanes, dtype=torch.float64),
        "b1": torch.linspace(0.0, 0.9, lanes, dtype=torch.float64),
        "b2": torch.linspace(0.5, 0.99, lanes, dtype=torch.float64),
        "eps": torch.logspace(-8, -2, lanes, dtype=torch.float64),
    }

    def run(params, rates):
        results = []
        for transform in (
            pf.sgd(rates["learning_rate"], momentum=rates["momentum"], nesterov=True),
            pf.adam(rates["learning_rate"], rates["b1"], rates["b2"], rates["eps"]),
        ):
            moved, state = params, transform.init(params)
            for grad in grads:
                updates, state = transform.update(grad, state, moved)
                moved = pf.apply_updates(moved, updates)
            results.append(moved)
        return results

    together = pf.tree.unstack(vmap(run)(params, rates))
    for lane in range(lanes):
        alone = run(PARAMS, {name: float(value[lane]) for name, value in rates.items()})
        assert pf.tree.max_difference(together[lane], alone) < 1e-13


def test_schedules_see_the_count_from_zero():
    init, update = pf.sgd(lambda count: 1.0 / (1 + count))
    state = init(PARAMS)
    grads = optree.tree_map(torch.ones_like, PARAMS)
    seen = []
    for _ in range(3):
        updates, state = update(grads, state)
        seen.append(float(updates["b"]))
    assert seen == pytest.approx([-1.0, -1 / 2, -1 / 3])
    assert state.count.dtype == torch.int32


def test_chain_applies_in_order():
    doubled = pf.GradientTransformation(
        lambda params: (), lambda grads, state, params=None: (optree.tree_map(lambda g: 2 * g, grads), state)
    )
    init, update = pf.chain(doubled, pf.sgd(0.5))
    updates, state = update({"b": torch.tensor([3.0])}, init({"b": torch.tensor([0.0])}))
    assert updates["b"].item() == -3.0
    assert len(state) == 2


def test_apply_updates_keeps_dtypes():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert pf.apply_updates(params, {"w": torch.ones(2)})["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: pf.sgd(0.1, momentum=0.8), lambda: pf.adam(0.1)])
def test_rescaled_moments_are_those_of_the_rescaled_history(make):
    init, update = make()
    factors = {"w": torch.tensor([[2.0], [0.1]], dtype=torch.float64)}
    state, expected = init(PARAMS), init(PARAMS)
    for grads in gradients(4):
        _, state = update(grads, state)
        _, expected = update({**grads, "w": grads["w"] * factors["w"]}, expected)
    assert pf.tree.max_difference(pf.rescale_moments(state, factors), expected) < 1e-12
    assert pf.tree.max_difference(state, expected) > 0.1


def test_gradients_below_the_head_change_by_the_square_of_the_ratio():
    """With one statistic, against autograd on the popped head: rows of the head by r, everything below by r²."""
    params = {name: value.double() for name, value in pf.init_params(lambda: pf.UnifiedModel(4, 3, 2), 0).items()}
    apply, (lower, upper) = pf.stateless(pf.UnifiedModel(4, 3, 2)), pf.split(params)
    old = pf.init_state(1, dtype=torch.float64)
    new = pf.art(old, torch.tensor([30.0, -50.0], dtype=torch.float64), step_size=0.3)
    x, y = torch.randn(4, dtype=torch.float64), torch.tensor([20.0, -40.0], dtype=torch.float64)

    def grads(params, state):
        return torch.func.grad(lambda params: 0.5 * (apply(params, x) - pf.normalize(state, y)).square().sum())(params)

    before = grads(params, old)
    after = grads(pf.unify(pf.SplitParams(lower, pf.pop(upper, old, new))), new)
    factors = pf.optim.gradient_factors(old.scale / new.scale, upper, lower)
    assert factors.keys() == params.keys()
    for name in params:
        torch.testing.assert_close(after[name], before[name] * factors[name])


def test_hyper_parameters_are_of_the_parameters_dtype():
    """Parameters of no axis, whose dtype any other would change."""
    params = {"w": torch.tensor(0.5)}
    rate, half = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    for init, update in (
        optim.sgd(rate, momentum=half, nesterov=True),
        optim.adamw(rate, half, half, half, half),
        optim.clip_by_global_norm(half),
    ):
        updates, state = update(params, init(params), params)
        floats = [leaf for leaf in optree.tree_leaves((updates, state)) if leaf.is_floating_point()]
        assert {leaf.dtype for leaf in floats} == {torch.float32}
    assert optim.incremental_update(params, params, half)["w"].dtype == torch.float32


def test_adam_is_its_direction_times_the_rate():
    parts, whole = optim.scale_by_adam(), optim.adam(1.0)
    state, other = parts.init(PARAMS), whole.init(PARAMS)
    for grads in gradients(3):
        updates, state = parts.update(grads, state)
        expected, other = whole.update(grads, other)
        assert all(torch.equal(updates[name], -leaf) for name, leaf in expected.items())


def test_momentum_is_plain_by_default():
    transformation = optim.trace(0.5)
    updates, _ = transformation.update(PARAMS, transformation.init(PARAMS))
    assert all(torch.equal(updates[name], leaf) for name, leaf in PARAMS.items())


def test_adamw_is_adam_and_a_decay():
    numbers = 0.5, 0.25, 0.125
    whole = optim.adamw(0.1, *numbers, 0.75)
    parts = pf.chain(optim.scale_by_adam(*numbers), optim.add_decayed_weights(0.75), optim.scale_by_learning_rate(0.1))
    updates, _ = whole.update(PARAMS, whole.init(PARAMS), PARAMS)
    expected, _ = parts.update(PARAMS, parts.init(PARAMS), PARAMS)
    assert all(torch.equal(updates[name], leaf) for name, leaf in expected.items())


def test_factors_are_laid_out_as_their_parameters():
    factors = optim.gradient_factors(torch.tensor([2.0, 0.5]), ["head.weight", "head.bias"])
    assert {name: factor.tolist() for name, factor in factors.items()} == {
        "head.weight": [[2.0], [0.5]],
        "head.bias": [2.0, 0.5],
    }


def test_purity():
    for make, _, _ in TABLE.values():
        init, update = make()
        state, (grads,) = init(PARAMS), gradients(1)
        before = optree.tree_map(torch.clone, (PARAMS, state, grads))
        update(grads, state, PARAMS)
        assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves((PARAMS, state, grads))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pf.sgd(-0.1), "sgd: `learning_rate` must be >= 0, got -0.1"),
        (lambda: pf.sgd(0.1, momentum=1.0), "sgd: `momentum` must be >= 0 and < 1, got 1.0"),
        (lambda: pf.sgd(0.1, nesterov=True), "sgd: `nesterov` needs `momentum`, got None"),
        (lambda: pf.adam(torch.zeros(2)), r"adam: `learning_rate` must be .* 0-d tensor, got a tensor of shape \(2,\)"),
        (lambda: pf.adam(0.1, b1=1.0), "^adam: `b1` must be >= 0 and < 1"),
        (lambda: optim.scale_by_adam(b1=1.0), "^scale_by_adam: `b1` must be >= 0 and < 1"),
        (lambda: optim.trace(1.0), "^trace: `decay` must be >= 0 and < 1"),
        (lambda: optim.scale_by_learning_rate(-0.1), "^scale_by_learning_rate: `learning_rate` must be >= 0"),
        (lambda: pf.adam(0.1, b2=-0.5), "adam: `b2` must be >= 0 and < 1"),
        (lambda: pf.adam(0.1, eps=-1.0), "adam: `eps` must be >= 0, got -1.0"),
        (lambda: optim.clip_by_global_norm(0), "^clip_by_global_norm: `max_norm` must be > 0, got 0"),
        (lambda: optim.add_decayed_weights(-0.1), "^add_decayed_weights: `weight_decay` must be >= 0, got -0.1"),
        (lambda: optim.add_decayed_weights(0.1).update(PARAMS, ()), "^add_decayed_weights: `params` must be given"),
        (
            lambda: optim.incremental_update(PARAMS, PARAMS, 1.5),
            "^incremental_update: `step_size` must be >= 0 and <= 1, got 1.5",
        ),
        (
            lambda: optim.incremental_update(PARAMS, PARAMS, -0.5),
            "^incremental_update: `step_size` must be >= 0 and <= 1, got -0.5",
        ),
        (
            lambda: pf.apply_updates({"w": torch.ones(2)}, {"w": torch.ones(2, 2)}),
            r"apply_updates: `updates` must have the shapes of `params`, got \(2, 2\) for \(2,\)",
        ),
        (
            lambda: pf.chain(pf.sgd(0.1)).update(PARAMS, ()),
            "chain: `state` must have 1 parts, one for .* got 0",
        ),
        (
            lambda: pf.rescale_moments(optim.trace(0.9).init(PARAMS), {"x": torch.ones(1)}),
            r"rescale_moments: `factors` must name parameters, one of \['b', 'w'\], got \['x'\]",
        ),
        (lambda: optim.chain(pf.sgd(0.1), "sgd"), "^chain: `transforms` must be popart_func.GradientTrans.*, got str"),
        (
            lambda: optim.trace(0.9).update({"x": torch.ones(1)}, optim.trace(0.9).init(PARAMS)),
            "^optim: .*one structure",
        ),
        (
            lambda: pf.rescale_moments({"w": torch.ones(2, dtype=torch.int8)}, {}),
            r"got a tensor of shape \(2,\) at .*moment",
        ),
        (lambda: pf.rescale_moments([object()], {}), r"got an object of type object at \[0\] that is in none of them"),
        (
            lambda: optim.gradient_factors(torch.ones(2), ["head.bias"], ["hidden.bias"]),
            "gradient_factors: `lower` can be rescaled with one statistic only, got 2: a gradient below the head is",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


class RMSProp(NamedTuple):
    mean_square: dict[str, torch.Tensor]
    count: torch.Tensor


@pytest.mark.parametrize(
    "state",
    [
        RMSProp({"w": torch.ones(2)}, torch.tensor(3)),
        (optim.MomentumState({"w": torch.ones(2)}), {"average": torch.ones(2)}),
        [torch.ones(2, dtype=torch.complex64)],
    ],
)
def test_a_state_that_may_hold_other_moments_is_not_rescaled_in_part(state):
    with pytest.raises(TypeError, match=r"rescale_moments: `state` must be made of .* got a tensor of shape \(2,\) at"):
        pf.rescale_moments(state, {"w": torch.ones(1)})


class Norm(NamedTuple):
    total: torch.Tensor
    rate: torch.Tensor


def test_counts_and_rates_in_a_state_are_left_alone():
    """A number that no state declares may be a norm of gradients: only counts are known to be none."""
    moments = optim.trace(0.9).init(PARAMS)
    state = ({"count": torch.tensor(3)}, moments)
    assert pf.tree.max_difference(pf.rescale_moments(state, {"w": torch.ones(1)}), state) == 0
    state = (Norm(torch.tensor(4.0), torch.tensor(0.5)), moments)
    with pytest.raises(TypeError, match=r"got a tensor of shape \(\) at \[0, .*\] .* register_state"):
        pf.rescale_moments(state, {"w": torch.ones(1)})


def test_a_state_says_how_it_scales(monkeypatch):
    monkeypatch.setattr(optim.rescaling, "_kinds", dict(optim.rescaling._kinds))
    optim.register_state(Norm)
    state = (Norm(torch.tensor(4.0), torch.tensor(0.5)), optim.MomentumState({"w": torch.ones(2)}))
    rescaled = pf.rescale_moments(state, {"w": torch.tensor(3.0)})
    assert rescaled[0] == state[0]
    assert rescaled[1].trace["w"].tolist() == [3.0, 3.0]
    optim.register_state(RMSProp, mean_square=2)
    assert pf.rescale_moments(RMSProp({"w": torch.ones(2)}, torch.tensor(3)), {"w": torch.tensor(3.0)})[0]["w"][0] == 9
    optim.register_state(Norm, rate=lambda trees, factors: trees["total"] * factors["w"])
    assert pf.rescale_moments(state, {"w": torch.tensor(3.0)})[0].rate == 12
    with pytest.raises(TypeError, match="register_state: `cls` must be a NamedTuple with the fields"):
        optim.register_state(Norm, mean=1)


PART = {"w": "decayed", "b": "rest"}


class TestComposing:
    def test_weight_decay_and_clipping_are_those_of_torch(self):
        """Against torch.optim.AdamW and torch.nn.utils.clip_grad_norm_, 20 steps."""
        decayed = pf.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1, weight_decay=0.3))
        params = {name: leaf.clone() for name, leaf in PARAMS.items()}
        given = [leaf.clone().requires_grad_() for leaf in params.values()]
        optimizer, state = torch.optim.AdamW(given, 0.1, weight_decay=0.3), decayed.init(params)
        for step in range(20):
            grads = {name: leaf.sin() * step for name, leaf in params.items()}
            updates, state = decayed.update(grads, state, params)
            params = pf.apply_updates(params, updates)
            for leaf in given:
                leaf.grad = leaf.detach().sin() * step
            torch.nn.utils.clip_grad_norm_(given, 0.5)
            optimizer.step()
        for leaf, expected in zip(params.values(), given, strict=True):
            torch.testing.assert_close(leaf, expected.detach(), rtol=1e-4, atol=1e-5)

    def test_a_mask_says_what_decays(self):
        nested, ones = {"a": {"w": torch.tensor([8.0], dtype=torch.float64)}}, {"a": {"w": torch.ones(1)}}
        update = optim.add_decayed_weights(0.5, mask=lambda name: name == "a.w").update
        decayed, _ = update(ones, optim.DecayState({"a": {"w": torch.tensor([2.0])}}), nested)
        assert (decayed["a"]["w"].tolist(), decayed["a"]["w"].dtype) == ([1 + 0.5 * (8 - 2)], torch.float32)
        transformation = optim.add_decayed_weights(0.5, mask=lambda name: name == "w")
        zeros = {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}
        updates, _ = transformation.update(zeros, transformation.init(PARAMS), PARAMS)
        assert torch.equal(updates["w"], 0.5 * PARAMS["w"])
        assert not updates["b"].any()

    def test_each_part_has_its_own_optimizer_and_its_moments_are_found(self):
        parts = optim.partition(
            {"slow": optim.sgd(0.1, momentum=0.9), "fast": optim.adam(0.1), "frozen": optim.set_to_zero()},
            {"w": "fast", "b": "slow", "c": "frozen"},
        )
        params = {**PARAMS, "c": torch.ones(2)}
        updates, state = parts.update(params, parts.init(params), params)
        assert list(updates) == list(params)
        assert not updates["c"].any()
        torch.testing.assert_close(updates["b"], -0.1 * PARAMS["b"])
        rescaled = pf.rescale_moments(state, {"w": torch.tensor(2.0), "b": torch.tensor(3.0)})
        assert torch.equal(rescaled["fast"][0].nu["w"], 4 * state["fast"][0].nu["w"])
        assert torch.equal(rescaled["slow"][0].trace["b"], 3 * state["slow"][0].trace["b"])
        with pytest.raises(ValueError, match=r"partition: `param_labels` must be one of .* got 'none' for 'w'"):
            optim.partition({"slow": optim.sgd(0.1)}, lambda name: "none").init(PARAMS)

    def test_a_part_gets_its_own_parameters_and_may_do_without(self):
        decayed = optim.partition({"decayed": optim.add_decayed_weights(0.5), "rest": optim.sgd(0.1)}, PART.get)
        updates, _ = decayed.update(PARAMS, decayed.init(PARAMS), PARAMS)
        assert torch.equal(updates["w"], 1.5 * PARAMS["w"])
        assert torch.equal(updates["b"], -0.1 * PARAMS["b"])
        plain = optim.partition({"decayed": optim.sgd(0.2), "rest": optim.sgd(0.1)}, PART.get)
        updates, _ = plain.update(PARAMS, plain.init(PARAMS))
        assert torch.equal(updates["w"], -0.2 * PARAMS["w"])

    def test_every_number_has_its_own_value_in_every_lane(self):
        """Rates, schedules, clipping and decay under vmap, against one lane at a time."""

        def after(value, params=PARAMS):
            schedule = optim.warmup_cosine_decay_schedule(0.0, value, 2, 5, 0.1 * value)
            transformation = pf.chain(
                optim.clip_by_global_norm(value),
                optim.add_decayed_weights(value),
                optim.scale_by_learning_rate(schedule),
            )
            state = transformation.init(params)
            for _ in range(6):
                updates, state = transformation.update(params, state, params)
                params = pf.apply_updates(params, updates)
            return params

        values = torch.tensor([0.1, 0.5, 2.0])
        lanes = torch.vmap(after)(values)
        for lane, value in enumerate(values.tolist()):
            assert pf.tree.max_difference({k: v[lane] for k, v in lanes.items()}, after(value)) < 1e-5

    @pytest.mark.parametrize("name", ["linear_schedule", "cosine_decay_schedule", "warmup_cosine_decay_schedule"])
    def test_schedules_are_those_of_optax(self, name):
        optax = pytest.importorskip("optax")
        arguments = {
            "linear_schedule": (0.5, 0.1, 6, 2),
            "cosine_decay_schedule": (0.5, 7, 0.2),
            "warmup_cosine_decay_schedule": (0.1, 0.7, 3, 9, 0.05),
        }[name]
        ours, theirs = getattr(optim, name)(*arguments), getattr(optax, name)(*arguments)
        for count in range(12):
            assert float(ours(torch.tensor(count))) == pytest.approx(float(theirs(count)), rel=1e-5, abs=1e-7)

    def test_a_cosine_ends_at_zero(self):
        assert float(optim.cosine_decay_schedule(0.5, 7)(torch.tensor(7))) == pytest.approx(0, abs=1e-7)

    def test_schedules_are_as_exact_where_the_default_dtype_is_float16(self):
        count = torch.tensor(4099)  # no number of float16
        expected = optim.linear_schedule(0.0, 8192.0, 8192)(count)
        torch.set_default_dtype(torch.float16)
        try:
            assert optim.linear_schedule(0.0, 8192.0, 8192)(count) == expected == 4099
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_schedule_without_a_warm_up_starts_at_its_peak(self):
        assert float(optim.warmup_cosine_decay_schedule(0.1, 0.7, 0, 9, 0.05)(torch.tensor(0))) == pytest.approx(0.7)
        assert float(optim.warmup_cosine_decay_schedule(0.1, 0.7, 0, 9)(torch.tensor(9))) == pytest.approx(0, abs=1e-7)

    def test_schedules_of_no_steps_are_refused(self):
        for make, name in (
            (lambda: optim.linear_schedule(0.0, 1.0, 0), "linear_schedule: `transition_steps`"),
            (lambda: optim.cosine_decay_schedule(1.0, 0), "cosine_decay_schedule: `decay_steps`"),
            (lambda: optim.warmup_cosine_decay_schedule(0.0, 1.0, 5, 5), "warmup_cosine_decay_schedule: `decay_steps`"),
        ):
            with pytest.raises(ValueError, match=f"^{name} must be > [05], got [05]"):
                make()

    def test_a_peak_has_a_gradient_without_a_warmup(self):
        for steps in (0, torch.tensor(0)):

            def rate(peak, steps=steps):
                return optim.warmup_cosine_decay_schedule(0.0, peak, steps, 10)(torch.tensor(0))

            assert torch.func.grad(rate)(torch.tensor(3.0)) == 1

    def test_target_networks_are_copied_or_averaged(self):
        old = {name: torch.zeros_like(leaf) for name, leaf in PARAMS.items()}
        half = optim.incremental_update(PARAMS, old, torch.tensor(0.5))
        assert pf.tree.max_difference(half, optim.incremental_update(PARAMS, old, 0.5)) == 0
        moved = optim.incremental_update({"w": torch.tensor([4.0])}, {"w": torch.tensor([8.0])}, 0.25)
        assert moved == {"w": 7}
        assert torch.equal(half["w"], PARAMS["w"] / 2)
        assert optim.periodic_update(PARAMS, old, torch.tensor(6), 3)["w"].equal(PARAMS["w"])
        assert optim.periodic_update(PARAMS, old, torch.tensor(7), 3)["w"].equal(old["w"])


@pytest.mark.parametrize("make", [lambda: pf.adam(0.1), lambda: pf.sgd(0.1, momentum=0.5), lambda: pf.sgd(0.1)])
def test_complex_parameters_reach_the_minimum(make):
    goal = torch.tensor([3 - 1j, -2 + 5j], dtype=torch.complex128)
    init, update = make()
    params = {"z": torch.tensor([1 + 2j, 0j], dtype=torch.complex128)}
    state = init(params)
    for _ in range(2000):
        grads = torch.func.grad(lambda p: (p["z"] - goal).abs().square().sum())(params)
        updates, state = update(grads, state, params)
        params = pf.apply_updates(params, updates)
    torch.testing.assert_close(params["z"], goal, rtol=0, atol=1e-3)
    halved = pf.rescale_moments(state, {"z": torch.tensor(0.5)})
    assert [leaf.dtype for leaf in optree.tree_leaves(halved)] == [leaf.dtype for leaf in optree.tree_leaves(state)]


def test_adam_on_complex_parameters_is_optax():
    goal = jnp.asarray([3 - 1j, -2 + 5j])
    params, ours = {"z": jnp.asarray([1 + 2j, 0j])}, {"z": torch.tensor([1 + 2j, 0j])}
    (init, update), (optax_init, optax_update) = pf.adam(0.1), optax.adam(0.1)
    state, optax_state = init(ours), optax_init(params)
    for _ in range(50):
        grads = {"z": params["z"] - goal}  # of half the squared distance, in PyTorch's convention
        updates, optax_state = optax_update(grads, optax_state)
        params = optax.apply_updates(params, updates)
        updates, state = update({"z": ours["z"] - torch.tensor([3 - 1j, -2 + 5j])}, state)
        ours = pf.apply_updates(ours, updates)
    torch.testing.assert_close(ours["z"], torch.tensor(np.asarray(params["z"])), rtol=1e-5, atol=1e-5)


def test_moments_are_rescaled_by_ratios_whose_square_is_out_of_range():
    state = optim.AdamState(torch.tensor(0), {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 1e-30])})
    moved = optim.rescale_moments(state, {"w": torch.tensor(1e20)})
    assert moved.nu["w"].tolist() == [0.0, pytest.approx(1e10)]


def test_an_infinite_factor_is_refused_where_it_is_known():
    """σ/σ' with σ' = 0: times a moment of zero it would be NaN, and NaN is what a NaN target leaves."""
    state = optim.trace(0.9).init(PARAMS)
    for infinite in (torch.tensor(1.0) / 0, torch.tensor([[1.0], [-torch.inf]])):
        with pytest.raises(ValueError, match=r"rescale_moments: `factors` must be finite, got .*inf.* for 'w'"):
            optim.rescale_moments(state, {"w": infinite})
    inside = torch.vmap(lambda factor: optim.rescale_moments(state, {"w": factor}).trace["w"])(
        torch.tensor([torch.inf])
    )
    assert inside.isnan().all()
    assert optim.rescale_moments(state, {"w": torch.tensor(torch.nan)}).trace["w"].isnan().all()


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda name: name == "w"])
def test_a_norm_other_than_1_and_masks(mask):
    params = {"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(1) + 5}
    grads = {"w": params["w"], "b": torch.zeros(1)}  # norm 5
    clip = optim.clip_by_global_norm(2.0)
    clipped, _ = clip.update(grads, clip.init(params), params)
    torch.testing.assert_close(clipped["w"], torch.tensor([1.2, 1.6]))
    zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for decay in (optim.add_decayed_weights(0.5, mask), optim.adamw(0.1, weight_decay=0.5, mask=mask)):
        moved, _ = decay.update(zeros, decay.init(params), params)
        assert moved["w"].abs().min() > 0.1
        assert not moved["b"].any()


@pytest.mark.parametrize(
    ("grads", "expected"),
    [
        ({"w": torch.tensor([300.0, 400.0]).half()}, [0.6, 0.8]),
        ({"w": torch.tensor([6e4, 6e4]).half()}, [0.5**0.5, 0.5**0.5]),  # whose norm is no half
        ({"w": torch.tensor([3.0, 4.0]).bfloat16()}, [0.6, 0.8]),
        ({"w": torch.tensor([3e25, 4e25]).double()}, [0.6, 0.8]),
        ({"a": torch.tensor([3e25]).double(), "b": torch.tensor([4e25])}, [0.6, 0.8]),
        ({"a": torch.tensor([3e25 + 0j], dtype=torch.complex128), "b": torch.tensor([4e25])}, [0.6, 0.8]),
        ({"a": torch.tensor([3j]), "b": torch.tensor([4.0]).half()}, [0.6j, 0.8]),
    ],
)
def test_gradients_of_every_dtype_are_clipped(grads, expected):
    clipped, _ = optim.clip_by_global_norm(1.0).update(grads, ())
    assert {name: leaf.dtype for name, leaf in clipped.items()} == {name: leaf.dtype for name, leaf in grads.items()}
    found = torch.cat([leaf.to(torch.complex128) for leaf in clipped.values()])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.complex128), rtol=4e-3, atol=0)


@pytest.mark.parametrize("decaying", ["weight", "bias"])
@pytest.mark.parametrize(
    "decay",
    [
        optim.chain(optim.add_decayed_weights(1.0), optim.sgd(0.5)),
        optim.from_torch(torch.optim.SGD, lr=0.5, weight_decay=1.0),
    ],
    ids=["add_decayed_weights", "from_torch"],
)
def test_a_weight_or_a_bias_alone_decays_toward_predictions_of_0(decay, decaying):
    params = {"0.weight": torch.ones(1, 3), "0.bias": torch.zeros(1)}
    parts = {"decay": decay, "rest": optim.sgd(0.5, momentum=0.9)}
    optimizer = optim.partition(parts, lambda name: "decay" if name.endswith(decaying) else "rest")
    art = pf.popart(1, 0.1)
    targets = torch.full((4, 1), 100.0)
    params, opt_state, state = art.update_network(params, optimizer.init(params), art.init(params), targets, head="0")
    before = pf.fold(params, state)
    for _ in range(40):
        zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        updates, opt_state = optimizer.update(zeros, opt_state, params)
        params = optim.apply_updates(params, updates)
    for name, leaf in pf.fold(params, state).items():
        expected = torch.zeros_like(leaf) if name.endswith(decaying) else before[name]
        torch.testing.assert_close(leaf, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.sgd(0.1),
        lambda: optim.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: optim.adam(0.1),
        lambda: optim.adamw(0.1),
        lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adam(torch.tensor(0.1))),
        lambda: optim.from_torch(torch.optim.Adam),
        lambda: optim.set_to_zero(),
    ],
)
def test_a_label_of_no_parameter(make):
    optimizer = optim.partition({"all": optim.sgd(0.5), "none": make()}, lambda name: "all")
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    updates, _ = optimizer.update(params, state, params)
    assert optim.apply_updates(params, updates)["w"].tolist() == [0.5, 0.5]
    assert optim.apply_updates({}, {}) == {}
