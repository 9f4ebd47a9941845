"""Where a PyTorch function stops gradients, JAX stops them too: `.detach()`, `torch.no_grad`, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
import torch
from jax_functions import JX, X, close
from torch import Tensor
from torch.func import grad, jacrev, vmap

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.interop.jax import to_jax_function


def within(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.square().sum()
    return scale * x


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x**2


def enabled_again(x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            followed = x**2
        constant = x * 3
    return followed * x + constant * x


def switched(x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = x**2
    return scale * x


def written_within(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros_like(x)
        y.add_(x)
        y[0] = x[1]
        y[1:].mul_(3)
    return y * x


def written_after(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros_like(x)
    y[0] = x[1]
    return y * x


def mask_written_within(x: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask.logical_not_()
    return x * mask


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x.detach() * x,
    "torch.detach": lambda x: torch.detach(x) ** 2 * x,
    "detach of a copy that is written to": lambda x: x.detach().clone().mul_(2) * x,
    "no_grad": within,
    "no_grad as a decorator": lambda x: decorated(x) * x,
    "enable_grad within no_grad": enabled_again,
    "set_grad_enabled": switched,
    "written to within no_grad": written_within,
    "written to after no_grad": written_after,
    "a mask written to within no_grad": mask_written_within,
    "detach within grad": lambda x: grad(lambda y: (y.detach() * y**2).sum())(x) * x,
    "detach within vmap": lambda x: vmap(lambda y: y.detach() * y)(x),
}


@pytest.mark.parametrize("name", STOPS)
def test_gradients_stop_under_every_transform(name: str) -> None:
    function = STOPS[name]

    def loss(x: Tensor) -> Tensor:
        return (function(x) * torch.tensor([0.5, -1.0, 2.0])).sum()

    jax_loss, lanes, jax_lanes = to_jax_function(loss), torch.stack([X, 2 * X]), jnp.stack([JX, 2 * JX])
    expected = grad(loss)(X)
    close(to_jax_function(function)(JX), function(X))
    close(jax.jit(jax.grad(jax_loss))(JX), expected)
    close(jax.jit(lambda x: jax.jvp(jax_loss, (x,), (jnp.ones(3),))[1])(JX), expected.sum())
    close(jax.jit(jax.vmap(jax.grad(jax_loss)))(jax_lanes), vmap(grad(loss))(lanes))
    close(jax.jit(to_jax_function(vmap(grad(loss))))(jax_lanes), vmap(grad(loss))(lanes))
    close(jax.jit(jax.jacrev(to_jax_function(grad(loss))))(JX), jacrev(grad(loss))(X))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_without_a_graph_is_a_constant(create_graph: bool) -> None:
    def loss(x: Tensor) -> Tensor:
        leaf = (x * 1).requires_grad_()
        first, unused = torch.autograd.grad(
            (leaf**3).sum(), (leaf, torch.ones(1, requires_grad=True)), create_graph=create_graph, allow_unused=True
        )
        assert unused is None
        return (first * x).sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    close(expected, (9 if create_graph else 3) * X**2)
    close(jax.grad(to_jax_function(loss))(JX), expected)
    close(jax.vmap(jax.grad(to_jax_function(loss)))(JX[None])[0], expected)


def test_data_stops_gradients_at_every_level() -> None:
    """PyTorch's own stops only the innermost of nested transforms."""
    loss = lambda x: (x.data * x).sum()  # noqa: E731
    close(jax.grad(to_jax_function(loss))(JX), grad(loss)(X))
    close(jax.hessian(to_jax_function(loss))(JX), torch.zeros(3, 3))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_trace_does_not_depend_on_where_the_first_call_is(around: Callable[[], torch.no_grad]) -> None:
    """A graph is kept: gradients that the caller has switched off must not be off for ever."""

    def function(x: Tensor) -> Tensor:
        return enabled_again(x).sum() + grad(lambda y: (y**3).sum())(x).sum() + (x**3).sum()

    with around():
        got = jax.grad(to_jax_function(function))(JX)
    close(got, grad(function)(X))


def through(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        write(y)
        return y

    return function


def add_one_without_gradient(y: Tensor) -> None:
    with torch.no_grad():
        y += 1


def write_to_a_view_without_gradient(y: Tensor) -> None:
    with torch.no_grad():
        y.view(3, 1)[1:].mul_(2)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda y: y.detach().mul_(2), "`mul_` writes to a detached tensor, and in PyTorch through it to the one"),
        (lambda y: y.data[1:].mul_(2), "`mul_` writes to a detached tensor"),
        (lambda y: y.detach().__setitem__(0, 1.0), "`__setitem__` writes to a detached tensor"),
        (lambda y: torch.nn.functional.relu(y.detach(), inplace=True), "`relu` writes to a detached tensor"),
        (lambda y: vmap(lambda row: row.detach().mul_(2))(y[None]), "`mul_` writes to a detached tensor"),
        (lambda y: setattr(y, "data", y * 2), "`.data = ` can't be traced"),
        (lambda y: y.detach_(), r"use `.detach\(\)`"),
        (add_one_without_gradient, "`add_` within torch.no_grad writes to a tensor from outside of it"),
        (write_to_a_view_without_gradient, "`mul_` writes to a detached tensor"),
    ],
)
def test_writing_through_a_detached_tensor_is_refused(write: Callable[[Tensor], object], message: str) -> None:
    """In PyTorch it changes the tensor that it was detached from; a mark is a copy, in which it would be lost."""
    with pytest.raises(UnsupportedError, match=message):
        to_jax_function(through(write))(JX)
