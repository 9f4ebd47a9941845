"""Functions across the bridges: every row of the matrix of transforms in `docs/how_to/jax.md`, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax
from jax_functions import JW, JX, W, X, close, jax_f, torch_f
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import popart_func as pf
from popart_func import random, scan_lanes
from popart_func.engines.lane_scan import UnsupportedError
from popart_func.interop.jax import from_jax, to_jax, to_jax_callback, to_jax_function, to_torch

pytestmark = pytest.mark.usefixtures("unoptimized_xla")


def scanned(f: Any) -> Any:
    return lambda w, x: lax.scan(lambda c, s: (c - 0.1 * jax.grad(f)(c, s), f(c, s)), w, jnp.stack([x, x * 2, -x]))


FROM_JAX_OUTSIDE: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "jit": jax.jit,
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "vjp": lambda f: lambda w, x: jax.vjp(f, w, x)[1](jnp.float32(2.0)),
    "jvp": lambda f: lambda w, x: jax.jvp(f, (w, x), (w * 2, x + 1)),
    "jacrev": lambda f: jax.jacrev(f, (0, 1)),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "grad of grad": lambda f: jax.grad(lambda w, x: jax.grad(f, 1)(w, x).sum()),
    "vmap": lambda f: lambda w, x: jax.vmap(f, (0, None))(jnp.stack([w, w * 2]), x),
    "nested vmap": lambda f: (
        lambda w, x: jax.vmap(jax.vmap(f, (None, 1)), (0, None))(jnp.stack([w, w * 2]), jnp.stack([x, -x, x + 1], 1))
    ),
    "lax.scan": scanned,
    "lax.cond": lambda f: lambda w, x: lax.cond(x[0] > 0, f, lambda w, x: x[0], w, x),
    "lax.while_loop": lambda f: lambda w, x: lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c + f(c, x) ** 2, w),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}
REVERSE_ONLY = ("jvp", "jacfwd", "hessian")


@pytest.mark.parametrize("transform", FROM_JAX_OUTSIDE)
def test_to_jax_function(transform: str) -> None:
    apply = FROM_JAX_OUTSIDE[transform]
    close(apply(to_jax_function(torch_f))(JW, JX), apply(jax_f)(JW, JX))
    close(jax.jit(apply(to_jax_function(torch_f)))(JW, JX), apply(jax_f)(JW, JX))


@pytest.mark.parametrize("transform", [name for name in FROM_JAX_OUTSIDE if name not in REVERSE_ONLY])
def test_to_jax_callback(transform: str) -> None:
    apply = FROM_JAX_OUTSIDE[transform]
    close(apply(to_jax_callback(torch_f))(JW, JX), apply(jax_f)(JW, JX))


@pytest.mark.parametrize("transform", REVERSE_ONLY)
def test_to_jax_callback_has_no_forward_mode(transform: str) -> None:
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        FROM_JAX_OUTSIDE[transform](to_jax_callback(torch_f))(JW, JX)


TORCH_OUTSIDE: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "call": lambda f: f,
    "grad": grad,
    "vjp": lambda f: lambda w, x: vjp(f, w, x)[1](torch.tensor(2.0)),
    "jvp": lambda f: lambda w, x: jvp(f, (w, x), (w * 2, x + 1)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "hessian": lambda f: hessian(f, (0, 1)),
    "grad of grad": lambda f: grad(lambda w, x: grad(f, 1)(w, x).sum()),
    "vmap": lambda f: lambda w, x: vmap(f, (0, None))(torch.stack([w, w * 2]), x),
    "vmap over the last axis": lambda f: (
        lambda w, x: vmap(f, (-1, 1), 0)(torch.stack([w, w * 2], -1), torch.stack([x, -x], 1))
    ),
    "nested vmap": lambda f: (
        lambda w, x: vmap(vmap(f, (None, 1)), (0, None))(torch.stack([w, w * 2]), torch.stack([x, -x, x + 1], 1))
    ),
    "vmap of grad": lambda f: lambda w, x: vmap(grad(f), (None, 0))(w, torch.stack([x, -x])),
    "grad of vmap": lambda f: grad(lambda w, x: vmap(f, (None, 0))(w, torch.stack([x, -x])).sum()),
}


@pytest.mark.parametrize("transform", TORCH_OUTSIDE)
def test_from_jax(transform: str) -> None:
    apply = TORCH_OUTSIDE[transform]
    close(apply(from_jax(jax_f))(W, X), apply(torch_f)(W, X))


def test_from_jax_under_autograd() -> None:
    def run(f: Any) -> Any:
        w = W.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(w, X), w, create_graph=True)
        first.square().sum().backward()
        return first.detach(), w.grad

    close(run(from_jax(jax_f)), run(torch_f))
    with torch.no_grad():
        assert not from_jax(jax_f)(W.clone().requires_grad_(), X).requires_grad


def test_from_jax_passes_trees_and_what_is_no_tensor() -> None:
    function = from_jax(
        lambda tree, power, *, name: {"out": tree["x"] ** power, "n": tree["i"] + len(name), "no": None}
    )
    i = torch.tensor(3, dtype=torch.int32)
    out = function({"x": X, "i": i}, 2, name="ab")
    close(out["out"], X**2)
    assert out["n"] == 5
    assert out["no"] is None
    gradient = grad(lambda x: function({"x": x, "i": i}, 3, name="a")["out"].sum())(X)
    close(gradient, 3 * X**2)


def test_from_jax_tells_constants_apart() -> None:
    """-0.0 from 0.0 and 1.0 from 1, which Python takes to be equal; but not NaN from NaN, which it does not."""
    calls = []

    def function(x: Any, number: Any) -> Any:
        calls.append(number)
        return jnp.copysign(x, jnp.real(number)) if isinstance(number, float | complex) else x * 7

    ones, signed = torch.ones(1), from_jax(function)
    numbers = (0.0, -0.0, 1.0, 1, complex(-0.0, 0), complex(0, 0))
    assert [float(signed(ones, number)) for number in numbers] == [1, -1, 1, 7, -1, 1]
    assert len(calls) == 6
    for _ in range(3):
        signed(ones, math.nan)
    assert len(calls) == 7


@pytest.mark.parametrize("transform", TORCH_OUTSIDE)
def test_transforms_of_both_at_once(transform: str) -> None:
    """PyTorch's inside, JAX's outside."""
    inside = TORCH_OUTSIDE[transform](torch_f)
    close(jax.jit(to_jax_function(inside))(JW, JX), inside(W, X))
    close(jax.jit(jax.jacfwd(to_jax_function(inside)))(JW, JX), jacfwd(inside)(W, X))
    lanes = torch.stack([W, 2 * W])
    got = jax.jit(jax.vmap(to_jax_function(inside), (0, None)))(to_jax(lanes), JX)
    close(got, vmap(inside, (0, None))(lanes, X))


def test_both_ways_at_once() -> None:
    close(jax.jit(jax.jacrev(to_jax_function(grad(torch_f))))(JW, JX), jax.jit(jax.hessian(jax_f))(JW, JX))
    close(jax.vmap(to_jax_function(vmap(torch_f, (None, 0))), (0, None))(jnp.stack([JW, JW]), jnp.stack([JX, -JX])),
          vmap(vmap(torch_f, (None, 0)), (0, None))(torch.stack([W, W]), torch.stack([X, -X])))  # fmt: skip


class Pair(NamedTuple):
    first: Any
    second: Any


def test_structures_numbers_and_keys() -> None:
    calls = []

    def function(pair: Pair, rest: Any, *, scale: Any) -> Any:
        calls.append(1)
        return {"b": Pair(pair.first * scale, None), "a": [pair.second + rest["n"]]}

    jax_fn = to_jax_function(function)
    arguments = (Pair(JX, JW), {"n": jnp.int32(2)})
    for _ in range(3):
        out = jax_fn(*arguments, scale=2.0)
    assert len(calls) == 1, "it is traced once"
    jax_fn(Pair(JW, JW), {"n": jnp.int32(2)}, scale=2.0)
    assert len(calls) == 2, "and again for other shapes"
    close(out["b"].first, X * 2)
    assert out["b"].second is None
    close(out["a"][0], W + 2)
    drawn = jax.jit(to_jax_function(lambda key: random.uniform(key, (5,))))(jax.random.key(3))
    assert np.array_equal(drawn, jax.random.uniform(jax.random.key(3), (5,)))


def test_random_numbers_are_the_same_stream() -> None:
    def draws(key: Tensor) -> dict[str, Tensor]:
        return {
            "bits": random.bits(key, (3,)),
            "randint": random.randint(key, (3,), -5, 1000),
            "bernoulli": random.bernoulli(key, 0.3, (20,)),
            "permutation": random.permutation(key, torch.arange(9, dtype=torch.int32)),
            "split": random.split(key),
            "key": random.key(key[1]),
        }

    keys = vmap(random.key)(torch.arange(4))
    got = to_torch(jax.jit(jax.vmap(to_jax_function(draws)))(to_jax(keys)))
    for name, value in vmap(draws)(keys).items():
        assert torch.equal(got[name], value), name


def test_what_is_closed_over_is_a_constant() -> None:
    """Read at each call, as a JAX function reads an array of numpy's that it closes over; `jax.jit` keeps it."""
    held = torch.ones(3, requires_grad=True)
    jax_fn = to_jax_function(lambda x: x * held)
    jitted = jax.jit(jax_fn)
    for function in (jax_fn, jitted):
        close(function(JX), X)
    held.data.mul_(5)
    close(jax_fn(JX), 5 * X)
    close(jitted(JX), X)
    close(jax.grad(lambda x: jax_fn(x).sum())(JX), torch.full((3,), 5.0))


