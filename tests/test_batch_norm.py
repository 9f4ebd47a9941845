"""Batch normalization in training: running statistics by lane, on the native engine and in JAX as on eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optree
import pytest
import torch
from torch import Tensor, nn

import popart_func as pf
from popart_func.interop.jax import to_jax, to_jax_function, to_torch

pytestmark = pytest.mark.usefixtures("unoptimized_xla")

close = torch.testing.assert_close


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def make_learner() -> pf.Learner:
    # A bias before batch normalization has a gradient of rounding noise, which Adam would amplify.
    return pf.popart_learner(pf.stateless(make_network()), pf.sgd(0.02), pf.popart(1, 0.1), head="2")


def batches(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(steps, 16, 3, generator=generator) + 1, 3 * torch.randn(steps, 16, 1, generator=generator)


def test_native_trains_lanes_as_eager_does() -> None:
    learner = make_learner()
    states = torch.func.vmap(learner.init)(pf.init_lanes(make_network, range(4)))
    run = lambda engine: pf.scan_lanes(  # noqa: E731
        lambda state, batch: learner.update(state, batch), states, batches(20), shared=True, engine=engine
    )
    got, expected = run("native"), run("eager")
    for ours, theirs in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        close(ours, theirs, rtol=1e-4, atol=1e-5)
    params = got[0].params
    assert (params["1.num_batches_tracked"] == 20).all()
    assert (params["1.running_mean"][0] - params["1.running_mean"][1]).abs().min() > 1e-3, "each lane has its own"


def test_jax_trains_as_eager_does() -> None:
    learner = make_learner()
    state = learner.init(pf.init_params(make_network, 0))
    update = jax.jit(to_jax_function(learner.update))
    there = to_jax(state, strict_dtype=False)
    for x, y in zip(*batches(5), strict=True):
        state, info = learner.update(state, (x, y))
        there, told = update(there, to_jax((x, y)))
    for name, leaf in to_torch(there.params).items():
        close(leaf, state.params[name], check_dtype=False, rtol=1e-4, atol=1e-5)
    close(to_torch(told.error), info.error, rtol=1e-4, atol=1e-5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "images": (lambda: nn.BatchNorm2d(3, momentum=0.3), (4, 3, 2, 5)),
    "an average of all batches": (lambda: nn.BatchNorm1d(3, momentum=None), (4, 3)),
    "without weights": (lambda: nn.BatchNorm1d(3, affine=False), (4, 3)),
    "without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3)),
    "instances": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (4, 3, 5)),
    "evaluation": (lambda: nn.BatchNorm1d(3).eval(), (4, 3)),
}


def test_layers_and_their_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    xs = {name: torch.randn(shape, generator=generator) + 2 for name, (_, shape) in LAYERS.items()}
    layers = {name: (pf.stateless(make()), pf.init_params(make, 0)) for name, (make, _) in LAYERS.items()}

    def loss(x: Tensor, name: str) -> tuple[Tensor, Any]:
        apply, params = layers[name]
        y, buffers = apply.with_buffers(params, x)
        return (y**3).sum(), (y, buffers)

    def function(xs: dict[str, Tensor]) -> dict[str, Any]:
        """Of each layer: the gradient, what it returns, and its buffers."""
        return {name: torch.func.grad(loss, has_aux=True)(x, name) for name, x in xs.items()}

    def outside(xs: dict[str, Tensor]) -> Tensor:
        total = sum((layers[name][0](layers[name][1], x) ** 3).sum() for name, x in xs.items())
        assert isinstance(total, Tensor)
        return total

    expected = optree.tree_leaves(function(xs))
    first = optree.tree_map(lambda x: x[None], xs)
    step = lambda carry, xs: (carry, function(xs))  # noqa: E731
    native = pf.scan_lanes(step, torch.zeros(1), first, shared=True, engine="native")[1]
    for got, right in zip(optree.tree_leaves(native), expected, strict=True):
        close(got[0, 0], right, rtol=1e-4, atol=1e-4)
    in_jax = jax.jit(to_jax_function(function))(to_jax(xs))
    for got, right in zip(optree.tree_leaves(to_torch(in_jax)), expected, strict=True):
        close(got, right, rtol=1e-4, atol=1e-4, check_dtype=False)
    slopes = jax.jit(jax.grad(to_jax_function(outside)))(to_jax(xs))
    for name, slope in to_torch(slopes).items():
        close(slope, function(xs)[name][0], rtol=1e-4, atol=1e-4)


def test_blueprint_and_arguments_stay_as_they_were() -> None:
    module = nn.BatchNorm1d(3)
    apply, params = pf.stateless(module), pf.init_params(lambda: nn.BatchNorm1d(3), 0)
    before = {name: leaf.clone() for name, leaf in params.items()}
    to_jax_function(apply.with_buffers)(to_jax(params, strict_dtype=False), to_jax(torch.randn(4, 3)))
    assert all(torch.equal(params[name], leaf) for name, leaf in before.items())
    assert module.num_batches_tracked == 0
