"""Which engine ``auto`` takes, by what a step should cost, and where it goes on."""

from __future__ import annotations

import warnings

import optree
import pytest
import torch
import torch._dynamo
from runnable import COMPILED, RUNNABLE

import popart_func as pf
from popart_func import engines
from popart_func.engines import (
    EngineUnavailableError,
    UnsupportedError,
    cost_model,
    resolve_engine,
    scan,
    scan_lanes,
)
from popart_func.engines.lane_scan import make_lane_scan


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
    assert "test_engine_choice.py" in messages[0]
    assert recwarn[0].filename == __file__
    assert messages[0].endswith("Going on with eager.")
    with pytest.raises(UnsupportedError, match=r"no dtype torch.bfloat16"):
        scan_lanes(step, torch.zeros(2), torch.ones(600), engine="native")
