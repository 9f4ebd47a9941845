"""How a step is traced: what mutates, what can't be read, what is taken apart, and what need not be imported."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import popart_func
from popart_func.engines import native
from popart_func.engines.tracing import decompositions, recorder, shapes
from popart_func.engines.tracing.mutations import is_mutable
from popart_func.engines.tracing.recorder import is_recording
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec, TraceError
from popart_func.engines.tracing.tracer import trace_step

CPU = torch.device("cpu")
SPEC = TensorSpec((3, 4), torch.float32, CPU)


def traced(function: Callable[..., Any], *specs: TensorSpec) -> StepGraph:
    specs = specs or (SPEC,)
    return trace_step(function, optree.tree_structure(tuple(0 for _ in specs)), specs)


def changes_what_a_view_shows(x: Tensor) -> Any:
    y = x.clone()
    first = y[0]
    y.add_(1)
    first.mul_(2)
    return y, first + 1


def changes_a_view_of_a_view(x: Tensor) -> Any:
    y = x.clone()
    turned = y.t()
    turned[1:].add_(1)
    return turned, y * 2


def changes_one_of_several_views(x: Tensor) -> Any:
    y = x.clone()
    first, second, _ = y.unbind(0)
    first.add_(1)
    return y * 1, second


def keeps_its_dtype(x: Tensor) -> Any:
    return x.clone().add_(torch.ones(4, dtype=torch.float64)), torch.zeros(3, dtype=torch.int32).add_(2).eq_(2)


def is_turned_in_place(x: Tensor) -> Any:
    y = x.clone()
    y.t_()
    z = x.clone().transpose_(0, 1)
    sorted_ = x.sort().values
    sorted_.add_(1).t_()
    return y, y.sum(0), y.unsqueeze_(0) * 1, z * torch.ones(z.shape), z.swapaxes_(0, 1) * 2, sorted_, x.quantile(0.3, 1)


def fills(x: Tensor) -> Any:
    y = x.clone().fill_(2)
    y[:, 1] += x[:, 0]
    y[x > 0] = 0
    return y, torch.empty(3).zero_(), x.clone().masked_fill_(x > 0, 1.0), F.silu(x.clone(), inplace=True)


def writes_to_out(x: Tensor) -> Any:
    target = torch.empty(3, 4)
    torch.add(x, 1, out=target)
    return target


def changes_under_a_transform(x: Tensor) -> Any:
    h = torch.tanh(x)
    return grad(lambda z: z.clone().mul_(h).sum())(x), vmap(lambda row: row.clone().add_(1).mul_(row))(x)


def changes_a_number(x: Tensor) -> Any:
    number = torch.tensor([1.0, 2.0, 3.0])
    number[0] = x[0, 0]
    return number


@pytest.mark.parametrize(
    "function",
    [
        changes_what_a_view_shows,
        changes_a_view_of_a_view,
        changes_one_of_several_views,
        keeps_its_dtype,
        is_turned_in_place,
        fills,
        writes_to_out,
        changes_under_a_transform,
        changes_a_number,
    ],
)
def test_mutations_become_values(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3, 4)
    graph = traced(function)
    assert not any(map(is_mutable, graph.graph.nodes))
    for got, expected in zip(graph.module(x, *graph.constants), optree.tree_leaves(function(x)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_derivatives_of_derivatives_are_core_operations() -> None:
    def function(x: Tensor) -> Any:
        cubes = hessian(lambda y: (y**3).sum())(x[0])
        return cubes, jvp(torch.sin, (x,), (x,)), copy.deepcopy(x) + 1

    graph, x = traced(function), torch.randn(3, 4)
    x[0, 0] = torch.inf  # times a derivative that is known to be 0 it is 0
    assert "_efficientzerotensor" not in graph.operations
    for got, expected in zip(graph.module(x, *graph.constants), optree.tree_leaves(function(x)), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_what_is_closed_over_is_left_alone() -> None:
    table = torch.arange(4.0)

    def function(x: Tensor) -> Tensor:
        table.add_(1)
        return x * table

    graph = traced(function)
    assert table.tolist() == [0, 1, 2, 3]
    assert graph.operations["copy_"] == 1  # so that no engine takes it for pure


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.tensor([x[0, 0], x[0, 1]]),
        lambda x: x if torch.equal(x, x) else -x,
        lambda x: x * sum(range(x.long()[0, 0])),
        lambda x: grad(lambda x: x.sum() * float(x.sum()))(x),
    ],
)
def test_values_cannot_be_read(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TraceError, match=r"the value of a tensor is read in .*test_recorder.py:\d+: `lambda x"):
        traced(function)


def test_constants_can_be_read_as_long_as_nothing_in_them_was_changed() -> None:
    rate, changed = torch.tensor(0.5), torch.zeros(3)

    def reads(x: Tensor) -> Tensor:
        return x * float(rate) * torch.tensor(3).item()

    def reads_what_was_changed(x: Tensor) -> Tensor:
        one = torch.tensor(1.0)
        one.view(1)[0].add_(x[0, 0])
        return x * float(one)

    assert torch.equal(traced(reads).module(torch.ones(3, 4), *traced(reads).constants)[0], torch.full((3, 4), 1.5))
    with pytest.raises(TraceError, match="the value of a tensor is read"):
        traced(reads_what_was_changed)
    assert changed.sum() == 0


def test_what_was_read_is_read_again_when_it_has_changed() -> None:
    rate = torch.tensor(0.5)

    def reads(x: Tensor) -> Tensor:
        return x * rate.item()

    first = traced(reads)
    assert traced(reads) is first
    rate.fill_(0.25)
    again = traced(reads)
    assert torch.equal(again.module(torch.ones(3, 4), *again.constants)[0], torch.full((3, 4), 0.25))


def test_a_tensor_of_a_trace_is_of_no_use_outside() -> None:
    kept: list[Tensor] = []

    def keeps(x: Tensor) -> Tensor:
        kept.append(x)
        assert is_recording()
        assert "float32[3, 4]" in str(x)
        return x + 1

    traced(keeps)
    assert not is_recording()
    with pytest.raises(RuntimeError, match=r"add.* was called on a tensor of an earlier trace: a step must be pure"):
        kept[0] + 1
    with pytest.raises(RuntimeError, match=r"earlier trace is used in .*test_recorder.py:\d+: `traced\(lambda"):
        traced(lambda x: x + kept[0])


def test_tensors_of_two_devices_do_not_mix() -> None:
    table = torch.ones(4, device="meta")
    with pytest.raises(RuntimeError, match=r"tensors on cpu and on meta meet in .*test_recorder.py"):
        traced(lambda x: x + table)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, i: x[i % 3].sum() + x[i // 2].sum() + x[torch.fmod(i, 2)].sum(),
        lambda x, i: x.gather(0, i[None]).sum() + F.embedding(i, x).sum() + x.index_select(0, i).sum(),
        lambda x, i: x.index_put((i,), torch.ones(4)).scatter_add(0, i[None], torch.ones(1, 4)),
        lambda x, i: torch.linalg.svdvals(x) + torch.linalg.vector_norm(x) + torch.logsumexp(x, 0)[:3],
    ],
)
def test_stand_ins_are_never_out_of_range(function: Callable[..., Any]) -> None:
    x, i = torch.randn(3, 4), torch.tensor([2, 0, 1, 2])
    graph = traced(function, SPEC, TensorSpec((4,), torch.int64, CPU))
    torch.testing.assert_close(graph.module(x, i, *graph.constants)[0], function(x, i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_an_op_is_taken_apart_into_is_what_pytorch_says(dtype: torch.dtype, monkeypatch: Any) -> None:
    losses = (F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss)
    layers = (torch.tanh, torch.sigmoid, F.relu, F.silu, F.softplus, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.mish)

    def function(x: Tensor, y: Tensor) -> Any:
        return (
            [grad(lambda x, loss=loss: loss(x, y))(x) for loss in losses],
            [grad(lambda x, layer=layer: layer(x).sum())(x) for layer in layers],
            [torch.lerp(x, y, 0.3), torch.lerp(x, y, x), torch.addcmul(x, y, y), torch.addcdiv(x, y, y), 1 - x],
            grad(lambda x: (F.softmax(x, -1) * F.log_softmax(x, 0)).sum())(x),
        )

    specs = (SPEC._replace(dtype=dtype), SPEC._replace(dtype=dtype))
    light = str(traced(function, *specs))
    own = decompositions._OWN
    table = {op: of_pytorch for op, of_pytorch in decompositions._table().items() if op.overloadpacket not in own}
    monkeypatch.setattr(recorder, "taken_apart", lambda op: table.get(op) or decompositions.taken_apart(op))
    assert str(traced(lambda x, y: function(x, y), *specs)) == light


def test_shapes_are_those_of_pytorchs_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins on the CPU against tensors without values."""

    def function(x: Tensor) -> Any:
        pieces = torch.split(x, 2, dim=1)
        return {
            "pointwise": (x.exp() + x[0], x.to(torch.float64) * 2, x > 0, x.clamp(0, 1)),
            "reductions": (x.sum(), x.mean(1), x.argmax(0), x.var(0), x.cumsum(1), x.sort(0)),
            "movement": (torch.cat(pieces, 0), x.t().contiguous(), F.pad(x, (1, 2)), x.roll(1), x.tril(), x.flip(0)),
            "products": (x @ x.T, torch.einsum("ij,kj->ik", x, x), x @ x[0], torch.outer(x[0], x[1])),
            "new": (torch.zeros_like(x), x.new_ones(2), torch.arange(4), torch.eye(3), torch.full((2,), 3)),
            "gradient": grad(lambda x: F.layer_norm(torch.tanh(x @ x.T).softmax(-1), (3,)).square().sum())(x),
        }

    fast = str(traced(function))
    monkeypatch.setattr(shapes, "_how", functools.cache(lambda op: (op.is_view, None)))
    assert str(traced(lambda x: function(x))) == fast


