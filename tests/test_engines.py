"""What scan means, and that every engine means the same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
import torch._dynamo
from runnable import COMPILED, RUNNABLE, inductor_slow
from torch.func import vmap

import popart_func as pf
from popart_func import engines
from popart_func.engines import (
    ENGINES,
    Engine,
    EngineUnavailableError,
    lane_scan,
    load_engine,
    scan,
    scan_lanes,
)
from popart_func.engines.tracing.tracer import trace_step

LANES, STEPS = 7, 60
"""The same in all tests of the learner's step, so that an engine compiles it once: inductor takes 10 s."""


def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


APPLY = pf.stateless(make())


def learner_step(state, batch, hparams):
    learner = pf.popart_learner(APPLY, pf.sgd(hparams["learning_rate"]), pf.popart(2, hparams["step_size"]), head="2")
    state, info = learner.update(state, batch)
    return state, {"error": info.error, "loss": info.loss}


def learner_problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = optree.tree_map(lambda leaf: leaf.to(dtype), pf.init_lanes(make, range(LANES)))
    learner = pf.popart_learner(APPLY, pf.sgd(0.1), pf.popart(2, 0.1), head="2")
    xs = torch.randn(STEPS, LANES, 4, generator=generator, dtype=dtype)
    ys = torch.randn(STEPS, LANES, 2, generator=generator, dtype=dtype) * 30 + 12
    rates = {
        "learning_rate": torch.linspace(0.01, 0.1, LANES, dtype=dtype),
        "step_size": torch.linspace(0.05, 0.5, LANES, dtype=dtype),
    }
    return vmap(learner.init)(params), (xs, ys), rates


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_is(name):
    """An attribute that is missing would be seen in the first scan only that is long enough for it."""
    engine = load_engine(name)
    assert isinstance(engine, Engine)
    assert isinstance(engine.pays_off_after, int)
    assert engine.why_not(torch.device("meta")) is None or name != "eager"
    assert not isinstance(engines.lane_scan, Engine)


@pytest.mark.parametrize("engine", RUNNABLE)
def test_scan_means_what_jax_means(engine):
    def torch_step(carry, x):
        total, count = carry["total"] + x["a"] * 2, carry["count"] + 1
        return {"total": total, "count": count}, (total.sum(), x["b"])

    def jax_step(carry, x):
        total, count = carry["total"] + x["a"] * 2, carry["count"] + 1
        return {"total": total, "count": count}, (total.sum(), x["b"])

    xs = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.arange(4, dtype=np.int32)}
    start = {"total": np.ones(3, np.float32), "count": np.int32(0)}
    expected = jax.lax.scan(jax_step, jax.tree.map(jnp.array, start), jax.tree.map(jnp.array, xs))
    got = scan(torch_step, optree.tree_map(torch.as_tensor, start), optree.tree_map(torch.as_tensor, xs), engine=engine)
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    for ours, theirs in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


@pytest.mark.parametrize("engine", RUNNABLE)
def test_scan_without_xs_without_ys_and_with_a_carry_that_stays(engine):
    carry, ys = scan(lambda c, x: (c + 1, ()), torch.tensor(0), length=4, engine=engine)
    assert (carry.item(), ys) == (4, ())
    carry, ys = scan(lambda c, x: (c, {"c": c, "x": x}), torch.tensor(7), torch.arange(3), engine=engine)
    assert carry.item() == 7
    assert ys["c"].tolist() == [7, 7, 7]
    assert ys["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("engine", RUNNABLE)
def test_shared_and_per_lane_inputs(engine):
    """With 3 lanes and rows of 3 the shapes can't tell: `shared` does."""
    rows = torch.arange(12.0).reshape(4, 3)

    def shared_step(carry, x):
        return carry + x.sum(), x * carry

    def lane_step(carry, x):
        return carry + x, x * carry

    start = torch.tensor([1.0, 2.0, 3.0])
    carry, ys = scan_lanes(shared_step, start, rows, shared=True, engine=engine)
    assert carry.tolist() == [67, 68, 69]
    assert ys.shape == (4, 3, 3)
    assert ys[0, 2].tolist() == [0, 3, 6]
    carry, ys = scan_lanes(lane_step, start, rows, engine=engine)
    assert carry.tolist() == [19, 24, 29]
    assert ys.shape == (4, 3)
    mixed = {"each": rows, "all": torch.ones(4)}
    carry, _ = scan_lanes(lambda c, x: (c + x["each"] * x["all"], ()), start, mixed, engine=engine)
    assert carry.tolist() == [19, 24, 29]
    again, _ = scan_lanes(
        lambda c, x: (c + x["each"].sum() * x["all"], ()),
        start,
        mixed,
        shared={"each": True, "all": True},
        engine=engine,
    )
    assert again.tolist() == [67, 68, 69]


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        # Inductor compiles for ten seconds; what it makes of a step differs by the names of types only.
        pytest.param(engine, dtype, marks=pytest.mark.slow if (engine, dtype) == ("inductor", torch.float64) else ())
        for engine in COMPILED
        for dtype in (torch.float64, torch.float32)
    ],
)
def test_engines_agree_with_eager(engine, dtype):
    start, xs, rates = learner_problem(dtype)
    expected = scan_lanes(learner_step, start, xs, hparams=rates, engine="eager")
    got = scan_lanes(learner_step, start, xs, hparams=rates, engine=engine)
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    # 60 steps on numbers up to 50, re-ordered; errors grow with the steps, not exponentially, at these rates.
    scale = STEPS * 50
    assert pf.tree.max_difference(got, expected) < scale * torch.finfo(dtype).eps * 10


