"""Errors of learners name the learner and the argument."""

from __future__ import annotations

import optax
import optree
import pytest
import torch
from every_learner import F64, NAMES, make, make_learner, params_of
from torch.nn.functional import huber_loss

import popart_func as pf


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
        ({"x": X, "y": X, "mask": X}, ValueError, "holds 'mask', which a learner does not read: write 'weights'"),
        ({"x": X, "y": X, "index": X}, ValueError, "holds 'index', which a learner does not read: write 'indices'"),
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
    for name, maker in makers.items():
        with pytest.raises(TypeError, match=rf"^{name}: `apply` must be .* got Linear: .*stateless\(module\)"):
            maker(linear, pf.sgd(0.1))
        for optimizer, got in (
            (torch.optim.Adam, "torch.optim.adam.Adam"),
            (torch.optim.SGD(linear.parameters(), 0.1), "torch.optim.sgd.SGD"),
            (optax.sgd(0.1), "optax"),
            (0.1, "builtins.float"),
        ):
            with pytest.raises(TypeError, match=f"^{name}: `optimizer` must be .* got {got}"):
                maker(apply, optimizer)
        for outputs, got in ((lambda p, x: (x, x), "tuple"), (lambda p, x: x.to(torch.complex64), "torch.complex64")):
            learner = maker(outputs, pf.sgd(0.1))
            params = {"output_linear.weight": torch.ones(1, 1), "output_linear.bias": torch.zeros(1)}
            with pytest.raises(TypeError, match=f"^{name}: `apply` must return one tensor .* got .*{got}"):
                learner.update(learner.init(params), (torch.ones(1), torch.ones(1)))
    for maker in (pf.art_learner, pf.popart_learner, pf.normalized_sgd_learner):
        with pytest.raises(TypeError, match=rf"^{maker.__name__}: `popart` must be the statistics, .* got float"):
            maker(apply, pf.sgd(0.1), 0.1)
    for maker in (pf.art_learner, pf.popart_learner):
        with pytest.raises(TypeError, match=rf"^{maker.__name__}: `loss` must be a function, .* got float"):
            maker(apply, pf.sgd(0.1), statistics, loss=0.1)
        for loss, got in (
            (lambda p, t: (p - t).abs(), r"<lambda>\(p, t\)"),
            (huber_loss, r"huber_loss\(input, target, reduction"),
            (torch.nn.HuberLoss(reduction="none"), r"HuberLoss\(input, target\)"),
            (pf.losses.huber, r"huber\(delta\)"),
        ):
            with pytest.raises(TypeError, match=rf"^{maker.__name__}: `loss` must take \(prediction, .* got {got}"):
                maker(apply, pf.sgd(0.1), statistics, loss=loss)
        maker(apply, pf.sgd(0.1), statistics, loss=lambda p, t, *_, **others: huber_loss(p, t, reduction="none"))
        learner = maker(lambda p, x: x @ p["output_linear.weight"].mT, pf.sgd(0.1), statistics, loss=lambda *_: 0.0)
        state = learner.init({"output_linear.weight": torch.ones(1, 2), "output_linear.bias": torch.zeros(1)})
        with pytest.raises(ValueError, match=rf"^{maker.__name__}: `loss` must return the loss of each .* got float"):
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
