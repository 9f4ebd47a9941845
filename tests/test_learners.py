"""Algorithms 1 and 2, by hand, against each other, and in lanes."""

from __future__ import annotations

import optax
import optree
import pytest
import torch
from torch.func import vmap
from torch.nn.functional import huber_loss

import popart_func as pf
from popart_func import optim

F64 = torch.float64


def make(outputs):
    return lambda: pf.UnifiedModel(6, 5, outputs)


def params_of(outputs, seed=0):
    return {name: value.double() for name, value in pf.init_params(make(outputs), seed).items()}


APPLY = {outputs: pf.stateless(make(outputs)()) for outputs in (1, 2, 3)}


def make_learner(name, outputs, optimizer=None, popart=None, **options):
    apply = APPLY[outputs]
    optimizer = optimizer or pf.sgd(0.05)
    popart = popart or pf.popart(outputs, 0.2)
    if name == "sgd":
        return pf.sgd_learner(apply, optimizer)
    build = {"art": pf.art_learner, "popart": pf.popart_learner, "normalized_sgd": pf.normalized_sgd_learner}[name]
    return build(apply, optimizer, popart, **options)


NAMES = ["sgd", "art", "popart", "normalized_sgd"]


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
    state, _ = learner.update(learner.init(backwards), (X, torch.zeros(3, 2, dtype=F64)))
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


@pytest.mark.parametrize("name", ["sgd", "art", "popart"])
def test_every_learner_takes_a_loss(name):
    options = {"loss": pf.losses.huber(0.3)}
    learner = pf.sgd_learner(APPLY[2], pf.sgd(0.1), **options) if name == "sgd" else make_learner(name, 2, **options)
    _, info = learner.update(learner.init(params_of(2)), (torch.ones(6, dtype=F64), torch.tensor([9.0, -9], dtype=F64)))
    expected = torch.nn.functional.huber_loss(
        info.normalized_prediction, info.normalized_target, reduction="sum", delta=0.3
    )
    torch.testing.assert_close(info.loss, expected)


def test_losses_value_by_value():
    prediction, target = torch.randn(5, 2), torch.randn(5, 2)
    error, share = target - prediction, torch.tensor([0.2, 0.7], dtype=F64)
    below = torch.maximum(share * error, (share - 1) * error).float()
    losses = pf.losses
    torch.testing.assert_close(losses.quantile(share)(prediction, target, None, None), below)
    huber = torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.5)
    torch.testing.assert_close(losses.huber(0.5)(prediction, target, None, None), huber)
    expected = (torch.where(error < 0, 1 - share, share) * huber).float()
    torch.testing.assert_close(losses.quantile(share, 0.5)(prediction, target, None, None), expected)
    torch.testing.assert_close(
        losses.huber()(prediction, target), torch.nn.functional.smooth_l1_loss(prediction, target, reduction="none")
    )
    old = torch.zeros(5, 2)
    clipped = losses.clipped_value(0.25)(prediction, target, pf.init_state(2), None, old_value=old)
    expected = 0.5 * torch.maximum((prediction - target) ** 2, (prediction.clamp(-0.25, 0.25) - target) ** 2)
    torch.testing.assert_close(clipped, expected)
    with pytest.raises(ValueError, match=r"^huber: `delta` must be > 0, got 0"):
        losses.huber(0)
    with pytest.raises(ValueError, match=r"^clipped_value: `epsilon` must be > 0, got 0"):
        losses.clipped_value(0)


@pytest.mark.parametrize("batch", [(), (3,)])  # as many examples as outputs: a wrong axis would fit, too
def test_a_loss_by_output_takes_the_parameter_of_each_target(batch):
    share = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    indices, y = torch.tensor([2, 0, 0]), torch.tensor([5.0, -7.0, 3.0], dtype=F64)
    if not batch:
        indices, y = indices[0], y[0]
    tasks, groups = pf.popart(3, 0.3), pf.popart(2, 0.3, groups=torch.tensor([0, 0, 1]))
    for popart in (tasks, groups, None):
        loss = pf.losses.quantile(share)
        learner = pf.sgd_learner if popart is None else pf.popart_learner
        rest = {"loss": loss} if popart is None else {"loss": loss, "popart": popart}
        learner = learner(APPLY[3], pf.sgd(0.0), **rest)
        _, info = learner.update(learner.init(params_of(3)), (torch.randn(*batch, 6, dtype=F64), y, indices))
        error = info.normalized_target - info.normalized_prediction
        own = share[indices]
        torch.testing.assert_close(info.loss, torch.maximum(own * error, (own - 1) * error).mean())


