"""What scan means, and that every engine means the same."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F  # noqa: N812
from torch.func import vmap

import popart_func as pf
from popart_func import engines
from popart_func.engines import (
    ENGINES,
    Engine,
    EngineUnavailableError,
    UnsupportedError,
    available_engines,
    cost_model,
    lane_scan,
    load_engine,
    resolve_engine,
    scan,
    scan_lanes,
)
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.tracing.tracer import trace_step

RUNNABLE = [name for name in ENGINES if available_engines()[name] is None]
TABLE = torch.zeros(3)
COMPILED = [name for name in RUNNABLE if name != "eager"]


def inductor_slow(names):
    """Engines for a test of the trace that they share: inductor, which compiles for seconds, only with ``-m slow``."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "inductor" else name for name in names]


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


def changes_its_input(carry, x):
    y = x[:1]
    y += carry  # HERE
    return carry + x.sum(), ()


def changes_its_carry(carry, x):
    carry.mul_(2)  # HERE
    carry = carry + x.sum()
    return carry, ()


def changes_what_it_closes_over(carry, x):
    TABLE[0] = x[0]  # HERE
    return carry + TABLE.sum(), ()


@pytest.mark.parametrize("step", [changes_its_input, changes_its_carry, changes_what_it_closes_over])
@pytest.mark.parametrize("engine", RUNNABLE)
def test_a_step_that_changes_what_it_is_given_is_refused(engine, step):
    """With its line, where it is traced; `eager` does not see what a step closes over."""
    if (engine, step) == ("eager", changes_what_it_closes_over):
        pytest.skip("eager can't see it")
    message = r"scan_lanes: `step` changes an argument.* in place.*: a step must be pure\. Write `x = x \+ 1` instead"
    with pytest.raises(TypeError, match=message) as caught:
        scan_lanes(step, torch.ones(2), torch.ones(2, 2, 3), engine=engine)
    assert engine == "eager" or "# HERE`" in str(caught.value)


def test_auto_and_unavailable_engines(monkeypatch):
    assert resolve_engine("auto", "cpu", steps=10) == RUNNABLE[0] or resolve_engine("auto", "cpu", steps=10) == "eager"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for name in COMPILED:
        with pytest.raises(EngineUnavailableError, match=rf"the engine '{name}' can't run on cpu: no C\+\+ compiler"):
            scan(lambda c, x: (c, c), torch.zeros(1), torch.zeros(2), engine=name)
    engines.selection._say_once.cache_clear()
    with pytest.warns(
        UserWarning, match=r"engine 'auto': .* can't run on cpu: no C\+\+ compiler.* Going on with eager"
    ):
        assert resolve_engine("auto", "cpu", steps=10**6) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_engine("auto", "cpu", steps=10**6) == "eager"


def test_auto_takes_the_native_engine_on_cuda_where_it_runs(monkeypatch):
    monkeypatch.setattr(engines.native, "why_not", lambda device: None if device.type == "cuda" else "not here.")
    assert resolve_engine("auto", "cuda", steps=5004) == "native"


def network_scan(width, batch, lanes, steps):
    def make():
        return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Tanh(), torch.nn.Linear(width, width))

    apply, params = pf.stateless(make()), pf.init_params(make, seed=0)
    learner = pf.popart_learner(apply, pf.sgd(0.1), pf.popart(width, 0.1), head="2")
    state = optree.tree_map(lambda leaf: leaf.expand(lanes, *leaf.shape), learner.init(params))
    batches = torch.zeros(1, batch, 16), torch.zeros(1, batch, width)
    xs = optree.tree_map(lambda leaf: leaf.expand(steps, *leaf.shape[1:]), batches)
    return make_lane_scan("scan", lambda state, xy: (learner.update(state, xy)[0], ()), state, xs, shared=True)