@pytest.mark.skipif(native.why_not(CPU) is not None, reason="no C++ compiler")
def test_a_new_process_imports_no_compiler_of_pytorchs() -> None:
    """What makes it start at once: TorchDynamo takes a second to import, sympy a quarter."""
    program = """
import sys
import torch
import popart_func as pf
print([name for name in ("native", "inductor", "eager") if f"popart_func.engines.{name}" in sys.modules])
network = pf.stateless(pf.UnifiedModel(4, 3, 1))
learner = pf.popart_learner(network, pf.sgd(0.1), pf.popart(1, 0.1))
state = learner.init(pf.init_params(lambda: pf.UnifiedModel(4, 3, 1), seed=0))
xs = torch.ones(2, 4), torch.ones(2, 1)
pf.scan(lambda state, xy: (learner.update(state, xy)[0], xy[1]), state, xs, engine="native")
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
import torch._dynamo.config
print(torch._dynamo is sys.modules["torch._dynamo"])
"""
    source = str(Path(popart_func.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n[]\nTrue\n"


def moves(x: Tensor) -> Any:
    rows = torch.arange(3)
    kept = torch.where(rows > 0, x[:, 0], torch.zeros(()))
    return kept.gather(0, rows.flip(0)), F.one_hot(x.argmax(1), 4), x.index_select(0, rows) * torch.ones(4)


@pytest.mark.parametrize(
    "function", [moves, changes_what_a_view_shows, grad(lambda x: x.tanh().norm() + x.sort()[0][0, 0])]
)
def test_a_default_device_says_where_things_lie_and_nothing_else(function: Callable[..., Any]) -> None:
    """Of all devices but the CPU only ``meta`` is everywhere."""
    expected = traced(function)
    with torch.device("meta"):
        got = traced(function, SPEC._replace(device=torch.device("meta")))
    assert str(got).replace("device=meta", "device=cpu") == str(expected)
    assert {output.device.type for output in got.outputs} == {"meta"}
