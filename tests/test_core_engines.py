"""Weights, groups, heads, losses and optimizers inside lanes: under vmap, on eager and native, and in JAX."""

from __future__ import annotations

from operator import itemgetter

import jax
import jax.numpy as jnp
import optree
import pytest
import torch
from torch.func import vmap

import popart_func as pf
from popart_func import optim, scales
from popart_func.engines import scan_lanes
from popart_func.interop.jax import to_jax, to_jax_function, to_torch
from popart_func.learners import losses

pytestmark = pytest.mark.usefixtures("unchecked")
GROUPS = torch.tensor([0, 0, 1, 1])


def apply(params, x):
    return torch.tanh(x @ params["body"]) @ params["head.weight"].mT + params["head.bias"]


def make(hparams):
    parts = optim.partition(
        {
            "head": optim.from_torch(torch.optim.NAdam, lr=hparams["rate"], weight_decay=0.01),
            "body": pf.chain(optim.clip_by_global_norm(hparams["rate"] * 10), pf.sgd(hparams["rate"])),
        },
        lambda name: "head" if name.startswith("head") else "body",
    )
    popart = pf.popart(2, hparams["step"], groups=GROUPS, bias_correction=True)
    return pf.popart_learner(apply, parts, popart, head="head", loss=losses.huber(2.0))


def step(state, batch, hparams):
    state, info = make(hparams).update(state, batch)
    return state, (info.loss, info.error.mean())


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(3)
    params = {"body": torch.randn(3, 5), "head.weight": torch.randn(4, 5), "head.bias": torch.zeros(4)}
    hparams = {"rate": torch.tensor([0.01, 0.1, 0.03]), "step": torch.tensor([0.1, 0.01, 0.5])}
    alone = make({"rate": 0.1, "step": 0.1}).init(params)
    states = optree.tree_map(lambda leaf: leaf.expand(3, *leaf.shape).clone(), alone)
    y = torch.randn(12, 3, 6, 4) * 100 + 50
    weights = (torch.rand(12, 3, 6, 4) < 0.6).float() * torch.rand(12, 3, 6, 4)
    batches = {"x": torch.randn(12, 3, 6, 3), "y": torch.where(weights > 0, y, torch.nan), "weights": weights}
    return states, batches, hparams


