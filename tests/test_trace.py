"""The step graph: what it looks like, and what can't be one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import grad, vjp, vmap

from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, TensorSpec, TraceError, describe
from popart_func.engines.tracing.tracer import trace_step
from popart_func.engines.tracing.walk import bind_arguments, op_name, walk
from popart_func.learners import popart_learner
from popart_func.models import UnifiedModel, init_params, stateless
from popart_func.optim import adam
from popart_func.pop_art import popart

SPEC = TensorSpec((3, 4), torch.float32, torch.device("cpu"))


def traced(function: Callable[..., Any], *specs: TensorSpec) -> StepGraph:
    specs = specs or (SPEC,)
    return trace_step(function, optree.tree_structure(tuple(0 for _ in specs)), specs)


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 7  # wrong on purpose, so that it can be told from the derivative


@pytest.mark.parametrize(
    "function",
    [
        lambda x: grad(lambda x: torch.tanh(x @ x.T).sum())(x),
        lambda x: {"b": vjp(torch.sigmoid, x)[1](x)[0], "a": x.norm()},
        lambda x: vmap(lambda row: row * row.sum())(x),
        lambda x: grad(lambda x: (Doubled.apply(x) ** 2).sum())(x),
        lambda x: grad(lambda x: torch.linalg.vector_norm(x, 3, dim=-1).sum() + torch.dist(x, x[0], 1.5))(x),
        lambda x: F.layer_norm(x, (4,)) + F.elu(x),
        lambda x: x.clone().mul_(2).add_(x[0]),
        lambda x: x[torch.argmax(x[:, 0])] + x[0, torch.argmin(x[1])],
    ],
)
def test_computes_what_the_function_does(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3, 4)
    graph = traced(function)
    outputs = graph.module(x, *graph.constants)
    for got, spec, expected in zip(outputs, graph.outputs, optree.tree_leaves(function(x)), strict=True):
        assert TensorSpec.of(got) == spec
        torch.testing.assert_close(got, expected)


def test_a_whole_learner_is_a_graph_of_core_operations() -> None:
    model = UnifiedModel(4, 3, 1)
    learner = popart_learner(stateless(model), adam(1e-3), popart(1, 0.1))
    arguments = (learner.init(init_params(lambda: model, 0)), (torch.ones(4), torch.ones(1)))
    leaves, structure = optree.tree_flatten(arguments)
    graph = trace_step(learner.update, structure, [TensorSpec.of(leaf) for leaf in leaves])
    for node in graph.module.graph.nodes:
        assert node.op in ("placeholder", "call_function", "output")
        assert node.op != "call_function" or not node.target._schema.is_mutable
    assert graph.operations["mm"] == 14
    assert graph.operations["tanh"] == 4


def test_prints_so_that_a_person_can_read_it() -> None:
    table = torch.arange(4.0)
    graph = traced(lambda x: (x + table, (x @ x.T).sum(), (x @ x.T).sum() * 2))
    assert str(graph).splitlines() == [
        "arg0_1: float32[3, 4]",
        "constant_0: float32[4]",
        "  add: float32[3, 4] = add(arg0_1, constant_0)",
        "  permute: float32[4, 3] = permute(arg0_1, [1, 0])",
        "  mm: float32[3, 3] = mm(arg0_1, permute)",
        "  sum_1: float32[] = sum(mm, [])",
        "  mul: float32[] = mul(sum_1, 2)",
        "return add, sum_1, mul",
        "5 operations: 1 add, 1 permute, 1 mm, 1 sum, 1 mul",
    ]


def test_computes_the_same_only_once_but_keeps_what_differs() -> None:
    graph = traced(lambda x: (x.exp() + x.exp(), x * 1, x * 1.0, x * 0.0, x * -0.0))
    assert graph.operations["exp"] == 1
    assert graph.operations["mul"] == 4


def test_takes_at_a_0d_index() -> None:
    """PyTorch's own way of taking `take` apart would read its value."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.take(x[0, 0].long()), x.take(x[:2, :2].long() - 3)

    x = torch.arange(12.0).reshape(3, 4) % 5
    for got, expected in zip(traced(function).module(x), function(x), strict=True):
        assert torch.equal(got, expected)


