"""Parameters and statistics in the layouts of haiku, rlax and flax: by computing with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import torch
from torch import Tensor, vmap

from popart_func.interop.jax import to_jax, to_torch
from popart_func.interop.layouts import RlaxState, from_layout, from_rlax_state, to_layout, to_rlax_state
from popart_func.models import init_lanes, init_params, stateless
from popart_func.pop_art import art, init_state, popart


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def jax_mlp(layers: Any, x: Any, w: str, b: str) -> Any:
    h = jnp.tanh(x @ layers["0"][w] + layers["0"][b])
    return h @ layers["2"][w] + layers["2"][b]


@pytest.mark.parametrize(("layout", "w", "b"), [("haiku", "w", "b"), ("rlax", "w", "b"), ("flax", "kernel", "bias")])
def test_networks_compute_the_same_in_every_layout(layout: str, w: str, b: str) -> None:
    params, x = init_params(mlp, seed=0), torch.tensor([0.3, -1.0, 2.0])
    layers = to_layout(to_jax(params), layout)
    expected = stateless(mlp())(params, x)
    np.testing.assert_allclose(jax_mlp(layers, to_jax(x), w, b), expected, rtol=1e-6)
    back = to_torch(from_layout(layers, layout))
    assert back.keys() == params.keys()
    assert all(torch.equal(back[name], params[name]) for name in params)

    lanes = init_lanes(mlp, range(4))
    many = jax.vmap(lambda layers: jax_mlp(layers, to_jax(x), w, b))(to_layout(to_jax(lanes), layout))
    np.testing.assert_allclose(many, vmap(stateless(mlp()), (0, None))(lanes, x), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(from_layout(to_layout(lanes, layout), layout)[name], lanes[name]) for name in lanes)


def test_one_layer_and_nested_layers() -> None:
    head = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    assert torch.equal(to_layout(head, "rlax")["w"], head["weight"].T)
    assert torch.equal(from_layout(to_layout(head, "flax"), "flax")["weight"], head["weight"])
    both = {"weight": torch.ones(2, 3), "0.weight": torch.ones(1, 2)}
    assert from_layout(to_layout(both, "haiku"), "haiku").keys() == both.keys()
    nested = {"params": {"critic": {"kernel": torch.ones(3, 2), "bias": torch.ones(2)}}}
    assert set(from_layout(nested, "flax")) == {"params.critic.weight", "params.critic.bias"}


def test_rlax_goes_on_where_this_library_stops_and_back() -> None:
    """Both update the same statistics and the same head; then each goes on with the other's."""
    head = {"weight": torch.tensor([[1.0, -2.0], [0.5, 0.3]]), "bias": torch.tensor([0.1, -0.2])}
    mine, (_, rlax_update) = popart(2, 0.1, reduction="sum"), rlax.popart(2, 0.1, 1e-4, 1e6)
    targets, indices = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([0, 1, 0], dtype=torch.int32)
    state = init_state(2)
    head, state = mine.update(head, state, targets, indices)

    rlax_head, rlax_state = to_layout(to_jax(head), "rlax"), to_rlax_state(state)
    assert type(rlax_state) is rlax.PopArtState
    rlax_head, rlax_state = rlax_update(rlax_head, rlax_state, to_jax(targets), to_jax(indices))
    head, state = mine.update(head, state, targets, indices)
    for got, expected in [
        (to_torch(from_layout(rlax_head, "rlax")), head),
        (from_rlax_state(rlax_state, count=2)._asdict(), state._asdict()),
    ]:
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=2e-6, atol=1e-6)


def test_statistics_of_many_lanes() -> None:
    states = vmap(lambda y: art(init_state(2), y, step_size=0.5))(torch.randn(4, 2) * 3)
    back = from_rlax_state(to_rlax_state(states))
    torch.testing.assert_close(back.variance, states.variance, rtol=1e-5, atol=1e-5)
    assert torch.equal(back.scale, states.scale)
    assert torch.equal(back.count, states.count)


def test_a_second_moment_that_was_rounded_gives_no_negative_variance() -> None:
    rounded = RlaxState(jnp.array([1000.0]), jnp.array([1e-4]), jnp.array([999999.9]))
    assert from_rlax_state(rounded).variance == 0


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"to_layout: `layout` must be one of \['haiku', .*\], got 'keras'"):
        to_layout({"weight": torch.ones(2, 2)}, "keras")
    with pytest.raises(ValueError, match=r"linear layers' 'weight' .*, got 'norm.weight' of shape \(3,\)"):
        to_layout({"norm.weight": torch.ones(3)}, "flax")
    with pytest.raises(ValueError, match=r"from_layout: `layers` must hold 'kernel' .*, got 'a.scale' of shape \(3,\)"):
        from_layout({"a": {"scale": torch.ones(3)}}, "flax")
    with pytest.raises(TypeError, match="from_layout: `layers` must be a dict of tensors or arrays, got NoneType"):
        from_layout(None, "flax")
    with pytest.raises(TypeError, match=r"to_layout: `params` must hold tensors or arrays, got int at 'a.weight'"):
        to_layout({"a.weight": 3}, "flax")
    with pytest.raises(TypeError, match=r"from_rlax_state: `state` must have the fields \('shift', .*got dict"):
        from_rlax_state({})
    with pytest.raises(TypeError, match="to_rlax_state: `state` must be a PopArtState, got int"):
        to_rlax_state(3)
    with pytest.raises(TypeError, match="to_layout: `params` must have names for keys, got 1"):
        to_layout({1: torch.ones(2, 2)}, "flax")
    assert isinstance(from_rlax_state(RlaxState(*[jnp.ones(1)] * 3)).shift, Tensor)
