"""optax's optimizers in our learners: their moments follow POP where they are known, and are refused where not."""

from __future__ import annotations

import jax.numpy as jnp
import optax
import pytest
import torch

import popart_func as pf
from popart_func.interop.optax import from_optax

KNOWN = {
    "sgd": (optax.sgd(0.1), []),
    "momentum": (optax.sgd(0.1, momentum=0.9), [1]),
    "adam": (optax.adam(0.1), [1, 2]),
    "adamw": (optax.adamw(0.1), [1, 2]),
    "clipped adam": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), [1, 2]),
    "adamax": (optax.adamax(0.1), [1, 1]),
    "amsgrad": (optax.amsgrad(0.1), [1, 2, 2]),
    "nadam": (optax.nadam(0.1), [1, 2]),
    "rmsprop": (optax.rmsprop(0.1), [2]),
    "rmsprop with momentum": (optax.rmsprop(0.1, momentum=0.9), [2]),
    "centered rmsprop": (optax.rmsprop(0.1, centered=True), [1, 2]),
    "adagrad": (optax.adagrad(0.1), [2]),
    "adadelta": (optax.adadelta(0.1), [2]),
    "lion": (optax.lion(0.1), [1]),
    "adabelief": (optax.adabelief(0.1), [1, 2]),
    "a schedule": (optax.adam(optax.linear_schedule(0.1, 0.0, 10)), [1, 2]),
}
APPLY = pf.stateless(pf.UnifiedModel(3, 4, 2))
PARAMS = pf.init_params(lambda: pf.UnifiedModel(3, 4, 2), 0)


@pytest.mark.parametrize("name", KNOWN)
def test_how_entries_scale_is_known_and_pop_rescales_them(name):
    transformation, powers = KNOWN[name]
    optimizer = from_optax(transformation)
    state = optimizer.init(PARAMS)
    assert sorted(int(entry[-1]) for entry in state.moments) == powers
    assert state.unknown == ()
    grads = {key: torch.randn_like(leaf) for key, leaf in PARAMS.items()}
    _, state = optimizer.update(grads, state, PARAMS)
    factor = torch.tensor([0.5, 4.0])
    moved = pf.rescale_moments(state, {"output_linear.bias": factor})
    for entry, moments in state.moments.items():
        power = int(entry[-1])
        expected = moments["output_linear.bias"] * factor**power
        torch.testing.assert_close(moved.moments[entry]["output_linear.bias"], expected)
        assert torch.equal(moved.moments[entry]["hidden1.bias"], moments["hidden1.bias"])


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_equal_to_our_own_under_pop(name):
    ours = {"momentum": pf.sgd(0.1, momentum=0.9), "adam": pf.adam(0.1)}[name]
    learners = [pf.popart_learner(APPLY, one, pf.popart(2, 0.3)) for one in (from_optax(KNOWN[name][0]), ours)]
    states = [learner.init(PARAMS) for learner in learners]
    for _ in range(4):
        batch = torch.randn(5, 3), 100 * torch.randn(5, 2)
        states = [learner.update(state, batch)[0] for learner, state in zip(learners, states, strict=True)]
    assert pf.tree.max_difference(states[0].params, states[1].params) < 1e-4


def an_average_of_norms():
    return optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda grads, norm, params=None: (grads, 0.9 * norm + optax.tree.norm(grads))
    )


@pytest.mark.parametrize(
    "transformation",
    [
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.adafactor(0.1),  # measured on parameters that are too small to be factored
        optax.novograd(0.1),
        an_average_of_norms(),
    ],
    ids=["factored adafactor", "adafactor", "novograd", "a norm"],
)
def test_what_is_not_known_is_refused(transformation):
    learner = pf.popart_learner(APPLY, from_optax(transformation), pf.popart(2, 0.3))
    with pytest.raises(TypeError, match="may be a moment"):
        learner.update(learner.init(PARAMS), (torch.randn(5, 3), torch.randn(5, 2)))
    plain = pf.sgd_learner(APPLY, from_optax(transformation))
    plain.update(plain.init(PARAMS), (torch.randn(5, 3), torch.randn(5, 2)))


def test_what_cannot_be_measured_is_refused():
    for transformation in (optax.masked(optax.adam(0.1), lambda params: dict.fromkeys(params, False)), optax.lbfgs()):
        with pytest.raises(ValueError, match="from_optax: `transformation` must take any flat dict"):
            from_optax(transformation)


def test_a_state_of_another_optimizer_or_network_is_refused():
    optimizer, sgd = from_optax(KNOWN["adam"][0]), from_optax(optax.sgd(0.1))
    other = {f"other.{name}": leaf for name, leaf in PARAMS.items()}
    for state in (optimizer.init(other), sgd.init(PARAMS), from_optax(KNOWN["momentum"][0]).init(PARAMS)):
        with pytest.raises(ValueError, match="from_optax: `state` must be one that this optimizer made"):
            optimizer.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="from_optax: `state` must be one that this optimizer made"):
        sgd.update(PARAMS, optimizer.init(PARAMS), PARAMS)
