"""Algorithms 1 and 2, by hand, against each other, and in lanes."""

from __future__ import annotations

import optree
import pytest
import torch
from every_learner import APPLY, F64, NAMES, make, make_learner, params_of
from torch.func import vmap

import popart_func as pf
from popart_func import optim


def layers(params):
    return [
        (params[f"{name}.weight"], params[f"{name}.bias"]) for name in ("input_linear", "hidden1", "hidden2", "hidden3")
    ]


def hidden_of(params, x):
    for weight, bias in layers(params):
        x = torch.tanh(weight @ x + bias)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_step_by_hand(name, outputs):
    """Order and formulas of Algorithms 1 and 2, written out with autograd for the lower layers alone."""
    alpha, beta = 0.05, 0.2
    learner, params = make_learner(name, outputs), params_of(outputs)
    state = learner.init(params)
    x, y = (
        torch.randn(6, dtype=F64),
        torch.randn(outputs, dtype=F64) * 50 + torch.arange(1.0, outputs + 1, dtype=F64) * 90,
    )
    state, info = learner.update(state, (x, y))

    lower = {name: value.clone().requires_grad_() for name, value in pf.split(params).lower.items()}
    weight, bias = params["output_linear.weight"], params["output_linear.bias"]
    shift, scale = torch.zeros(outputs, dtype=F64), torch.ones(outputs, dtype=F64)
    if name != "sgd":
        shift, second = beta * y, (1 - beta) + beta * y**2
        scale = (second - shift**2).sqrt()
    if name == "popart":
        weight, bias = weight / scale[:, None], (bias - shift) / scale
    hidden = hidden_of(lower, x)
    normalized = weight @ hidden + bias
    if name == "normalized_sgd":
        delta = normalized - y
        hidden.backward((weight / scale[:, None]).T @ (delta / scale).detach())
        prediction = normalized
    else:
        delta = normalized - (y - shift) / scale
        hidden.backward(weight.T @ delta.detach())
        prediction = scale * normalized + shift
    delta = delta.detach()
    expected = {name: (value - alpha * value.grad).detach() for name, value in lower.items()}
    expected["output_linear.weight"] = weight - alpha * torch.outer(delta, hidden.detach())
    expected["output_linear.bias"] = bias - alpha * delta
    assert pf.tree.max_difference(state.params, expected) < 1e-12
    torch.testing.assert_close(info.prediction, prediction.detach(), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(info.error, (prediction - y).abs().detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(info.normalized_target, (y - shift) / scale, rtol=1e-12, atol=1e-12)
    half = 0.5 * ((prediction.detach() - y) / scale).square().sum()
    torch.testing.assert_close(info.loss, half, rtol=1e-10, atol=1e-12)
    assert torch.equal(info.target, y)


def test_algorithms_1_and_2_agree():
    """Proposition 3: the same lower layers and predictions, for scales that jump over eight orders of magnitude.

    Batches with and without indices take turns. `test_claims` has one output, and `verify` both over random networks.
    """
    outputs = 3
    learners = {name: make_learner(name, outputs) for name in ("popart", "normalized_sgd")}
    states = {name: learner.init(params_of(outputs)) for name, learner in learners.items()}
    for step in range(300):
        x = torch.randn(4, 6, dtype=F64)
        magnitude = 10.0 ** torch.randint(-2, 6, (), dtype=F64)
        if step % 2:
            batch = (x, torch.randn(4, dtype=F64) * magnitude + step, torch.randint(0, outputs, (4,)))
        else:
            batch = (x, torch.randn(4, outputs, dtype=F64) * magnitude - step)
        infos = {}
        for name, learner in learners.items():
            states[name], infos[name] = learner.update(states[name], batch)
        first, second = states["popart"], states["normalized_sgd"]
        assert pf.tree.max_difference(pf.split(first.params).lower, pf.split(second.params).lower) < 1e-9
        torch.testing.assert_close(infos["popart"].prediction, infos["normalized_sgd"].prediction, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(infos["popart"].loss, infos["normalized_sgd"].loss, rtol=1e-7, atol=1e-9)
    folded = pf.fold(pf.split(first.params).upper, first.statistics)
    assert pf.tree.max_difference(folded, pf.split(second.params).upper) < 1e-4 * float(first.statistics.scale.max())
    assert pf.tree.max_difference(first.statistics, second.statistics) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["plain", "indices", "shared", "shared_indices"])
def test_a_batch_is_the_average_of_its_examples(name, case):
    """With the statistics held still, the gradient step on a batch is the mean of the steps on its examples."""
    outputs, tasks = 3, 1 if case.startswith("shared") else 3
    tiny = pf.popart(tasks, 1e-12)
    learner = make_learner(name, outputs, popart=tiny)
    state = learner.init(params_of(outputs))
    x = torch.randn(5, 6, dtype=F64)
    if case.endswith("indices"):
        batch = (x, torch.randn(5, dtype=F64), torch.tensor([0, 2, 2, 1, 0]))
    else:
        batch = (x, torch.randn(5, outputs, dtype=F64))
    together, info = learner.update(state, batch)
    single = [learner.update(state, tuple(part[row] for part in batch)) for row in range(5)]
    for key, value in together.params.items():
        mean = torch.stack([one.params[key] for one, _ in single]).mean(0)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(info.loss, torch.stack([one.loss for _, one in single]).mean(), rtol=1e-10, atol=0)
    assert info.prediction.shape == batch[1].shape


@pytest.mark.parametrize("name", NAMES)
def test_a_single_output_needs_no_axis(name):
    learner = make_learner(name, 1)
    state = learner.init(params_of(1))
    x = torch.randn(4, 6, dtype=F64)
    for with_axis, without in (((x[0], torch.tensor([3.0])), (x[0], torch.tensor(3.0))), ((x, x[:, :1]), (x, x[:, 0]))):
        one, first = learner.update(state, with_axis)
        two, second = learner.update(state, without)
        assert pf.tree.max_difference(one, two) == 0
        assert first.error.shape == with_axis[1].shape
        assert second.error.shape == without[1].shape


def test_all_learners_have_one_state_and_one_info():
    structures = set()
    for name in NAMES:
        learner = make_learner(name, 1)
        state, info = learner.update(learner.init(params_of(1)), (torch.ones(6, dtype=F64), torch.tensor([2.0])))
        structures.add(str(optree.tree_structure((state, info))))
        shapes = [tuple(leaf.shape) for leaf in optree.tree_leaves((state, info))]
        structures.add(str(shapes))
    assert len(structures) == 2


@pytest.mark.parametrize("name", ["sgd", "art", "popart"])
def test_gradient_is_that_of_the_loss_by_finite_differences(name):
    """The change of each parameter is −α times a central difference of the loss, the statistics being the new ones.

    (Algorithm 2's direction is not the gradient of one loss.)
    """
    learner, params = make_learner(name, 2), params_of(2)
    state = learner.init(params)
    batch = (torch.randn(3, 6, dtype=F64), torch.randn(3, 2, dtype=F64) * 4 + 3)
    after, _ = learner.update(state, batch)
    still, _ = make_learner(name, 2, optimizer=pf.sgd(0.0)).update(state, batch)

    def loss(params):
        outputs = APPLY[2](params, batch[0])
        return 0.5 * (outputs - pf.normalize(still.statistics, batch[1])).square().sum() / 3

    def loss_of_sgd(params):
        return 0.5 * (APPLY[2](params, batch[0]) - batch[1]).square().sum() / 3

    function, step = loss_of_sgd if name == "sgd" else loss, 1e-5
    for key, value in still.params.items():
        place = (0,) * value.ndim
        up, down = value.clone(), value.clone()
        up[place] += step
        down[place] -= step
        slope = (function({**still.params, key: up}) - function({**still.params, key: down})) / (2 * step)
        change = (after.params[key] - value)[place]
        # Central differences err by step² of the third derivative, and by 2⁻⁵³ · loss / step.
        torch.testing.assert_close(change, -0.05 * slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_hyper_parameter_is_a_lane(name):
    lanes = 4
    rates = {
        "learning_rate": torch.linspace(0.01, 0.1, lanes, dtype=F64),
        "momentum": torch.linspace(0.0, 0.9, lanes, dtype=F64),
        "step_size": torch.linspace(0.01, 0.5, lanes, dtype=F64),
        "scale_lb": torch.linspace(1e-3, 2.0, lanes, dtype=F64),
        "scale_ub": torch.linspace(3.0, 40.0, lanes, dtype=F64),
    }
    params = pf.tree.stack([params_of(2, seed) for seed in range(lanes)])
    batches = [(torch.randn(lanes, 3, 6, dtype=F64), torch.randn(lanes, 3, 2, dtype=F64) * 30 + 7) for _ in range(3)]

    def run(params, rates, *batches):
        optimizer = pf.sgd(rates["learning_rate"], momentum=rates["momentum"])
        popart = pf.popart(2, rates["step_size"], rates["scale_lb"], rates["scale_ub"])
        learner = make_learner(name, 2, optimizer, popart)
        state = learner.init(params)
        for batch in batches:
            state, info = learner.update(state, batch)
        return state, info

    together = pf.tree.unstack(vmap(run)(params, rates, *batches))
    for lane in range(lanes):
        one, numbers, *data = optree.tree_map(lambda leaf: leaf[lane], (params, rates, *batches))  # noqa: B023
        alone = run(one, {key: float(value) for key, value in numbers.items()}, *data)
        assert pf.tree.max_difference(together[lane], alone) < 1e-10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unchecked")
def test_parameters_keep_their_order_and_must_be_a_flat_mapping(name):
    learner, params = make_learner(name, 2), params_of(2)
    backwards = dict(reversed(params.items()))
    state, _ = learner.update(learner.init(backwards), (torch.zeros(3, 6, dtype=F64), torch.zeros(3, 2, dtype=F64)))
    assert list(state.params) == list(backwards)
    for wrong, got in ((pf.split(params), "SplitParams"), ({}, "an empty one"), ({"w": 1.0}, "one that holds float")):
        with pytest.raises(
            TypeError, match=f"{name}_learner: `params` must be a mapping from name to tensor.*got {got}"
        ):
            learner.init(wrong)


def test_adam_with_popart_rescales_its_moments():
    """A jump of the scale in mid-run: with rescaling the head's moments are measured in the new units."""
    learner = make_learner("popart", 2, optimizer=pf.adam(0.01))
    plain = make_learner("popart", 2, optimizer=pf.adam(0.01), rescale_moments=False)
    state = learner.init(params_of(2))
    x = torch.randn(6, dtype=F64)
    for _ in range(5):
        state, _ = learner.update(state, (x, torch.tensor([1.0, -2.0], dtype=F64)))
    jump = (x, torch.tensor([1e5, -2.0], dtype=F64))
    (scaled, _), (unscaled, _) = learner.update(state, jump), plain.update(state, jump)
    ratio = (state.statistics.scale / scaled.statistics.scale)[0]
    before = state.opt_state[0]
    grad = (unscaled.opt_state[0].mu["output_linear.bias"] - 0.9 * before.mu["output_linear.bias"])[0] / 0.1
    expected_mu = 0.9 * ratio * before.mu["output_linear.bias"][0] + 0.1 * grad
    expected_nu = 0.999 * ratio**2 * before.nu["output_linear.bias"][0] + 0.001 * grad**2
    torch.testing.assert_close(scaled.opt_state[0].mu["output_linear.bias"][0], expected_mu, rtol=1e-10, atol=0)
    torch.testing.assert_close(scaled.opt_state[0].nu["output_linear.bias"][0], expected_nu, rtol=1e-10, atol=0)
    lower = "hidden1.weight"
    assert torch.equal(scaled.opt_state[0].mu[lower], unscaled.opt_state[0].mu[lower])


def test_all_moments_follow_one_statistic():
    """At learning rate 0 only the units of the gradients change: the last ones hold for the whole history."""
    decay, x = 0.8, torch.randn(6, dtype=F64)
    learner = make_learner("popart", 1, pf.sgd(0.0, momentum=decay), rescale_moments="all")
    state, head_only = learner.init(params_of(1)), make_learner("popart", 1, pf.sgd(0.0, momentum=decay))
    plain, expected, targets = state, 0, torch.tensor([[3.0], [500.0], [-20.0]], dtype=F64)
    for target in targets:
        state, plain = learner.update(state, (x, target))[0], head_only.update(plain, (x, target))[0]
    for age, target in enumerate(targets.flip(0)):
        normalized = pf.normalize(state.statistics, target)
        loss = lambda params, normalized=normalized: 0.5 * (APPLY[1](params, x) - normalized).square().sum()  # noqa: E731
        expected = expected + decay**age * torch.func.grad(loss)(state.params)["hidden1.weight"]
    torch.testing.assert_close(state.opt_state[0].trace["hidden1.weight"], expected)
    assert not torch.allclose(plain.opt_state[0].trace["hidden1.weight"], expected, rtol=0.1)


def test_the_moments_of_the_head_follow_by_default():
    moved = []
    for options in ({}, {"rescale_moments": True}, {"rescale_moments": "head"}):
        learner, state = make_learner("popart", 1, pf.adam(0.1), **options), None
        state = learner.init(params_of(1))
        for y in (1.0, 50.0):
            state, _ = learner.update(state, (torch.ones(6, dtype=F64), torch.tensor([y], dtype=F64)))
        moved.append(state)
    assert pf.tree.max_difference(moved[0], moved[1]) == pf.tree.max_difference(moved[0], moved[2]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_rounding_of_a_large_shift_is_not_in_an_error(name):
    learner = make_learner(name, 1, pf.sgd(0.0))
    state = learner.init({key: leaf.float() for key, leaf in params_of(1).items()})
    batch = torch.ones(4, 6), torch.tensor([[10000001.0], [10000002.0], [10000003.0], [10000007.0]])
    state, info = learner.update(state, batch)
    assert name == "sgd" or state.statistics.residue != 0
    error = (info.normalized_prediction - info.normalized_target).abs() * state.statistics.scale
    torch.testing.assert_close(info.error, error, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("unchecked")
def test_which_moments_can_follow():
    with pytest.raises(
        ValueError, match="popart_learner: `rescale_moments` must be a bool, 'head' or 'all', got 'some'"
    ):
        make_learner("popart", 1, rescale_moments="some")
    learner = make_learner("popart", 2, pf.adam(0.1), rescale_moments="all")
    with pytest.raises(ValueError, match="`lower` can be rescaled with one statistic only, got 2"):
        learner.update(learner.init(params_of(2)), (torch.ones(6, dtype=F64), torch.ones(2, dtype=F64)))


@pytest.mark.parametrize("name", NAMES)
def test_infos_have_the_shape_of_the_targets(name):
    learner = make_learner(name, 1)
    state = learner.init(params_of(1))
    for shape in ((), (1,), (3,), (3, 1)):
        x, y = torch.ones(*(shape if shape in ((3,),) else shape[:-1]), 6, dtype=F64), torch.ones(shape, dtype=F64)
        for batch in ({"x": x, "y": y}, (x, y, None, torch.ones(shape, dtype=F64))):
            _, info = learner.update(state, batch)
            assert {value.shape for value in info[1:6]} == {info.bound_use.shape} == {y.shape}


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_gets_the_parameters(name):
    """AdamW refuses to do without; at the rate 1 with a decay of 1 and no error, nothing of them is left."""
    learner = make_learner(name, 1, pf.chain(optim.add_decayed_weights(1.0), optim.scale_by_learning_rate(1.0)))
    state = learner.init(params_of(1))
    weights = torch.zeros(1, dtype=F64)
    batch = torch.ones(3, 6, dtype=F64), torch.full((3, 1), torch.nan, dtype=F64), None, weights
    state, info = learner.update(state, batch)
    assert not any(leaf.any() for leaf in state.params.values())
    assert info.loss == 0
    assert not info.bound_use.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_algorithm_2_are_in_the_network_s_dtype(dtype):
    learner = make_learner("normalized_sgd", 2)
    state = learner.init({name: leaf.to(dtype) for name, leaf in pf.init_params(make(2), 0).items()})
    for indices in (None, torch.tensor([1, 0])):
        y = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
        batch = (
            (torch.ones(2, 6, dtype=dtype), y) if indices is None else (torch.ones(2, 6, dtype=dtype), y[0], indices)
        )
        state, _ = learner.update(state, batch)
        assert {leaf.dtype for leaf in state.params.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_keep_float32_statistics(dtype):
    learner = make_learner("popart", 1, popart=pf.popart(1, 0.1))
    params = {name: value.to(dtype) for name, value in pf.init_params(make(1), 0).items()}
    state = learner.init(params)
    for _ in range(5):
        state, info = learner.update(state, (torch.ones(6, dtype=dtype), torch.tensor([3000.0])))
    assert {value.dtype for value in state.params.values()} == {dtype}
    assert state.statistics.shift.dtype == torch.float32
    assert float(state.statistics.shift) == pytest.approx(3000 * (1 - 0.9**5), rel=1e-5)
    assert torch.isfinite(info.error).all()


def test_a_module_s_own_parameters_leave_no_graph_behind():
    module = pf.UnifiedModel(6, 5, 2).double()
    for name in NAMES:
        state = make_learner(name, 2).init(dict(module.named_parameters()))
        assert not any(leaf.requires_grad for leaf in state.params.values())


def test_gradients_flow_through_init():
    learner = pf.sgd_learner(lambda params, x: x @ params["w"], pf.sgd(0.1))
    batch = torch.ones(2, 3), torch.ones(2, 1)

    def after(w):
        return learner.update(learner.init({"w": w}), batch)[0].params["w"].sum()

    assert (torch.func.grad(after)(torch.zeros(3, 1)) == 0.7).all()
    w = torch.zeros(3, 1, requires_grad=True)
    assert (torch.autograd.grad(after(w), w)[0] == 0.7).all()


def make_partly_frozen():
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    )
    module[2].requires_grad_(False)
    return module.double()


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_stay_and_buffers_move(name):
    """As with torch.optim on the module's parameters, and with the module's own running statistics."""
    module, apply = make_partly_frozen(), pf.stateless(make_partly_frozen())
    popart = pf.popart(2, 0.1)
    learner = {
        "sgd": lambda: pf.sgd_learner(apply, pf.adam(0.1)),
        "art": lambda: pf.art_learner(apply, pf.adam(0.1), popart),
        "popart": lambda: pf.popart_learner(apply, pf.adam(0.1), popart, head="4"),
        "normalized_sgd": lambda: pf.normalized_sgd_learner(apply, pf.sgd(0.1), popart, head="4"),
    }[name]()
    params = pf.init_params(make_partly_frozen, 0)
    module.load_state_dict(params)
    first = state = learner.init(params)
    assert not any(name.startswith("2.") or "running" in name for name in getattr(state.opt_state[0], "mu", ()))
    batches = [(torch.randn(8, 6, dtype=F64) + 3, torch.randn(8, 2, dtype=F64)) for _ in range(5)]
    for x, y in batches:
        state, _ = learner.update(state, (x, y))
    assert torch.equal(state.params["2.weight"], first.params["2.weight"])
    assert not torch.equal(state.params["0.weight"], first.params["0.weight"])
    assert state.params["1.num_batches_tracked"] == 5
    assert list(state.params) == list(first.params)
    module(batches[0][0])
    once, _ = learner.update(first, batches[0])
    torch.testing.assert_close(once.params["1.running_var"], module[1].running_var)


def test_a_frozen_head_is_refused():
    module = pf.UnifiedModel(6, 5, 2)
    module.output_linear.requires_grad_(False)
    learner = pf.popart_learner(pf.stateless(module), pf.sgd(0.1), pf.popart(2, 0.1))
    with pytest.raises(ValueError, match=r"^popart_learner: `head` must be trained, .* got \['output_"):
        learner.init(pf.init_params(lambda: pf.UnifiedModel(6, 5, 2), 0))


def test_purity():
    for name in NAMES:
        learner = make_learner(name, 2, optimizer=pf.adam(0.1) if name != "normalized_sgd" else pf.sgd(0.1))
        state = learner.init(params_of(2))
        batch = (torch.randn(3, 6, dtype=F64), torch.randn(3, 2, dtype=F64))
        before = optree.tree_map(torch.clone, (state, batch))
        learner.update(state, batch)
        assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves((state, batch))))