@pytest.mark.parametrize(
    "held",
    [
        torch.arange(3),  # int64, whose values fit
        torch.arange(3).to(torch.uint64),
        torch.tensor([1 + 2j, 3, -1j]).conj(),
        torch.tensor(2.0).expand(3),
        torch.tensor([1, 0.5, -2]).to(torch.bfloat16),
        torch.tensor([1, 0.5, -2]).to(torch.float8_e4m3fn),
        torch.nn.Parameter(torch.ones(3)),
    ],
)
def test_tensors_of_every_kind_may_be_closed_over(held: Tensor) -> None:
    function = lambda x: x * (held if held.is_complex() else held.float())  # noqa: E731
    close(to_jax_function(function)(JX), function(X).detach().resolve_conj())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_jax_function(lambda x: torch.linalg.ldl_factor(x).LD)(jnp.ones((2, 2))), UnsupportedError,
         r"no lowering of 'linalg_ldl_factor_ex' on float32\[2, 2\], in .*test_jax_functions.py:\d+: `.*torch.li"),
        (lambda: to_jax_function(lambda w: F.embedding(torch.tensor([0]), w, scale_grad_by_freq=True))(JW),
         UnsupportedError, "with scale_grad_by_freq=True there is no lowering of 'embedding'"),
        (lambda: to_jax_function(lambda x: x.double().sum())(JX), TypeError, "float64 in .*test_jax_functions.py"),
        (lambda: to_jax_function(lambda x: x * WIDE)(JX), TypeError, "closes over a tensor of torch.int64 that JAX wo"),
        (lambda: to_jax_function(lambda x: x)(object()), TypeError, r"be an array or a number, got object at \[0\]"),
        (lambda: to_jax_function(lambda x: x)({"a": X}), TypeError, r"got Tensor at \[0\]\['a'\]"),
        (lambda: to_jax_function(lambda x: x if x.sum() > 0 else -x)(JX), TypeError, "jax_function: the value of a t"),
        (lambda: to_jax_function(lambda x: torch.func.linearize(torch.sin, x)[1](x))(JX), TypeError, "torch.func.j"),
        (lambda: to_jax_function(lambda x: x + torch.rand(3))(JX), TypeError, "jax_function: random numbers ca"),
        (lambda: to_jax_function(lambda x: {"a": [x, 1.0]})(JX), TypeError, r"tensor, got float at \['a'\]\[1"),
        (lambda: to_jax_function(lambda x: x)(jax.random.key(0, impl="rbg")), TypeError, r"threefry2x32 only.* of rbg"),
        (lambda: jax.export.export(jax.jit(to_jax_function(torch.sin)))(
            jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.float32)), TypeError, "must be numbers, got a s"),
        (lambda: to_jax_function(lambda x: x.mul_(2).sum())(JX), TypeError, "changes an argument in place"),
        (lambda: torch.compile(from_jax(jnp.sin), backend="eager", fullgraph=True)(X), Exception, "from_jax"),
        (lambda: torch.func.linearize(from_jax(jnp.sin), X), RuntimeError, "would be taken for a constant"),
        (lambda: to_jax_function(3), TypeError, "to_jax_function: `torch_fn` must be a function, got int"),
        (lambda: to_jax_callback(3), TypeError, "to_jax_callback: `torch_fn` must be a function, got int"),
        (lambda: to_jax_callback(torch_f, vmap_method="x"), ValueError, "`vmap_method` must be 'sequential'"),
        (lambda: to_jax_callback(lambda x: x.double())(JX), TypeError, "callback: a result is of 64 bits: cast it"),
        (lambda: to_jax_callback(lambda x: 1 / 0)(JX), ZeroDivisionError, "division by zero"),
        (lambda: to_jax_callback(lambda x: 1.0)(JX), TypeError, "callback: every leaf of the result must be a te"),
        (lambda: to_jax_callback(lambda x: x)("a"), TypeError, r"callback: every leaf .* a number, got str at \[0\]"),
        (lambda: from_jax(lambda x, y: x)(X, np.ones(2)), TypeError, r"from_jax: leaves .* be hashable, got ndarray"),
        (lambda: from_jax(3), TypeError, "from_jax: `jax_fn` must be a function, got int"),
        (lambda: from_jax(jnp.sin)(X.double()), TypeError, "from_jax: JAX would narrow torch.float64"),
        (lambda: from_jax(jnp.sin)(X.to_sparse()), TypeError, "from_jax: a tensor must be dense, got the layout"),
        (lambda: from_jax(jnp.sin)(X.to("meta")), TypeError, "from_jax: a tensor must be dense, got one on meta"),
        (lambda: from_jax(jnp.add)(X, JX), TypeError, "got ArrayImpl; `to_torch` makes tensors of arrays"),
        (lambda: to_jax_function(from_jax(jnp.sin))(JX), RuntimeError, "would be taken for a constant"),
        (lambda: scan_lanes(lambda c, x: (from_jax(jnp.sin)(c), x), X, X, engine="native"), RuntimeError, "constant"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_from_jax_in_a_compiled_function_is_never_a_constant() -> None:
    """Without ``fullgraph`` PyTorch goes round it, and it runs as it is."""
    function = from_jax(lambda x: jnp.sin(x))
    compiled = torch.compile(lambda x: function(x) + 1, backend="eager")
    for x in (X, X * 2):
        close(compiled(x), torch.sin(x) + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda function, x: make_fx(function)(x)])
