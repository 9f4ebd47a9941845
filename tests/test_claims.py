"""What the paper and the split network claim, on their own networks and their own numbers."""

from __future__ import annotations

import optree
import pytest
import torch
from torch.func import vjp, vmap

import popart_func as pf
from popart_func.engines import ENGINES, available_engines, scan_lanes
from popart_func.experiments.regression import STEPS, bits, streams

RUNNABLE = [name for name in ENGINES if available_engines()[name] is None]
FASTEST = RUNNABLE[0]
NETWORK = pf.stateless(pf.UnifiedModel(16, 10, 1))

PRINTED_WEIGHT = [-6.5463, 14.0888, 14.7738, -21.8954, 11.8038, -9.8505, -1.7764, -27.6084, 26.4289, 22.8444]
PRINTED_BIAS = 85.1712


def make_unified():
    return pf.UnifiedModel(16, 10, 1)


def split_and_unified_after(optimizer, steps):
    """One network as two halves with an optimizer each, and as one with one optimizer, from the same start."""
    lower_apply, upper_apply = pf.stateless(pf.LowerLayers(16, 10)), pf.stateless(pf.UpperLayer(10, 1))
    unified = pf.init_params(make_unified, seed=0)
    lower, upper = pf.split(pf.init_params(make_unified, seed=0))
    state, lower_state, upper_state = (optimizer.init(params) for params in (unified, lower, upper))
    x, y = bits(torch.tensor(426)).float(), torch.tensor([426.0])
    for _ in range(steps):

        def mean_square(lower, upper):
            return (upper_apply(upper, lower_apply(lower, x)) - y).square().mean()

        lower_grads, upper_grads = torch.func.grad(mean_square, argnums=(0, 1))(lower, upper)
        updates, lower_state = optimizer.update(lower_grads, lower_state, lower)
        lower = pf.apply_updates(lower, updates)
        updates, upper_state = optimizer.update(upper_grads, upper_state, upper)
        upper = pf.apply_updates(upper, updates)

        grads = torch.func.grad(lambda params: (NETWORK(params, x) - y).square().mean())(unified)
        updates, state = optimizer.update(grads, state, unified)
        unified = pf.apply_updates(unified, updates)
    return pf.SplitParams(lower, upper), unified


def test_the_seeds_printed_numbers():
    _, unified = split_and_unified_after(pf.sgd(0.1), steps=1)
    weight, bias = unified["output_linear.weight"], unified["output_linear.bias"]
    torch.testing.assert_close(weight, torch.tensor([PRINTED_WEIGHT]), rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.tensor([PRINTED_BIAS]), rtol=0, atol=1e-4)


def test_a_learner_makes_the_seeds_step_too():
    """½ (·)² at twice the learning rate is the mean square of one output."""
    learner = pf.sgd_learner(NETWORK, pf.sgd(0.2))
    state = learner.init(pf.init_params(make_unified, seed=0))
    state, _ = learner.update(state, (bits(torch.tensor(426)).float(), torch.tensor([426.0])))
    torch.testing.assert_close(state.params["output_linear.weight"], torch.tensor([PRINTED_WEIGHT]), rtol=0, atol=1e-4)
    torch.testing.assert_close(state.params["output_linear.bias"], torch.tensor([PRINTED_BIAS]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", [pf.sgd(1e-3), pf.sgd(1e-4, momentum=0.9), pf.adam(1e-2)])
@pytest.mark.parametrize("steps", [1, 20])
def test_split_equals_unified_on_every_parameter(optimizer, steps):
    """The same operations on the same numbers: to the bit."""
    split_params, unified = split_and_unified_after(optimizer, steps)
    together = pf.unify(split_params)
    assert together.keys() == unified.keys()
    assert all(torch.equal(together[name], unified[name]) for name in unified)
    start = pf.init_params(make_unified, seed=0)
    assert all(not torch.equal(start[name], unified[name]) for name in unified)


def test_grad_tensors_is_a_vector_jacobian_product():
    weight = torch.randn(3, 2)
    x, cotangent = torch.randn(2, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    torch.tanh(weight @ x).backward(cotangent)
    _, pull_back = vjp(lambda x: torch.tanh(weight @ x), x.detach())
    torch.testing.assert_close(pull_back(cotangent)[0], x.grad)


def network_outputs(outputs):
    return lambda: pf.UnifiedModel(16, 10, outputs)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.usefixtures("unchecked")
def test_algorithms_1_and_2_agree_over_a_whole_stream(outputs):
    """Proposition 3, over all 5004 samples, in float64.

    The targets go up to 65535, and rounding grows over 5004 steps of a nonlinear recursion: predictions are compared
    relative to that scale, parameters (of order 1) absolutely.
    """
    seeds = range(4)
    apply = pf.stateless(network_outputs(outputs)())
    params = optree.tree_map(torch.Tensor.double, pf.init_lanes(network_outputs(outputs), seeds))
    statistics = pf.popart(outputs, 10**-0.5)
    results = {}
    for make in (pf.popart_learner, pf.normalized_sgd_learner):
        learner = make(apply, pf.sgd(10**-2.5), statistics)

        def step(state, number, learner=learner):
            # Several outputs learn the number at several magnitudes and offsets, the last with the sign turned.
            factors = torch.tensor([1.0, 1e-3, -50.0], dtype=torch.float64)[:outputs]
            y = number.double() * factors + torch.tensor([0.0, 5.0, 1e4], dtype=torch.float64)[:outputs]
            state, info = learner.update(state, (bits(number).double(), y))
            return state, (info.prediction, info.error)

        results[make] = scan_lanes(step, vmap(learner.init)(params), streams(seeds), shared=False, engine=FASTEST)
    (one, (first, errors)), (two, (second, _)) = results.values()
    lower, expected = pf.split(one.params).lower, pf.split(two.params).lower
    assert pf.tree.max_difference(lower, expected) < 1e-9
    magnitude = torch.tensor([65535.0, 65.5, 50 * 65535.0], dtype=torch.float64)[:outputs]
    assert ((first - second).abs() / magnitude).max() < 1e-9
    assert errors[-500:].median() < errors[:500].median(), "and it has learned something"


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.slow) if name == "inductor" else name for name in RUNNABLE]
)
@pytest.mark.usefixtures("unchecked")
def test_50_lanes_at_once_are_50_single_lanes(engine):
    """Before the first spike the runs are not chaotic: rounding of errors up to 1023 grows by a small factor only."""
    steps = 50 if engine == "eager" else 900
    learner = pf.popart_learner(NETWORK, pf.sgd(10**-2.5), pf.popart(1, 10**-0.5))

    def step(state, number):
        state, info = learner.update(state, (bits(number).float(), number.float()))
        return state, info.error

    def run(seeds):
        start = vmap(learner.init)(pf.init_lanes(make_unified, seeds))
        return scan_lanes(step, start, streams(seeds)[:steps], shared=False, engine=engine)[1]

    together = run(range(50))
    again = run([*range(25), *range(100, 125)])
    assert torch.equal(together[:, :25], again[:, :25]), "the same number of lanes, other neighbours: to the bit"
    assert not torch.equal(together[:, 25:], again[:, 25:])
    for lane in (0, 31, 49):
        alone = run([lane])[:, 0]
        # Each step rounds at 2⁻²⁴ of 1023 in a few places; nothing amplifies it more than linearly in the steps here.
        torch.testing.assert_close(together[:, lane], alone, rtol=0, atol=steps * 1023 * 2**-24)


def test_streams_are_as_long_as_the_paper_says():
    assert streams([0]).shape == (STEPS, 1)
