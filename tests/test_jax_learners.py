"""Whole learners in JAX: ours scanned by it, optax under ours, ours beside rlax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optree
import pytest
import rlax
import torch
from torch import Tensor

import popart_func as pf
from popart_func import random
from popart_func.experiments import regression
from popart_func.interop.jax import from_jax, to_jax, to_jax_function, to_torch
from popart_func.optim import GradientTransformation

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("algorithm", regression.ALGORITHMS)
def test_the_regression_scanned_inside_jax_agrees_with_eager(algorithm: str, dtype: torch.dtype) -> None:
    """100 steps in 50 lanes, to 1e-4 relative: in float64 of each number, in float32 of what it is the difference of.

    An error is a difference of numbers as large as the lane's largest error, a parameter the sum of updates as large as
    the largest parameter of its tensor; the residue belongs to the shift.
    """
    seeds = range(50)
    init, step = regression.init_and_step(algorithm)
    params = pf.init_lanes(lambda: pf.UnifiedModel(16, 10, 1), seeds)
    numbers = regression.streams(seeds)[:100]
    with jax.enable_x64(dtype == torch.float64):
        start = init({name: leaf.to(dtype) for name, leaf in params.items()})
        state, errors = pf.scan_lanes(step, start, numbers, shared=False, engine="eager")
        jax_step = to_jax_function(step)
        run = jax.jit(jax.vmap(lambda state, numbers: jax.lax.scan(jax_step, state, numbers), (0, 1), (0, 1)))
        got_state, got_errors = to_torch(run(to_jax(start), to_jax(numbers)))
    assert errors.dtype == got_errors.dtype == dtype
    assert optree.tree_structure(got_state) == optree.tree_structure(state)
    if dtype == torch.float64:
        torch.testing.assert_close(got_errors, errors, rtol=1e-4, atol=0)
    else:
        assert ((got_errors - errors).abs().amax(0) <= 1e-4 * errors.abs().amax(0)).all()
    for a, b in zip(optree.tree_leaves(whole(got_state)), optree.tree_leaves(whole(state)), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def whole(state: pf.LearnerState) -> pf.LearnerState:
    """With the residue as a part of the shift."""
    shift = state.statistics.shift + state.statistics.residue
    return state._replace(statistics=state.statistics._replace(shift=shift, residue=torch.zeros(())))


def test_statistics_in_jax_keep_their_digits() -> None:
    """XLA must not simplify the compensated sum: targets 10⁷ ± 1, whose variance float32 can't have as ν − μ²."""

    def step(state: Any, y: Tensor) -> Any:
        state = pf.art(state, y[None], step_size=0.01)
        return state, state.scale

    targets = 1e7 + torch.where(torch.arange(4000) % 2 == 0, 1.0, -1.0)
    state, _ = jax.jit(lambda s, ys: jax.lax.scan(to_jax_function(step), s, ys))(
        to_jax(pf.init_state(1)._replace(shift=torch.tensor([1e7]))), to_jax(targets)
    )
    assert float(state.scale[0]) == pytest.approx(1.0, rel=1e-2)
    eager, _ = pf.scan(step, pf.init_state(1)._replace(shift=torch.tensor([1e7])), targets, engine="eager")
    torch.testing.assert_close(to_torch(state).scale, eager.scale, rtol=1e-4, atol=0)


TASKS, STEP_SIZE, LOWER, UPPER = 3, 0.05, 0.5, 2.0