def test_nothing_of_jax_is_baked_into_a_trace(trace: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="would be taken for a constant"):
        trace(lambda x: from_jax(jnp.sin)(x) + x, X)
    with pytest.raises(TypeError, match=r"to_jax: the values of a tensor inside .* a trace can't be had"):
        trace(lambda x: to_torch(to_jax(x)) + x, X)


def test_outputs_without_derivative() -> None:
    function = from_jax(lambda x: {"a": jnp.sin(x), "i": jnp.argmax(x), "b": (x**2).sum()})
    close(grad(lambda x: function(x)["a"].sum() + function(x)["b"])(X), torch.cos(X) + 2 * X)
    close(vmap(lambda x: function(x)["i"])(W), W.argmax(1))
    _, tangents = jvp(lambda x: (function(x)["a"], function(x)["b"]), (X,), (torch.ones(3),))
    close(tangents, (torch.cos(X), (2 * X).sum()))
    close(from_jax(lambda n: jnp.ones(n))(3), torch.ones(3))


@pytest.mark.parametrize("make", [lambda: torch.nn.GRU(3, 4), lambda: torch.nn.LSTM(3, 4, 2), lambda: TRANSFORMER])
def test_recurrent_and_attention_networks(make: Callable[[], torch.nn.Module]) -> None:
    module = make().eval()
    x = torch.randn(2, 5, module.input_size if hasattr(module, "input_size") else 8)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(module, params, (x,))
        return ((out[0] if isinstance(out, tuple) else out) ** 3).sum()

    close(jax.jit(jax.grad(to_jax_function(loss), 1))(*to_jax((params, x))), grad(loss, 1)(params, x))