def pop_art_scan(width, batch, lanes):
    """As in `benchmarks/fit_cost_model.py`."""

    def make():
        layers = (torch.nn.Linear(16, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh())
        return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))

    apply, params = pf.stateless(make()), pf.init_params(make, seed=0)
    learner = pf.popart_learner(apply, pf.sgd(1e-3), pf.popart(1, 0.01), head="4")
    state = optree.tree_map(lambda leaf: leaf.expand(lanes, *leaf.shape), learner.init(params))

    def step(state, xy):
        state, info = learner.update(state, xy)
        return state, info.error.mean()

    return make_lane_scan("scan", step, state, (torch.zeros(1, batch, 16), torch.zeros(1, batch, 1)), shared=True)


@pytest.mark.parametrize(
    ("width", "batch", "lanes", "lanes_microseconds", "elements", "inductor"),
    [(16, 1, 1, 0.61, 0.12, 8.5), (64, 1, 16, 8.4, 6.5, 22), (64, 32, 4, 133, 24, 79)],
)
def test_the_predicted_time_of_a_step(width, batch, lanes, lanes_microseconds, elements, inductor):
    """Within a factor of 2 of what `benchmarks/fit_cost_model.py` measured on one thread of an AVX-512 machine."""
    counts = cost_model.OperationCounts.of(pop_art_scan(width, batch, lanes).graph(), 64)
    seconds = cost_model.predict(counts, lanes, threads=1, register=64)
    for predicted, measured in zip(seconds, (lanes_microseconds, elements, inductor), strict=True):
        assert 0.5 < predicted / (1e-6 * measured) < 2


def test_the_operations_of_a_step():
    def step(carry, x):
        return torch.addmm(carry, carry.T @ carry, carry).tanh(), carry[0] * x

    problem = make_lane_scan("scan", step, torch.zeros(1, 3, 3), torch.zeros(2).double())
    expected = cost_model.OperationCounts(
        nodes=6,
        products=2 * 27,
        others=9 + 3,
        bytes=4,
        product_vectors=18,
        loops=3,
        other_vectors=1,
        scalars=3,
        values=(9 + 1) + 3 * 9 + 3,
    )
    assert cost_model.OperationCounts.of(problem.graph(), 64) == expected