def batches(seed: int, offsets: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Targets and tasks, some twice and some absent, of a size for which one bound binds, or the other, or none."""
    generator, sizes = np.random.default_rng(seed), np.array([0.1, 1.0, 4.0])
    for _ in range(60):
        indices = generator.integers(0, TASKS, 4)
        yield generator.standard_normal(4) * sizes[indices] + offsets[indices], indices


def first_weights(seed: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).standard_normal((4, TASKS)).astype(np.float32)


def updates() -> tuple[Any, Any]:
    """Ours and rlax's."""
    ours = pf.popart(TASKS, STEP_SIZE, LOWER, UPPER, reduction="sum").update
    return jax.jit(to_jax_function(ours)), jax.jit(rlax.popart(TASKS, STEP_SIZE, LOWER, UPPER)[1])


def check_bounds(scales: list[Any]) -> None:
    assert np.min(scales) == LOWER
    assert np.max(scales) == UPPER
    assert ((np.array(scales) > LOWER) & (np.array(scales) < UPPER)).any()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("seed", range(3))
def test_rlax_parity_inside_jax(dtype: str, seed: int) -> None:
    """rlax's rule over random sequences, to 1e-6; in float32 near 0, for what it does elsewhere see below."""
    offsets = np.array([0.0, 100.0 if dtype == "float64" else 0.0, 0.0])
    with jax.enable_x64(dtype == "float64"):
        update, rlax_update = updates()
        w = jnp.asarray(first_weights(seed), dtype)
        head, rlax_head = ({name: jnp.zeros(TASKS, dtype)} for name in ("bias", "b"))
        head["weight"], rlax_head["w"] = w.T, w
        state = to_jax(pf.init_state(TASKS, dtype=getattr(torch, dtype)))
        rlax_state = rlax.PopArtState(*(jnp.full(TASKS, value, dtype) for value in (0, 1, 1)))
        scales = []
        for targets, indices in batches(seed, offsets):
            batch = jnp.asarray(targets, dtype), jnp.asarray(indices, jnp.int32)
            head, state = update(head, state, *batch)
            rlax_head, rlax_state = rlax_update(rlax_head, rlax_state, *batch)
            for got, expected in [
                (state.shift + state.residue, rlax_state.shift),
                (state.scale, rlax_state.scale),
                (head["weight"].T, rlax_head["w"]),
                (head["bias"], rlax_head["b"]),
            ]:
                assert got.dtype == expected.dtype == dtype
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
            scales.append(np.asarray(state.scale))
    check_bounds(scales)


@pytest.mark.parametrize("seed", range(3))
def test_rlax_parity_in_float32_far_from_0(seed: int) -> None:
    """Ours to 1e-6 of rlax's rule in float64; rlax itself in float32 only within what ν − μ² cancels.

    With M the largest squared target, an update rounds ν by M eps/2 and μ by √M eps/2, what they are moved by by at
    most 12 times β as much, and forgets at least the part β of former errors (n β of n targets, whose moves are n). So
    ν is off by (1/β + 12) M eps/2, μ² by twice that, their difference by another M eps: less than 50 M eps at β = 1/20.
    And |σ − σ'| = |σ² − σ'²| / (σ + σ').
    """
    offsets = np.array([-100.0, 1000.0, 50.0])
    with jax.enable_x64(True):
        update, rlax_update = updates()
        w = first_weights(seed)

        def rlax_start(dtype: str) -> Any:
            fields = (jnp.asarray(value, dtype) for value in (offsets, np.ones(TASKS), 1 + offsets**2))
            return {"w": jnp.asarray(w, dtype), "b": jnp.zeros(TASKS, dtype)}, rlax.PopArtState(*fields)

        mine = pf.init_state(TASKS)._replace(shift=torch.tensor(offsets).float())
        head, state = {"weight": jnp.asarray(w.T), "bias": jnp.zeros(TASKS, "float32")}, to_jax(mine)
        rlax_head, rlax_state = rlax_start("float32")
        exact_head, exact = rlax_start("float64")
        largest, scales, errors = 1 + offsets**2, [], []
        for targets, indices in batches(seed, offsets):
            batch = jnp.asarray(targets, "float32"), jnp.asarray(indices, jnp.int32)
            np.maximum.at(largest, indices, np.asarray(batch[0], np.float64) ** 2)
            head, state = update(head, state, *batch)
            rlax_head, rlax_state = rlax_update(rlax_head, rlax_state, *batch)
            exact_head, exact = rlax_update(exact_head, exact, batch[0].astype("float64"), batch[1])
            assert state.scale.dtype == rlax_state.scale.dtype == "float32"
            assert exact.scale.dtype == "float64"
            for got, expected in [
                (state.shift.astype("float64") + state.residue, exact.shift),
                (state.scale, exact.scale),
                (head["weight"].T, exact_head["w"]),
                (head["bias"], exact_head["b"]),
            ]:
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
            bound = 50 * largest * np.finfo(np.float32).eps / (exact.scale + rlax_state.scale)
            errors.append(np.abs(rlax_state.scale - exact.scale))
            assert (errors[-1] <= bound).all()
            scales.append(np.asarray(state.scale))
    check_bounds(scales)
    assert np.max(errors) > 1e-3, "rlax must cancel here, or this test says nothing"


def optax_in_torch(transformation: optax.GradientTransformation) -> GradientTransformation:
    """Any optimizer of optax, as a learner here takes it."""
    return GradientTransformation(from_jax(transformation.init), from_jax(transformation.update))


@pytest.mark.parametrize("transformation", [optax.adam(0.01), optax.chain(optax.clip(0.1), optax.sgd(0.1, 0.9))])
def test_a_learner_with_an_optimizer_of_optax(transformation: optax.GradientTransformation) -> None:
    make = lambda: torch.nn.Linear(3, 1)  # noqa: E731
    learner = pf.sgd_learner(pf.stateless(make()), optax_in_torch(transformation))
    params = pf.init_params(make, seed=1)
    state = learner.init(params)
    jax_params = to_jax(params)
    jax_state = transformation.init(jax_params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return 0.5 * jnp.square(x @ params["weight"].T + params["bias"] - y).sum()

    for number in range(5):
        x, y = torch.tensor([1.0, -number, 0.5]), torch.tensor([number / 2])
        state, _ = learner.update(state, (x, y))
        updates, jax_state = transformation.update(jax.grad(loss)(jax_params, *to_jax((x, y))), jax_state, jax_params)
        jax_params = optax.apply_updates(jax_params, updates)
    for name, value in state.params.items():
        torch.testing.assert_close(value, to_torch(jax_params[name]), rtol=1e-5, atol=1e-6)


def test_a_jax_training_loop_with_our_popart_and_an_optimizer_of_optax() -> None:
    """The head and its statistics by this library, everything else by JAX; the loss falls from the targets' scale."""
    popart_ = pf.popart(1, 0.05)
    update, normalize = to_jax_function(popart_.update), to_jax_function(pf.normalize)
    optimizer = optax.adam(0.01)

    def loss(params: Any, statistics: Any, x: Any, y: Any) -> Any:
        h = jnp.tanh(params["lower"] @ x)
        prediction = params["head"]["weight"] @ h + params["head"]["bias"]
        return 0.5 * jnp.square(prediction - normalize(statistics, y)).sum()

    def step(carry: Any, batch: Any) -> Any:
        params, statistics, opt_state = carry
        x, y = batch
        head, statistics = update(params["head"], statistics, y)
        params = {**params, "head": head}
        value, grads = jax.value_and_grad(loss)(params, statistics, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), statistics, opt_state), value

    key = jax.random.key(0)
    params = {
        "lower": jax.random.normal(key, (8, 3)),
        "head": {"weight": jnp.zeros((1, 8)), "bias": jnp.zeros(1)},
    }
    xs = jax.random.normal(jax.random.fold_in(key, 1), (500, 3))
    ys = 1e5 * (1 + jnp.tanh(xs.sum(1, keepdims=True)))
    start = params, to_jax(popart_.init()), optimizer.init(params)
    _, losses = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))(start, (xs, ys))
    assert float(losses[-100:].mean()) < 0.3 * float(losses[:100].mean())


def test_the_same_key_gives_the_same_run_in_both_worlds() -> None:
    """Keys, first parameters and inputs alike; inputs to the bit."""
    make = lambda: pf.UnifiedModel(4, 6, 1)  # noqa: E731
    learner = pf.popart_learner(pf.stateless(make()), pf.sgd(0.01), pf.popart(1, 0.1))

    def step(carry: Any, _: Tensor) -> Any:
        state, key = carry
        key, now = random.split(key)
        x = random.uniform(now, (4,))
        state, info = learner.update(state, (x, 1000 * x.sum(0, keepdim=True)))
        return (state, key), (x, info.loss)

    start = learner.init(pf.init_params(make, seed=0)), random.key(7)
    _, (xs, losses) = pf.scan(step, start, torch.zeros(60), engine="eager")
    _, (jax_xs, jax_losses) = jax.jit(lambda c, s: jax.lax.scan(to_jax_function(step), c, s))(
        to_jax(start), jnp.zeros(60)
    )
    assert torch.equal(to_torch(jax_xs), xs)
    torch.testing.assert_close(to_torch(jax_losses), losses, rtol=1e-3, atol=1e-5)