def test_callbacks_of_functions_that_read_values() -> None:
    def function(x: Tensor) -> dict[str, Tensor]:
        x.mul_(2)  # its own copy
        return {"x": x if float(x[0]) > 0 else -x, "n": x.argmax()}

    callback = jax.jit(to_jax_callback(function))
    for x in (JX, -JX):
        got = callback(x)
        close(got["x"], (2 * x if x[0] > 0 else -2 * x))
        assert got["n"] == x.argmax()
    assert float(JX[0]) == 0.5
    close(jax.grad(lambda x: to_jax_callback(lambda x: (x**3).sum())(x))(JX), 3 * X**2)
    half = to_jax_callback(lambda x: x * 2)(jnp.asarray(JX, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    for other in ("float32", "int32", "bool", "complex64"):
        x = jnp.array([[1, 0, 1]]).astype(other)
        assert np.array_equal(to_jax_callback(lambda x: x.T)(x), x.T)


def test_a_callback_is_compiled_once() -> None:
    """Also where nothing is jitted: JAX has to be given the same function each time."""
    events: list[str] = []
    listener = lambda event, *_, **__: events.append(event)  # noqa: E731
    other, function = JX * 2, to_jax_callback(lambda x: x * 2)
    jax.monitoring.register_event_duration_secs_listener(listener)
    counts = []
    try:
        for x in (JX, other, JX):
            function(x)
            counts.append(sum("backend_compile" in event for event in events))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert 0 < counts[0] == counts[-1]


def test_callbacks_of_modules() -> None:
    """What a function closes over is as it is at each call."""
    module = torch.nn.Linear(3, 2)
    function = jax.jit(to_jax_callback(module))
    close(function(JX), module(X).detach())
    close(jax.grad(lambda x: to_jax_callback(module)(x).sum())(JX), module.weight.detach().sum(0))
    torch.nn.init.zeros_(module.weight)
    close(function(JX), module.bias.detach())


@pytest.mark.parametrize("bridge", [to_jax_function, to_jax_callback])
def test_gradients_by_backward_inside(bridge: Callable[..., Any]) -> None:
    def function(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (leaf**3).sum().backward()
        return leaf.grad

    with torch.no_grad():
        close(jax.jit(bridge(function))(JX), 3 * X**2)


def test_export() -> None:
    """To bytes and back, with the gradient; of NamedTuples JAX wants to be told the names."""
    pytest.importorskip("flatbuffers", reason="JAX writes bytes with it")
    exported = jax.export.export(jax.jit(to_jax_function(torch_f)))(JW, JX)
    back = jax.export.deserialize(exported.serialize(vjp_order=1))
    close(back.call(JW, JX), torch_f(W, X))
    close(jax.grad(back.call)(JW, JX), grad(torch_f)(W, X))

    jax.export.register_namedtuple_serialization(pf.PopArtState, serialized_name="popart_func.PopArtState")
    init, update = pf.popart(2, 0.1)
    head, y = {"weight": W, "bias": X[:2]}, torch.tensor([1e3, -7.0])
    arguments = to_jax((head, init(), y))
    exported = jax.export.export(jax.jit(to_jax_function(update)))(*arguments)
    back = jax.export.deserialize(exported.serialize())
    close(back.call(*arguments), to_jax(update(head, init(), y)))


TRANSFORMER = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
WIDE = torch.tensor([2**40, 1, 2])
