"""A user's own op in `to_jax_function`: `register_lowering`, and a trace of a custom op."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from popart_func import scan
from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.tracing.source_lines import TraceError
from popart_func.interop.jax import register_lowering, to_jax_function
from popart_func.interop.lowerings import table

NAME = "popart_func_tests::softer"


@torch.library.custom_op(NAME, mutates_args=())
def softer(x: Tensor, *, sharpness: float = 2.0) -> Tensor:
    return torch.log1p(torch.exp(sharpness * x)) / sharpness


@softer.register_fake
def _(x: Tensor, *, sharpness: float = 2.0) -> Tensor:
    return torch.empty_like(x)


softer.register_autograd(
    lambda ctx, cotangent: cotangent * torch.sigmoid(ctx.sharpness * ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, keyword_only_inputs, output: (
        ctx.save_for_backward(*inputs),
        setattr(ctx, "sharpness", keyword_only_inputs["sharpness"]),
    ),
)
softer.register_vmap(lambda info, axes, x, *, sharpness=2.0: (softer(x, sharpness=sharpness), axes[0]))


@torch.library.custom_op("popart_func_tests::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    return x + 1


@torch.library.custom_op("popart_func_tests::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [x[: x.shape[0] // 2].clone(), x[x.shape[0] // 2 :].clone()]


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[0] // 2), x.new_empty(x.shape[0] - x.shape[0] // 2)]


X, JX = torch.tensor([0.5, -1.2, 0.8]), jnp.array([0.5, -1.2, 0.8])


def lowering(out: Any, x: Any, sharpness: float) -> Any:
    return jnp.log1p(jnp.exp(sharpness * x)) / sharpness


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_registered", {})


def loss(x: Tensor) -> Tensor:
    return softer(x, sharpness=3.0).sum() + (softer(x) * x).sum()


@pytest.mark.parametrize("op", [softer, torch.ops.popart_func_tests.softer, NAME], ids=["custom_op", "ops", "name"])
def test_adds_an_op_to_functions_that_have_been_traced(op: Any) -> None:
    function = to_jax_function(loss)
    with pytest.raises(
        UnsupportedError, match=rf"no lowering of '{NAME}' on float32\[3\], in .*test_jax_registration.*"
    ):
        function(JX)
    with pytest.raises(UnsupportedError, match="`; add one with register_lowering"):
        jax.jit(function)(JX)
    register_lowering(op, lowering)
    assert jnp.allclose(jax.jit(function)(JX), loss(X).item())
    x = X.clone().requires_grad_()
    loss(x).backward()
    assert jnp.allclose(jax.grad(function)(JX), jnp.asarray(x.grad.numpy()))
    assert jnp.allclose(jax.vmap(function)(jnp.stack([JX, -JX])), jnp.asarray(vmap(loss)(torch.stack([X, -X])).numpy()))


def test_replaces_a_lowering() -> None:
    function = to_jax_function(lambda x: (torch.sin(x), softer(x)))
    register_lowering(softer, lowering)
    assert jnp.allclose(function(JX)[0], jnp.sin(JX))
    register_lowering("aten::sin", lambda out, x: x * 7, replace=True)
    register_lowering(softer, lambda out, x, sharpness: x * sharpness, replace=True)
    sine, soft = function(JX)
    assert jnp.allclose(sine, 7 * JX)
    assert jnp.allclose(soft, 2 * JX)
    assert jnp.allclose(to_jax_function(torch.cos)(JX), jnp.cos(JX)), "and no other one"


def test_several_results() -> None:
    register_lowering(halves, lambda outs, x: [x[: outs[0].shape[0]], x[outs[0].shape[0] :]])
    first, second = to_jax_function(lambda x: tuple(halves(x)))(JX)
    assert (first.tolist(), second.shape) == ([0.5], (2,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("op", "given", "error", "message"),
    [
        ("popart_func_tests::absent", lowering, ValueError, "`op` must be an op of PyTorch or its name, .*::absent'"),
        ("no such op", lowering, ValueError, "`op` must be an op of PyTorch or its name, 'namespace::name', got 'no s"),
        (len, lowering, ValueError, "`op` must be an op of PyTorch .* got <built-in function len>"),
        ("selu", lowering, ValueError, "tracing replaces 'selu' by simpler ops, so that .* register those of them"),
        ("matmul", lowering, ValueError, "tracing replaces 'matmul' by simpler ops"),
        ("tanh", lowering, ValueError, "there is a lowering of 'tanh' already: pass replace=True"),
        (softer, "lowering", TypeError, "`lowering` must be a function, got str"),
    ],
)
def test_errors_of_registration(op: Any, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"register_lowering: {message}"):
        register_lowering(op, given)


def test_errors_of_lowerings() -> None:
    register_lowering(softer, lambda out, x, sharpness: x.sum())
    with pytest.raises(
        TypeError, match=rf"lowering of '{NAME}' must return the shape \(3,\), got \(\), in .*softer\(x\)"
    ):
        to_jax_function(lambda x: softer(x))(JX)

    def refuses(out: Any, x: Any, sharpness: float) -> Any:
        raise NotImplementedError(f"sharpness={sharpness}")

    register_lowering(softer, refuses, replace=True)
    with pytest.raises(UnsupportedError, match=rf"with sharpness=2.0 there is no lowering of '{NAME}'"):
        to_jax_function(lambda x: softer(x))(JX)


def test_a_custom_op_is_traced_by_its_fake_implementation() -> None:
    with pytest.raises(
        TraceError, match=r"can't tell the shape that '.*::shapeless' returns .* `.*shapeless\(x\).*regis"
    ):
        to_jax_function(lambda x: shapeless(x))(JX)


@pytest.mark.parametrize("engine", ["eager", "inductor"])
def test_engines_run_a_custom_op(engine: str) -> None:
    carry, ys = scan(lambda c, x: (softer(c) + x, c), torch.tensor(0.0), X, engine=engine)
    expected, outputs = torch.tensor(0.0), []
    for x in X:
        outputs.append(expected)
        expected = softer(expected) + x
    torch.testing.assert_close((carry, ys), (expected, torch.stack(outputs)))