def test_inductor_is_for_large_products_of_one_lane_on_many_threads_in_long_runs(monkeypatch):
    """Only it shares a product between threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(cost_model, "register_bytes", lambda: 64)
    assert "ms on inductor and" in cost_model.why_inductor(network_scan(256, 128, 1, 1_000_000))
    assert cost_model.why_inductor(network_scan(256, 128, 1, 100)) is None
    assert cost_model.why_inductor(network_scan(256, 128, 64, 100)) is None
    assert cost_model.why_inductor(network_scan(10, 1, 50, 100_000)) is None
    assert cost_model.why_inductor(network_scan(10, 1, 1, 100_000)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cost_model.why_inductor(network_scan(256, 128, 1, 1_000_000)) is None


@pytest.mark.skipif(len(RUNNABLE) < 3, reason="no C++ compiler")
def test_auto_takes_inductor_where_it_should_be_faster(monkeypatch):
    def step(carry, x):
        return (carry @ carry) * 0.5, ()

    def refuse(lanes):
        raise UnsupportedError("inductor: not today.")

    start = torch.zeros(1, 128, 128)
    engines.selection._say_once.cache_clear()
    monkeypatch.setattr(cost_model, "predict_here", lambda *_, **__: cost_model.PredictedSeconds(3e-5, 3e-5, 1e-5))
    monkeypatch.setattr(engines.inductor, "run", lambda lanes: (f"{lanes.steps} steps", ()))
    with pytest.warns(UserWarning, match=r"'auto': a step should take .* ms on native .* Going on with inductor"):
        assert scan_lanes(step, start, length=10**6)[0] == "1000000 steps"
    assert scan_lanes(step, start, length=500)[0].shape == (1, 128, 128)
    monkeypatch.setattr(engines.inductor, "run", refuse)
    monkeypatch.setattr(engines.native, "run", lambda lanes: ("native", ()))
    with pytest.warns(UserWarning, match=r"inductor: not today. Going on with native"):
        assert scan_lanes(step, start, length=10**6)[0] == "native"


def test_auto_goes_on_where_an_engine_lacks_something(recwarn):
    """bfloat16 is beyond the native engine: `auto` says so once, and goes on."""

    def step(carry, x):
        return carry + x.bfloat16().float(), ()

    for _ in range(2):
        carry, _ = scan_lanes(step, torch.zeros(2), torch.ones(600))
        assert carry.tolist() == [600, 600]
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 1
    assert "engine 'auto': native: no dtype torch.bfloat16" in messages[0]
    assert "test_engines.py" in messages[0]
    assert recwarn[0].filename == __file__
    assert messages[0].endswith("Going on with eager.")
    with pytest.raises(UnsupportedError, match=r"no dtype torch.bfloat16"):
        scan_lanes(step, torch.zeros(2), torch.ones(600), engine="native")


def test_gradients_of_what_a_step_closes_over_are_not_lost():
    weight = torch.tensor(2.0, requires_grad=True)

    def step(carry, x):
        return carry + weight * x, ()

    with pytest.warns(UserWarning, match="closes over a tensor that requires one.* Going on with eager"):
        carry, _ = scan(step, torch.tensor(0.0), torch.ones(600))
    carry.backward()
    assert weight.grad == 600
    for engine in COMPILED:
        with pytest.raises(UnsupportedError, match=f"{engine}: no gradient flows"):
            scan(step, torch.tensor(0.0), torch.ones(3), engine=engine)
        with torch.no_grad():
            assert scan(step, torch.tensor(0.0), torch.ones(3), engine=engine)[0] == 6


@pytest.mark.parametrize("engine", RUNNABLE)
def test_one_hot_reads_no_values(engine):
    """PyTorch would: of classes from outside in a trace, and of those that `grad` wraps, also under `vmap`."""
    classes = torch.tensor([2, 0])

    def step(carry, x):
        slope = torch.func.grad(lambda weight: (weight * F.one_hot(x, 3)).sum())(torch.ones(3))
        return carry + F.one_hot(classes, 4), (F.one_hot(classes[1], 3), slope)

    carry, (of_zero, slopes) = scan(step, torch.zeros(2, 4), torch.tensor([1, 0, 1]), engine=engine)
    assert torch.equal(carry, 3.0 * torch.eye(4)[classes])
    assert torch.equal(of_zero, torch.eye(3).long()[[0, 0, 0]])
    assert torch.equal(slopes, torch.eye(3)[[1, 0, 1]])


@pytest.mark.parametrize("engine", COMPILED)
def test_what_is_changed_in_place_after_being_closed_over(engine):
    """A copy of a constant may be written to inside; a change of the constant itself is seen by the next call."""
    table = torch.zeros(3)

    def step(carry, x):
        own = table.clone()
        own[0] = x
        own += 1
        return carry + own.sum(), ()

    assert scan(step, torch.tensor(0.0), torch.tensor([5.0, 7.0]), engine=engine)[0] == 18
    table[2] = 10
    assert scan(step, torch.tensor(0.0), torch.tensor([5.0, 7.0]), engine=engine)[0] == 38
    assert table.tolist() == [0, 0, 10]


@pytest.mark.parametrize("engine", inductor_slow(COMPILED))
def test_what_is_bound_anew_after_being_closed_over_is_not_seen(engine):
    """As under `jax.jit`; `eager` sees it. A function that is made anew is another step."""
    held = {"tensor": torch.tensor(2.0), "number": 3.0}

    def make():
        return lambda carry, x: (carry + held["tensor"] * held["number"], ())

    step, zero = make(), torch.tensor(0.0)
    assert scan(step, zero, length=1, engine=engine)[0] == 6
    held.update(tensor=torch.tensor(20.0), number=30.0)
    assert scan(step, zero, length=1, engine=engine)[0] == 6
    assert scan(step, zero, length=1, engine="eager")[0] == 600
    assert scan(make(), zero, length=1, engine=engine)[0] == 600


@pytest.mark.parametrize("engine", inductor_slow(COMPILED))
def test_the_default_dtype_and_identity_are_part_of_a_trace(engine):
    def step(carry, x):
        return carry, torch.ones(()) * 3

    start = torch.zeros(2)
    assert scan_lanes(step, start, length=2, engine=engine)[1].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert scan_lanes(step, start, length=2, engine=engine)[1].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)

    @dataclasses.dataclass(frozen=True)
    class Equal:
        factor: float = dataclasses.field(compare=False)

        def __call__(self, carry, x):
            return carry + self.factor, ()

    assert [scan(Equal(f), torch.tensor(0.0), length=1, engine=engine)[0].item() for f in (2.0, 3.0)] == [2, 3]


def test_threads_may_trace_at_once():
    def run(number):
        return scan(lambda c, x: (c + number * torch.tanh(x), c), torch.tensor(0.0), torch.ones(3), engine=RUNNABLE[0])[
            0
        ]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(8)))
    np.testing.assert_allclose(results, [3 * number * np.tanh(1.0) for number in range(8)], rtol=1e-5)


Z = torch.zeros(3)
LEAF = torch.tensor(2.0, requires_grad=True)


def keep(carry, x):
    return carry, ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda e: scan_lanes(lambda c, x: c, Z, Z, engine=e),
            TypeError,
            r"`step` must return \(carry, y\), got a tensor",
        ),
        (
            lambda e: scan_lanes(lambda c, x: ({"a": c}, ()), Z, Z, engine=e),
            TypeError,
            r"carry of the structure it took, PyTreeSpec\(\*\), got PyTreeSpec\(\{'a': \*\}\)",
        ),
        (
            lambda e: scan_lanes(lambda c, x: ({"w": c["w"].double()}, ()), {"w": Z}, Z, engine=e),
            TypeError,
            r"at \('w',\) it took torch.float32 \(\) and returned torch.float64 \(\)",
        ),
        (lambda e: scan_lanes(lambda c, x: (c[None], ()), Z, Z, engine=e), TypeError, r"returned torch.float32 \(1,\)"),
        (
            lambda e: scan_lanes(lambda c, x: (c, 1.0), Z, Z, engine=e),
            TypeError,
            "return tensors, got float at .* of y",
        ),
    ],
)
@pytest.mark.parametrize("engine", RUNNABLE)
def test_errors_of_steps(engine, call, error, message):
    with pytest.raises(error, match=message):
        call(engine)


def branches(carry, x):
    return (carry if x > 0 else -carry), ()


def draws(carry, x):
    return carry + torch.rand(()), ()


def is_narrow(carry, x):
    return carry + x.bfloat16().float(), ()


def looks_up(carry, x):
    return carry + torch.arange(3.0)[x.long() + 5], ()


@pytest.mark.parametrize("caller", [scan, scan_lanes])
@pytest.mark.parametrize(
    ("step", "engine", "error", "message"),
    [
        (lambda c, x: c, "eager", TypeError, "`step` must return"),
        (lambda c, x: c, "native", TypeError, "`step` must return"),
        (lambda c, x: (c, 1.0), "native", TypeError, "`step` must return tensors, got float"),
        (lambda c, x: (c.add_(1), ()), "eager", TypeError, "`step` changes an argument in place: a step must be pure"),
        (lambda c, x: (c.add_(1), ()), "native", TypeError, "`step` changes an argument, or a tensor"),
        (branches, "native", TypeError, "the value of a tensor is read in"),
        (branches, "inductor", TypeError, "the value of a tensor is read in"),
        (draws, "eager", TypeError, "random numbers can't be drawn inside .*popart_func.random"),
        (draws, "native", TypeError, "random numbers can't be drawn inside"),
        (lambda c, x: (c + torch.nonzero(x[None]).sum(), ()), "native", TypeError, "a shape depends on values in"),
        (is_narrow, "native", UnsupportedError, r"native: no dtype torch.bfloat16"),
        (looks_up, "native", IndexError, "native: an index was out of range"),
        (keep, "warp", ValueError, "`engine` must be 'auto' or one of"),
        (lambda c, x: (LEAF * c, ()), "native", UnsupportedError, "native: no gradient .* use the engine 'eager'"),
    ],
)
@pytest.mark.skipif("native" not in RUNNABLE, reason="no C++ compiler")
def test_errors_name_the_function_that_was_called(caller, step, engine, error, message):
    start = torch.tensor(1.0) if caller is scan else Z
    with pytest.raises(error, match=f"^{caller.__name__}: {message}"):
        caller(step, start, torch.ones(4), engine=engine)


@pytest.mark.skipif("native" not in RUNNABLE, reason="no C++ compiler")
def test_a_warm_scan_asks_for_its_graph_once(monkeypatch):
    """Though the cost model and the engine read it."""
    asked = []
    step = lambda c, x: (c * 0.5 + x, ())  # noqa: E731
    scan_lanes(step, Z, torch.ones(2500))
    monkeypatch.setattr(lane_scan, "trace_step", lambda *args, **kwargs: asked.append(1) or trace_step(*args, **kwargs))
    scan_lanes(step, Z, torch.ones(2500))
    assert asked == [1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scan_lanes("step", Z, Z), TypeError, "scan_lanes: `step` must be a function, got str"),
        (lambda: scan(keep, 0.0, Z), TypeError, "scan: every leaf of `carry` must be a tensor, got float"),
        (lambda: scan_lanes(keep, (), Z), ValueError, "`carry` must have at least one tensor"),
        (lambda: scan_lanes(keep, {"a": Z, "b": 1.0}, Z), TypeError, r"every leaf of `carry` .* got float at \('b',\)"),
        (lambda: scan_lanes(keep, Z, [1.0]), TypeError, r"every leaf of `xs` must be a tensor, got float at \(0,\)"),
        (
            lambda: scan_lanes(keep, {"a": Z, "b": torch.zeros(4)}, Z),
            ValueError,
            r"same leading lane axis: got \(3,\) at \('a',\) and \(4,\) at \('b',\)",
        ),
        (lambda: scan_lanes(keep, torch.tensor(1.0), Z), ValueError, r"leading lane axis: got \(\)"),
        (lambda: scan_lanes(keep, Z, (Z, torch.zeros(2))), ValueError, "same leading time axis"),
        (lambda: scan_lanes(keep, Z), ValueError, "`xs` has no tensors, so `length` must say how many"),
        (lambda: scan_lanes(keep, Z, Z, length=5), ValueError, "`length` must be the leading axis of `xs`, 3, got 5"),
        (lambda: scan_lanes(keep, Z, Z[:0]), ValueError, "at least one step and one lane, got 0 steps and 3 lanes"),
        (
            lambda: scan_lanes(keep, Z, Z, hparams=torch.zeros(2)),
            ValueError,
            r"number or have shape \(3,\), got shape \(2,\)",
        ),
        (lambda: scan_lanes(keep, Z, Z, hparams=2**63), ValueError, "must fit into 64 bits, got 9223372036854775808"),
        (lambda: scan_lanes(keep, Z, Z, hparams="a"), ValueError, r"number or have shape \(3,\), got str"),
        (
            lambda: scan_lanes(keep, Z, torch.zeros(2, 4), shared=False),
            ValueError,
            r"not shared must have shape \[time, lanes = 3, ...\], got \(2, 4\)",
        ),
        (
            lambda: scan_lanes(keep, Z, Z.to("meta")),
            ValueError,
            r"all tensors must lie on one device, got \['cpu', 'meta'\]",
        ),
        (
            lambda: scan_lanes(keep, Z, Z, engine="warp"),
            ValueError,
            r"`engine` must be 'auto' or one of \[.*\], got 'warp'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