def test_losses_refuse_shapes_that_only_broadcast():
    loss, three = pf.losses.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^quantile: the last axis of `prediction` must be the 3 outputs, got shape "
                       r"\(3,\) and as many indices\. Write `loss\.at\(outputs, indices\)`"):  # fmt: skip
        loss(three, three, None, torch.tensor([2, 0, 0]))
    for shape in ((4,), (3, 1), ()):
        with pytest.raises(ValueError, match="last axis of `prediction` must be the 3 outputs"):
            loss(torch.zeros(shape), torch.zeros(shape))
    single = pf.sgd_learner(APPLY[1], pf.sgd(0.1), loss=loss)
    with pytest.raises(ValueError, match=r"a parameter for each of the 1 outputs of the network, got \(3,\)"):
        single.update(single.init(params_of(1)), (torch.ones(3, 6, dtype=F64), three.double()))
    for wrong in (torch.tensor(0.5), torch.tensor([0.5, 1.0]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match=r"^quantile: `quantiles` must"):
            pf.losses.quantile(wrong)
    with pytest.raises(
        ValueError, match=r"^clipped_value: 'old_value' of the batch must have the shape of the targets"
    ):
        pf.losses.clipped_value(0.1)(torch.zeros(3, 3), torch.zeros(3, 3), pf.init_state(1), None, old_value=three)
    with pytest.raises(ValueError, match=r"^clipped_value: 'old_value' of the batch must .*, got None"):
        pf.losses.clipped_value(0.1)(three, three, pf.init_state(1))


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


def update(name, batch, outputs=2):
    learner = make_learner(name, outputs)
    return learner.update(learner.init(params_of(outputs)), batch)


X = torch.zeros(3, 6, dtype=F64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (X, ValueError, r"`batch` must be \(x, y\), .* or a dict of them, got Tensor"),
        ((X,), ValueError, "got 1 parts"),
        ((X, 3.0), TypeError, "the targets y of `batch` must be a tensor, got float"),
        ((X, torch.zeros(3), 1), TypeError, "the indices of `batch` must be a tensor, got int"),
        ((X, torch.zeros(2, 2)), ValueError, r"targets must have the shape of the outputs, \(3, 2\), got \(2, 2\)"),
        ((X, torch.zeros(2)), ValueError, r"targets must have the shape of the outputs, \(3, 2\), got \(2,\)"),
        (
            (X, torch.zeros(2), torch.tensor([0, 1])),
            ValueError,
            r"with indices, .* the shape of the outputs without their last axis, \(3,\), got \(2,\) and \(2,\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(name, batch, error, message):
    with pytest.raises(error, match=f"^{name}_learner: .*{message}"):
        update(name, batch)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_what_a_learner_is_made_of():
    linear, apply, statistics = torch.nn.Linear(2, 1), pf.stateless(torch.nn.Linear(2, 1)), pf.popart(1, 0.1)
    makers = {
        "sgd_learner": lambda apply, optimizer: pf.sgd_learner(apply, optimizer),
        "art_learner": lambda apply, optimizer: pf.art_learner(apply, optimizer, statistics),
        "popart_learner": lambda apply, optimizer: pf.popart_learner(apply, optimizer, statistics),
        "normalized_sgd_learner": lambda apply, optimizer: pf.normalized_sgd_learner(apply, optimizer, statistics),
    }
    for name, make in makers.items():
        with pytest.raises(TypeError, match=rf"^{name}: `apply` must be .* got Linear: .*stateless\(module\)"):
            make(linear, pf.sgd(0.1))
        for optimizer, got in (
            (torch.optim.Adam, "torch.optim.adam.Adam"),
            (torch.optim.SGD(linear.parameters(), 0.1), "torch.optim.sgd.SGD"),
            (optax.sgd(0.1), "optax"),
            (0.1, "builtins.float"),
        ):
            with pytest.raises(TypeError, match=f"^{name}: `optimizer` must be .* got {got}"):
                make(apply, optimizer)
        for outputs, got in ((lambda p, x: (x, x), "tuple"), (lambda p, x: x.to(torch.complex64), "torch.complex64")):
            learner = make(outputs, pf.sgd(0.1))
            params = {"output_linear.weight": torch.ones(1, 1), "output_linear.bias": torch.zeros(1)}
            with pytest.raises(TypeError, match=f"^{name}: `apply` must return one tensor .* got .*{got}"):
                learner.update(learner.init(params), (torch.ones(1), torch.ones(1)))
    for make in (pf.art_learner, pf.popart_learner, pf.normalized_sgd_learner):
        with pytest.raises(TypeError, match=rf"^{make.__name__}: `popart` must be the statistics, .* got float"):
            make(apply, pf.sgd(0.1), 0.1)
    for make in (pf.art_learner, pf.popart_learner):
        with pytest.raises(TypeError, match=rf"^{make.__name__}: `loss` must be a function, .* got float"):
            make(apply, pf.sgd(0.1), statistics, loss=0.1)
        for loss, got in (
            (lambda p, t: (p - t).abs(), r"<lambda>\(p, t\)"),
            (huber_loss, r"huber_loss\(input, target, reduction"),
            (torch.nn.HuberLoss(reduction="none"), r"HuberLoss\(input, target\)"),
            (pf.losses.huber, r"huber\(delta\)"),
        ):
            with pytest.raises(TypeError, match=rf"^{make.__name__}: `loss` must take \(prediction, .* got {got}"):
                make(apply, pf.sgd(0.1), statistics, loss=loss)
        make(apply, pf.sgd(0.1), statistics, loss=lambda p, t, *_, **others: huber_loss(p, t, reduction="none"))
        learner = make(lambda p, x: x @ p["output_linear.weight"].mT, pf.sgd(0.1), statistics, loss=lambda *_: 0.0)
        state = learner.init({"output_linear.weight": torch.ones(1, 2), "output_linear.bias": torch.zeros(1)})
        with pytest.raises(ValueError, match=rf"^{make.__name__}: `loss` must return the loss of each .* got float"):
            learner.update(state, (torch.ones(2), torch.ones(1)))


@pytest.mark.parametrize("name", NAMES)
def test_an_index_out_of_range_is_named(name):
    for index in (-1, 2):
        batch = (torch.zeros(3, 6, dtype=F64), torch.zeros(3), torch.tensor([0, 1, index]))
        with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 2\), got values from"):
            update(name, batch)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_single_outputs_and_heads():
    with pytest.raises(ValueError, match=r"shape of the outputs, \(3, 1\), got \(3, 3\)"):
        update("sgd", (X, torch.zeros(3, 3)), outputs=1)
    scalar = pf.sgd_learner(lambda params, x: params["w"].sum(), pf.sgd(0.1))
    with pytest.raises(ValueError, match="sgd_learner: `apply` must return outputs of shape"):
        scalar.update(scalar.init({"w": torch.ones(2)}), (X, torch.zeros(3)))
    learner = make_learner("popart", 2, head="value")
    with pytest.raises(ValueError, match="popart_learner: `head` must name a layer"):
        learner.update(learner.init(params_of(2)), (X, torch.zeros(3, 2)))
    for name in ("popart", "normalized_sgd"):
        learner = make_learner(name, 1, popart=pf.popart(1, 0.1), head="hidden3")
        with pytest.raises(
            ValueError, match=f"{name}_learner: `head` must name the last layer.*'hidden3' has 5 outputs"
        ):
            learner.update(learner.init(params_of(1)), (X, torch.zeros(3, 1)))
    learner = make_learner("popart", 2, popart=pf.popart(3, 0.1))
    with pytest.raises(ValueError, match=r"outputs = 3 tasks, got \(2, 5\)"):
        learner.update(learner.init(params_of(2)), (X, torch.zeros(3, 3)))


@pytest.mark.parametrize("how", ["one", "batch", "lanes"])
@pytest.mark.parametrize("name", NAMES)
def test_targets_in_double_precision_need_parameters_in_double_precision(name, how):
    """Else the statistics would become float64 in eager, and no engine could carry them."""
    learner = make_learner(name, 2)
    x, y = torch.ones(4, 6), torch.ones(4, 2, dtype=F64)
    x, y = (x[0], y[0]) if how == "one" else (x, y)
    update, params = learner.update, pf.init_params(make(2), 0)
    state, double = learner.init(params), learner.init(params_of(2))
    if how == "lanes":
        state, double = (optree.tree_map(lambda leaf: leaf[None], tree) for tree in (state, double))
        update = torch.vmap(update, (0, None))
    with pytest.raises(
        TypeError, match=rf"{name}_learner: the targets y of `batch` .*got torch.float64: write y.float"
    ):
        update(state, (x, y))
    for cast in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.int):
        assert update(state, (x, cast(y)))[0].statistics.shift.dtype == torch.float32
    assert update(double, (x.double(), y))[0].statistics.shift.dtype == F64