@pytest.mark.parametrize("engine", inductor_slow(RUNNABLE))
def test_a_step_is_traced_once(engine):
    calls = []

    def step(carry, x):
        calls.append(1)
        return carry * 0.5 + x, carry

    start, xs = torch.zeros(3), torch.randn(5)
    first = scan_lanes(step, start, xs, engine=engine)
    after_first = len(calls)
    second = scan_lanes(step, start, xs, engine=engine)
    assert torch.equal(first[1], second[1])
    if engine == "eager":
        assert len(calls) == 10
    else:
        assert len(calls) == after_first == 1
        scan_lanes(step, torch.zeros(4), xs, engine=engine)
        assert len(calls) == 1, "another number of lanes needs no new trace"
        scan_lanes(step, start.double(), xs.double(), engine=engine)
        assert len(calls) == 2, "another dtype does"


@pytest.mark.parametrize("engine", RUNNABLE)
@pytest.mark.usefixtures("unchecked")
def test_lanes_are_independent(engine):
    """With other neighbours in the same number of lanes: bit for bit. Alone: to rounding (vmap picks other kernels)."""
    start, xs, rates = learner_problem(torch.float32)
    other_start, other_xs, _ = learner_problem(torch.float32, seed=9)

    def replace(mine, other, axis):
        keep = torch.zeros(LANES, dtype=torch.bool)
        keep[2] = True
        keep = keep.reshape((1,) * axis + (LANES,) + (1,) * (mine.ndim - axis - 1))
        return torch.where(keep, mine, other.flip(axis))

    mixed_start = optree.tree_map(lambda mine, other: replace(mine, other, 0), start, other_start)
    mixed_xs = optree.tree_map(lambda mine, other: replace(mine, other, 1), xs, other_xs)
    carry, ys = scan_lanes(learner_step, start, xs, hparams=rates, engine=engine)
    mixed_carry, mixed_ys = scan_lanes(learner_step, mixed_start, mixed_xs, hparams=rates, engine=engine)
    for one, two in zip(optree.tree_leaves(carry), optree.tree_leaves(mixed_carry), strict=True):
        assert torch.equal(one[2], two[2])
    assert torch.equal(ys["error"][:, 2], mixed_ys["error"][:, 2])
    assert not torch.equal(ys["error"][:, 3], mixed_ys["error"][:, 3])

    alone_start, alone_rates = optree.tree_map(lambda leaf: leaf[2:3], (start, rates))
    alone_xs = optree.tree_map(lambda leaf: leaf[:, 2:3], xs)
    _, alone = scan_lanes(learner_step, alone_start, alone_xs, hparams=alone_rates, engine=engine)
    # 25 steps on errors of order 30: 2⁻²⁴ · 30 a step, growing by a factor of a few over so short a run.
    torch.testing.assert_close(alone["error"][:25, 0], ys["error"][:25, 2], rtol=0, atol=25 * 30 * 2**-24 * 10)


@pytest.mark.parametrize("engine", RUNNABLE)
def test_inputs_are_left_alone_and_strides_do_not_matter(engine):
    start = torch.zeros(1, 3).expand(4, 3)
    xs = torch.randn(4, 6).T
    before = xs.clone()
    carry, ys = scan_lanes(lambda c, x: (c + x, c.sum()), start, xs, engine=engine)
    assert torch.equal(xs, before)
    assert torch.equal(start, torch.zeros(4, 3))
    torch.testing.assert_close(carry[:, 1], xs.sum(0))
    assert ys.shape == (6, 4)