def test_is_traced_once() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x + 1

    assert traced(function) is traced(function)
    assert traced(function, SPEC._replace(shape=(2,))) is not traced(function)
    assert calls == [(3, 4), (2,)]


def test_names_the_line_of_each_operation() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return grad(lambda y: (y * y).sum())(y)

    for node in traced(function).module.graph.nodes:
        if node.op == "call_function":
            assert __file__ in describe(node)
    assert "y = torch.tanh(x)" in describe(
        next(node for node in traced(function).module.graph.nodes if "tanh" in node.name)
    )


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # HERE
        return x
    return -x


def branch_below_a_gradient(x: Tensor) -> Tensor:
    def loss(x: Tensor) -> Tensor:
        return x.sum() if x.sum() > 0 else -x.sum()  # HERE

    return grad(loss)(x)


def item(x: Tensor) -> Tensor:
    return x * x.sum().item()  # HERE


def mask(x: Tensor) -> Tensor:
    return x[x > 0]  # HERE


def nonzero(x: Tensor) -> Tensor:
    return torch.nonzero(x)  # HERE


def random(x: Tensor) -> Tensor:
    return x + torch.rand(3, 4)  # HERE


def dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)  # HERE


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branch, "the value of a tensor is read in .* use torch.where"),
        (branch_below_a_gradient, "the value of a tensor is read in .* use torch.where"),
        (item, "the value of a tensor is read in .* keep the 0-d tensor"),
        (mask, "a shape depends on values in .* use torch.where"),
        (nonzero, "a shape depends on values in .* use torch.where"),
        (random, r"random numbers can't be drawn inside without a key, as 'rand' does in .* pass numbers in"),
        (dropout, "random numbers can't be drawn inside without a key, .* pass numbers in"),
    ],
)
def test_says_what_cannot_be_a_graph_and_where(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        traced(function)
    assert f"{__file__}:" in str(caught.value)
    assert "# HERE`" in str(caught.value)


def test_leaves_errors_that_are_not_about_tracing_as_they_are() -> None:
    def function(x: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        traced(function)
    with pytest.raises(TypeError, match=r"every leaf that `step` returns must be a tensor, got float at \(1,\)"):
        traced(lambda x: (x, 1.0))


def test_a_walk_computes_a_graph_with_any_values() -> None:
    """With words: of inputs, of ops, of the parts of an op with several results."""
    graph = traced(lambda x: (x.sort()[0] + x.sort()[1], x.clamp(max=3.0)))
    asked: list[tuple[str, dict[str, Any]]] = []

    def call(node: Any, values: Any) -> Any:
        asked.append((op_name(node), bind_arguments(node, values)))
        return ["values", "places"] if op_name(node) == "sort" else op_name(node)

    kept: list[str] = []
    outputs = walk(graph.graph, ["x"], call, keep=lambda node, value: kept.append(node.name) or value)
    assert outputs == ["add", "clamp"]
    assert kept == [node.name for node in graph.calls]
    assert asked == [
        ("sort", {"self": "x", "dim": -1, "descending": False}),
        ("add", {"self": "values", "other": "places", "alpha": 1}),
        ("clamp", {"self": "x", "min": None, "max": 3.0}),
    ]


@dataclasses.dataclass(frozen=True)
class First(CacheKey[str]):
    number: int


@dataclasses.dataclass(frozen=True)
class Second(CacheKey[int]):
    number: int


def test_what_is_made_of_a_graph_is_kept_with_it() -> None:
    made: list[object] = []
    graph, other = traced(lambda x: x + 1), traced(lambda x: x + 1)
    for _ in range(2):
        assert graph.cached(First(1), lambda: made.append("first") or "a") == "a"
        assert graph.cached(First(2), lambda: made.append("of another number") or "b") == "b"
        assert graph.cached(Second(1), lambda: made.append("of another key") or 3) == 3
        assert other.cached(First(1), lambda: made.append("of another graph") or "c") == "c"
    assert made == ["first", "of another number", "of another key", "of another graph"]