def test_engines_agree(run):
    states, batches, hparams = run
    results = [scan_lanes(step, states, batches, hparams=hparams, engine=name) for name in ("eager", "native")]
    for got, expected in zip(*map(optree.tree_leaves, results), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_a_lane_is_a_run_of_its_own(run):
    """Every argument has a lane: the state, the batch with its weights, and the hyper-parameters."""
    states, batches, hparams = run
    first = optree.tree_map(lambda leaf: leaf[0], batches)
    lanes, _ = vmap(step)(states, first, hparams)
    for lane in range(3):
        one = optree.tree_map(itemgetter(lane), (states, first, hparams))
        alone, _ = step(*one)
        assert pf.tree.max_difference(optree.tree_map(itemgetter(lane), lanes), alone) < 1e-4


def test_in_jax(run):
    states, batches, hparams = run
    one = optree.tree_map(lambda leaf: leaf[1], (states, optree.tree_map(lambda leaf: leaf[0], batches), hparams))
    got = jax.jit(to_jax_function(step))(*to_jax(one))
    for leaf, expected in zip(optree.tree_leaves(to_torch(got[0])), optree.tree_leaves(step(*one)[0]), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_weighted_statistics_in_jax_and_under_vmap_of_the_weights(reduction):
    y, of = torch.tensor([1.0, torch.nan, 7.0, 4.0]), torch.tensor([0, 1, 1, 0])
    weights = torch.tensor([[1.0, 0, 2, 0.5], [0, 0, 0, 0], [1, 0, 0, 3]])

    def move(weights):
        return pf.art(pf.init_state(2), y, of, weights, step_size=0.1, reduction=reduction)

    lanes = vmap(move)(weights)
    in_jax = jax.vmap(to_jax_function(move))(jnp.asarray(weights.numpy()))
    for lane in range(3):
        expected = move(weights[lane])
        for got in (lanes, to_torch(in_jax)):
            for field, one in zip(got, expected, strict=True):
                torch.testing.assert_close(field[lane], one, rtol=1e-6, atol=1e-6)


# Every row in one step, so that an engine compiles once.


def two_heads(params, x):
    h = torch.tanh(x @ params["body"])
    return torch.cat([h @ params[f"{name}.weight"].mT + params[f"{name}.bias"] for name in ("a", "b")], -1)


def quantiles():
    return losses.quantile(torch.tensor([0.2, 0.8, 0.2, 0.8]))


ROWS = {
    "masks": lambda h: pf.popart_learner(apply, pf.sgd(h["rate"]), pf.popart(4, h["step"]), head="head"),
    "several heads": lambda h: pf.popart_learner(
        two_heads, pf.adam(h["rate"]), pf.popart(2, h["step"], groups=torch.tensor([0, 0, 1, 1])), head=["a", "b"]
    ),
    "quantiles": lambda h: pf.popart_learner(
        apply, pf.sgd(h["rate"], momentum=0.9), pf.popart(2, h["step"], groups=GROUPS), head="head", loss=quantiles()
    ),
    "any optimizer": lambda h: pf.popart_learner(
        apply, optim.from_torch(torch.optim.RMSprop, lr=h["rate"], momentum=0.5), pf.popart(4, h["step"]), head="head"
    ),
    "percentiles": lambda h: pf.popart_learner(
        apply,
        pf.sgd(h["rate"]),
        scales.percentiles(1, h["step"]),
        head="head",
        loss=losses.clipped_value(h["rate"] * 9),
    ),
    "largest return": lambda h: pf.popart_learner(
        apply, optim.adamw(h["rate"]), scales.largest_return(1, 5.0), head="head"
    ),
}


def every_row(states, batch, hparams):
    batch = {**batch, "old_value": batch["x"].sum(-1, keepdim=True).expand(6, 4)}
    found = {name: make(hparams).update(states[name], batch) for name, make in ROWS.items()}
    return {name: state for name, (state, _) in found.items()}, {name: info.loss for name, (_, info) in found.items()}


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(5)
    heads = {"a.weight": torch.randn(1, 5), "a.bias": torch.zeros(1), "b.weight": torch.randn(3, 5)}
    heads |= {"b.bias": torch.zeros(3), "body": torch.randn(3, 5)}
    one_head = {"body": torch.randn(3, 5), "head.weight": torch.randn(4, 5), "head.bias": torch.zeros(4)}
    alone = {
        name: make({"rate": 0.1, "step": 0.1}).init(heads if name == "several heads" else one_head)
        for name, make in ROWS.items()
    }
    states = optree.tree_map(lambda leaf: torch.stack([leaf * factor for factor in (1, 1, 1)]), alone)
    hparams = {"rate": torch.tensor([0.01, 0.03, 0.003]), "step": torch.tensor([0.1, 0.01, 0.5])}
    y, weights = torch.randn(4, 3, 6, 4) * 100 + 50, (torch.rand(4, 3, 6, 4) < 0.7).float()
    return (
        states,
        {"x": torch.randn(4, 3, 6, 3), "y": torch.where(weights > 0, y, torch.nan), "weights": weights},
        hparams,
    )


@pytest.mark.parametrize("engine", ["native", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_row_on_every_engine(rows, engine):
    states, batches, hparams = rows
    results = [scan_lanes(every_row, states, batches, hparams=hparams, engine=name) for name in ("eager", engine)]
    for got, expected in zip(*map(optree.tree_leaves, reversed(results)), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


EACH = [(0, None, None), (None, 0, None), (None, None, 0)]


CASES = [(axes, False) for axes in ((0, 0, 0), *EACH)] + [((0, 0, 0), True)]


@pytest.mark.parametrize(
    ("mapped", "in_jax"), [*CASES, *(pytest.param(axes, True, marks=pytest.mark.slow) for axes in EACH)]
)
def test_every_row_under_vmap_of_each_argument(rows, mapped, in_jax):
    states, batches, hparams = rows
    args = states, optree.tree_map(lambda leaf: leaf[0], batches), hparams
    given = [arg if axis == 0 else optree.tree_map(itemgetter(1), arg) for arg, axis in zip(args, mapped, strict=True)]
    if in_jax:
        found = to_torch(jax.jit(jax.vmap(to_jax_function(every_row), mapped))(*to_jax(tuple(given))))
    else:
        found = vmap(every_row, mapped)(*given)
    for lane in (0, 2):
        pairs = zip(given, mapped, strict=True)
        one = [optree.tree_map(itemgetter(lane), arg) if axis == 0 else arg for arg, axis in pairs]
        for got, leaf in zip(optree.tree_leaves(found), optree.tree_leaves(every_row(*one)), strict=True):
            torch.testing.assert_close(got[lane], leaf, rtol=1e-3, atol=1e-3)
