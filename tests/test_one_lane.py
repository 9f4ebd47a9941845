"""The short ways of one lane outside of transforms give what the long ways give: statistics, gradients, optimizers."""

from __future__ import annotations

from typing import ClassVar

import optree
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import popart_func as pf
from popart_func._gradients import gradient
from popart_func.optim.elementwise import map_elements

FLOAT64 = torch.float64


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
@pytest.mark.parametrize("kind", ["all", "weights", "indices", "huge", "not a number", "many tasks"])
def test_statistics_in_floats_are_those_in_tensors(kind, reduction):
    """In float64 to rounding; `torch.vmap` over one lane takes tensors."""
    tasks = 20 if kind == "many tasks" else 3
    options = {"step_size": 0.02, "reduction": reduction, "bias_correction": True}
    state = lanes = pf.init_state(tasks, dtype=FLOAT64)
    for number in range(3):
        y = 1e3 + torch.randn(6, tasks, dtype=FLOAT64)
        if number == 1 and kind in ("huge", "not a number"):
            y[2, 1] = 1e308 if kind == "huge" else torch.nan
        indices = torch.tensor([0, 1, 1, 0, 0, 1]) if kind == "indices" else None
        weights = (torch.rand(6, tasks) < 0.6).double() if kind == "weights" else None
        y = y if indices is None else y[:, 0]
        state = pf.art(state, y, indices, weights, **options)
        one = [leaf[None] for leaf in lanes]
        lanes = vmap(lambda *fields, y=y, of=indices, w=weights: pf.art(pf.PopArtState(*fields), y, of, w, **options))(
            *one
        )
        lanes = pf.PopArtState(*(leaf[0] for leaf in lanes))
    for got, expected in zip(state[:4], lanes[:4], strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("tasks", [1, 20])
def test_a_step_of_1_forgets_a_variance_that_was_far_larger(tasks):
    """In floats and in tensors."""
    state = pf.init_state(tasks)._replace(variance=torch.full((tasks,), 1e30))
    y = torch.tensor([[-1.0], [1.0]]).expand(2, tasks)
    assert torch.equal(pf.art(state, y, step_size=1.0).variance, torch.ones(tasks))


class TestGradient:
    PARAMS: ClassVar = {"w": torch.randn(3), "unused": torch.randn(2)}

    @staticmethod
    def both(objective, params, x=()):
        return gradient(objective, params, x), grad(objective, has_aux=True)(params)

    def test_equal_to_torch_func(self):
        for objective in (
            lambda p: ((p["w"] ** 3).sum(), p["w"] * 2),
            lambda p: (torch.ones(()), p["w"]),
        ):
            (got, aux), (expected, expected_aux) = self.both(objective, self.PARAMS)
            assert got.keys() == expected.keys()
            assert pf.tree.max_difference(got, expected) == 0
            assert torch.equal(aux, expected_aux)
            assert not any(leaf.requires_grad for leaf in (*got.values(), aux))
        assert not any(leaf.requires_grad for leaf in self.PARAMS.values())

    def test_what_an_objective_closes_over_keeps_its_gradient(self):
        other = torch.tensor(2.0, requires_grad=True)
        (got, aux), _ = self.both(lambda p: ((p["w"] * other**2).sum(), p["w"] * other), self.PARAMS)
        assert torch.autograd.grad(got["w"].sum(), other, retain_graph=True)[0] == 3 * 2 * 2
        assert aux.requires_grad
        with torch.no_grad():
            (got, aux), _ = self.both(lambda p: ((p["w"] * other).sum(), p["w"] * other), self.PARAMS)
        assert not got["w"].requires_grad
        assert not aux.requires_grad

    def test_through_an_update_of_a_learner(self):
        """With respect to the parameters, the inputs, and a tensor within the loss."""
        make = lambda: nn.Linear(2, 1)  # noqa: E731
        delta, x = torch.tensor(0.3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
        learner = pf.sgd_learner(pf.stateless(make()), pf.sgd(0.1), loss=pf.losses.huber(delta))
        params = {name: leaf.requires_grad_() for name, leaf in pf.init_params(make, 0).items()}
        state, _ = learner.update(learner.init(params), (x, 5 + torch.randn(4, 1)))
        total = sum(leaf.square().sum() for leaf in state.params.values())
        found = torch.autograd.grad(total, [delta, x, *params.values()])
        assert all(leaf.isfinite().all() and leaf.any() for leaf in found)

    def test_through_what_a_module_keeps_beside_parameters(self):
        """An attribute that is a plain tensor, which no list of parameters and buffers has."""
        module = nn.Linear(2, 1)
        module.gain = torch.tensor(2.0, requires_grad=True)
        module.register_forward_pre_hook(lambda module, args: (args[0] * module.gain,))
        learner = pf.sgd_learner(pf.stateless(module), pf.sgd(0.1))
        params = {name: leaf.detach() for name, leaf in module.named_parameters()}
        state, info = learner.update(learner.init(params), (torch.ones(2), torch.ones(1)))
        assert all(
            torch.autograd.grad(one.sum(), module.gain, retain_graph=True)[0]
            for one in (state.params["weight"], info.loss)
        )

    def test_through_the_targets_of_an_update(self):
        make = lambda: nn.Linear(2, 1)  # noqa: E731
        learner, y = pf.sgd_learner(pf.stateless(make()), pf.sgd(0.1)), torch.randn(4, 1, requires_grad=True)
        state, _ = learner.update(learner.init(pf.init_params(make, 0)), (torch.randn(4, 2), y))
        assert torch.autograd.grad(state.params["bias"].sum(), y)[0].all()

    def test_inputs_of_inference_mode(self):
        with torch.inference_mode():
            x = torch.randn(5, 3)
        got, _ = gradient(lambda p: ((x @ p["w"]).sum(), ()), self.PARAMS, x)
        torch.testing.assert_close(got["w"], x.clone().sum(0))


@pytest.mark.parametrize("kind", ["alike", "of two dtypes", "nested", "of one leaf"])
def test_a_map_of_elements_is_a_map_of_leaves(kind):
    trees = {
        "alike": {"a": torch.randn(2, 3), "b": torch.randn(4), "c": torch.randn(())},
        "of two dtypes": {"a": torch.randn(2, 3), "b": torch.randn(4).double()},
        "nested": {"a": (torch.randn(2, 3), {"b": torch.randn(4).bfloat16()}), "c": torch.randn(1)},
        "of one leaf": torch.randn(3),
    }
    first = trees[kind]
    second = optree.tree_map(lambda leaf: leaf + 1, first)
    total, product = map_elements(lambda a, b: (a + b, a * b), first, second)
    assert pf.tree.max_difference(total, optree.tree_map(torch.add, first, second)) == 0
    assert pf.tree.max_difference(product, optree.tree_map(torch.mul, first, second)) == 0
    assert [leaf.dtype for leaf in optree.tree_leaves(total)] == [leaf.dtype for leaf in optree.tree_leaves(first)]
    with pytest.raises(ValueError, match="`updates` must have the shapes of `params`"):
        pf.apply_updates({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_a_part_in_evaluation_mode_stays_so():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    module[1].eval()
    apply = pf.stateless(module)
    params = {name: leaf.detach().clone() for name, leaf in (*module.named_parameters(), *module.named_buffers())}
    _, buffers = apply.with_buffers(params, torch.randn(5, 2) + 3)
    assert torch.equal(buffers["1.running_mean"], params["1.running_mean"])
    assert not module[1].training


def test_a_module_keeps_its_own_parameters_whatever_happens():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("broken")

    module = Broken(2, 1)
    own = dict(module.named_parameters())
    with pytest.raises(RuntimeError, match="broken"):
        pf.stateless(module)({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.ones(2))
    assert all(leaf is own[name] for name, leaf in module.named_parameters())
