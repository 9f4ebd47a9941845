"""What is easily wrong at the bridges: shapes that decide structures, complex numbers, forward mode, keys, threads."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_functions import JW, JX, W, X, close, jax_f
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vmap

from popart_func import random
from popart_func.engines.tracing import tracer
from popart_func.interop.jax import from_jax, to_jax, to_jax_callback, to_jax_function


@pytest.mark.parametrize("bridge", [to_jax_function, to_jax_callback])
def test_what_a_result_is_may_depend_on_shapes(bridge: Callable[..., Any]) -> None:
    """Also in turns, and though what was found out at first is kept; `torch.return_types` become tuples."""
    function = bridge(lambda x: {"sorted": x.sort()} if x.ndim == 1 else [x.max(0), x])
    for x in (JX, JW, JX, JW):
        got = jax.jit(function)(x)
        if x.ndim == 1:
            close(got["sorted"][0], jnp.sort(x))
            assert np.array_equal(got["sorted"][1], jnp.argsort(x))
        else:
            close((got[0][0], got[1]), (x.max(0), x))
    back = from_jax(lambda x: {"twice": x * 2} if x.ndim == 1 else [x, x + 1])
    for x in (X, W, X, W):
        close(back(x)["twice"] if x.ndim == 1 else back(x)[1], x * 2 if x.ndim == 1 else x + 1)
    close(vmap(lambda x: back(x)["twice"])(W), W * 2)


def test_complex_numbers() -> None:
    """PyTorch's gradient is the conjugate of JAX's; each side gets its own."""

    def torch_loss(z: Tensor) -> Tensor:
        return (z.conj() * z * torch.tensor([1.0, 3.0])).real.sum() + (z.imag**3).sum() + torch.view_as_real(z).sum()

    def jax_loss(z: Any) -> Any:
        return (z.conj() * z * jnp.array([1.0, 3.0])).real.sum() + (z.imag**3).sum() + z.real.sum() + z.imag.sum()

    z = torch.tensor([1 + 2j, 0.5 - 1j])
    jax_z = jnp.asarray(z.numpy())
    expected = jax.grad(jax_loss)(jax_z)
    close(jax.grad(to_jax_function(torch_loss))(jax_z), expected)
    close(jax.grad(to_jax_callback(torch_loss))(jax_z), expected)
    for loss in (torch_loss, from_jax(jax_loss)):
        leaf = z.clone().requires_grad_()
        loss(leaf).backward()
        close(leaf.grad.resolve_conj(), jnp.conj(expected))


@pytest.mark.parametrize(
    "function",
    [
        torch.abs,
        torch.angle,
        torch.sgn,
        torch.acosh,
        torch.sqrt,
        torch.log,
        lambda z: 2 * z + (1 - 3j),
        lambda z: 1j / z,
    ],
)
def test_functions_of_complex_numbers(function: Callable[[Tensor], Tensor]) -> None:
    def loss(z: Tensor) -> Tensor:
        value = function(z)
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape)).sum()

    z = torch.tensor([1 + 2j, -0.5 + 0.3j, 0.2 - 1j, -2 - 0.1j])
    jax_z, gradient = to_jax(z), grad(loss)(z).resolve_conj()
    close(to_jax_function(function)(jax_z), function(z).resolve_conj())
    close(to_jax_function(grad(loss))(jax_z), gradient)
    close(jnp.conj(jax.grad(to_jax_function(loss))(jax_z)), gradient)


def test_from_jax_under_forward_mode_of_autograd() -> None:
    """Which asks tensors that require no gradient."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones(3))
        assert torch.equal(forward_ad.unpack_dual(from_jax(lambda x: x**2)(x)).tangent, 2 * X)
    with jax.enable_x64(True):
        leaves = [leaf.double().requires_grad_() for leaf in (W, X)]
        torch.autograd.gradcheck(from_jax(jax_f), leaves, check_forward_ad=True)
        torch.autograd.gradgradcheck(from_jax(jax_f), leaves)


def test_keys_cross_as_words() -> None:
    keys = jax.random.split(jax.random.key(3), 4)
    draw = lambda key: random.uniform(key, (2,))  # noqa: E731
    expected = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    assert np.array_equal(jax.vmap(to_jax_function(draw))(keys), expected)
    assert np.array_equal(jax.vmap(to_jax_callback(draw))(keys), expected)
    assert torch.equal(from_jax(lambda: jax.random.key(3))(), random.key(3))


def test_nothing_is_kept_of_functions_that_are_gone() -> None:
    kept = len(tracer._graphs)
    for number in range(3):
        to_jax_function(lambda x, number=number: x * number)(JX)
    gc.collect()
    assert len(tracer._graphs) <= kept


def test_threads_may_share_a_function() -> None:
    function = to_jax_function(lambda x: {"a": torch.tanh(x).sum()})
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda size: function(jnp.ones(1 + size % 5))["a"], range(20)))
    close(got, [torch.ones(1 + size % 5).tanh().sum() for size in range(20)])


def test_the_setting_for_64_bits_may_change_between_calls() -> None:
    for bridge in (to_jax_function, to_jax_callback):
        function = bridge(lambda x: (x * 2, x.argmax()))
        for wide in (True, False, True):
            with jax.enable_x64(wide):
                assert [out.dtype.name for out in function(JX)] == ["float32", "int64" if wide else "int32"]


def test_what_is_compiled_is_traced_as_it_was_written() -> None:
    compiled = torch.compile(torch.sin, backend="eager")
    compiled(X)
    close(jax.grad(lambda x: to_jax_function(compiled)(x).sum())(JX), torch.cos(X))


def test_a_module_may_be_switched_between_its_modes() -> None:
    module = torch.nn.Dropout(0.5).eval()
    function = to_jax_function(module)
    close(function(JX), X)
    module.train()
    with pytest.raises(TypeError, match="random numbers can't be drawn inside"):
        function(JX)
    module.eval()
    close(function(JX), X)


def test_sinc_has_a_derivative_at_0() -> None:
    points = torch.tensor([0.0, 0.5, -1.0])
    got = jax.vmap(jax.grad(to_jax_function(torch.sinc)))(to_jax(points))
    close(got, vmap(grad(torch.sinc))(points))