@pytest.mark.parametrize("engine", COMPILED)
def test_many_steps_can_be_compiled(engine):
    """More than Dynamo's limit of recompilations of one function."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for number in range(3):
            step = lambda c, x, number=number: (c + number, c * x)  # noqa: E731
            carry, _ = scan_lanes(step, torch.zeros(2), torch.ones(3), engine=engine)
            assert carry.tolist() == [3.0 * number] * 2


@pytest.mark.parametrize("engine", inductor_slow(RUNNABLE))
def test_any_callable_is_a_step(engine):
    class Slotted:
        __slots__ = ("rate",)

        def __init__(self, rate):
            self.rate = rate

        def __call__(self, carry, x):
            return carry + self.rate * x, ()

        def method(self, carry, x):
            return self(carry, x)

    for step in (Slotted(2.0), Slotted(2.0).method, functools.partial(lambda rate, c, x: (c + rate * x, ()), 2.0)):
        assert scan_lanes(step, torch.zeros(1), torch.ones(3), engine=engine)[0] == 6


@pytest.mark.parametrize("engine", RUNNABLE)
def test_numbers_as_hyper_parameters_are_the_same_in_all_lanes(engine):
    carry, _ = scan_lanes(lambda c, x, h: (c + x * h, ()), torch.zeros(3), torch.ones(4), hparams=0.5, engine=engine)
    assert carry.tolist() == [2, 2, 2]


def test_eager_scan_is_differentiable():
    weight = torch.tensor(0.5, requires_grad=True)
    carry, _ = scan(lambda c, x: (c * weight + x, ()), torch.tensor(0.0), torch.ones(3), engine="eager")
    carry.backward()
    assert weight.grad.item() == 1 + 2 * 0.5


def test_gradients_and_transforms_are_for_eager():
    """However long the run, `auto` does not drop a gradient; a compiled engine refuses."""
    start, xs = torch.tensor(1.0, requires_grad=True), torch.ones(2500)
    carry, _ = scan(lambda c, x: (c + x, ()), start, xs)
    carry.backward()
    assert start.grad == 1
    for engine in COMPILED:
        with pytest.raises(EngineUnavailableError, match=rf"'{engine}' can't do this: no gradient flows through it"):
            scan(lambda c, x: (c + x, ()), start, xs, engine=engine)
        with pytest.raises(EngineUnavailableError, match=r"can't run inside a transform .* Use the engine 'eager'"):
            vmap(lambda c: scan(lambda c, x: (c + x, ()), c, xs[:2], engine=engine)[0])(torch.zeros(2))  # noqa: B023
        with torch.no_grad():
            assert scan(lambda c, x: (c + x, ()), start, xs[:3], engine=engine)[0] == 4


@pytest.mark.parametrize("engine", RUNNABLE)
def test_hyper_parameters_keep_their_kind(engine):
    """2^24 + 1 is no float32; an integer may be an index, and a bool a condition."""

    def step(carry, x, h):
        chosen = torch.arange(3.0).index_select(0, h["index"][None])[0]
        return torch.where(h["flag"], h["large"] + x, carry), (chosen, h["rate"] * 2)

    hparams = {"large": 2**24 + 1, "index": 2, "flag": True, "rate": 0.25}
    start = xs = torch.zeros(2, dtype=torch.int64)
    carry, (chosen, rate) = scan_lanes(step, start, xs, hparams=hparams, engine=engine)
    assert carry.tolist() == [2**24 + 1] * 2
    assert chosen.unique().tolist() == [2]
    assert rate.unique().tolist() == [0.5]
    assert rate.dtype == torch.float32


@pytest.mark.parametrize("engine", inductor_slow(RUNNABLE))
def test_whole_numbers_as_rates(engine):
    start, xs, _ = learner_problem(torch.float32)
    whole = scan_lanes(learner_step, start, xs, hparams={"learning_rate": 0, "step_size": 1}, engine=engine)
    floats = scan_lanes(learner_step, start, xs, hparams={"learning_rate": 0.0, "step_size": 1.0}, engine=engine)
    assert pf.tree.max_difference(whole, floats) == 0


def test_hyper_parameters_take_the_lanes_precision():
    carry = torch.zeros(2, dtype=torch.float64)
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        result, _ = scan_lanes(lambda c, x, h: (c + h, ()), carry, length=1, hparams=rate, engine="eager")
        assert result.tolist() == [0.1, 0.1]


@pytest.mark.skipif("native" not in RUNNABLE, reason="no C++ compiler")
def test_a_warm_scan_asks_for_its_graph_once(monkeypatch):
    """Though the cost model and the engine read it."""
    asked = []
    step = lambda c, x: (c * 0.5 + x, ())  # noqa: E731
    scan_lanes(step, torch.zeros(3), torch.ones(2500))
    monkeypatch.setattr(lane_scan, "trace_step", lambda *args, **kwargs: asked.append(1) or trace_step(*args, **kwargs))
    scan_lanes(step, torch.zeros(3), torch.ones(2500))
    assert asked == [1]
