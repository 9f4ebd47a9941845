"""Arguments of a JAX function that are not tensors: flags, names and sizes reach the PyTorch function as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

from popart_func.interop.jax import to_jax_function

X = jnp.array([1.0, 2.0])


def scaled(x: Tensor, twice: bool = False, *, by: str = "nothing") -> Tensor:
    assert isinstance(twice, bool)
    return (2 * x if twice else x) * {"nothing": 1, "ten": 10}[by]


def raised(x: Tensor, power: Any, shift: Any = 0) -> Tensor:
    for _ in range(power):
        x = x * x
    return x + shift


def test_bools_and_strings_are_static() -> None:
    f = to_jax_function(scaled)
    for twice in (True, False, True):
        for by in ("nothing", "ten"):
            expected = X * (2 if twice else 1) * (10 if by == "ten" else 1)
            assert (f(X, twice, by=by) == expected).all()
            assert (f(X, twice=twice, by=by) == expected).all()
            assert (jax.jit(f, static_argnames=("twice", "by"))(X, twice, by=by) == expected).all()
    assert (jax.grad(lambda x: f(x, True).sum())(X) == 2).all()
    nested = to_jax_function(lambda options: -options["x"] if options["flip"] else options["x"])
    assert (nested({"x": X, "flip": True}) == -X).all()
    assert (nested({"x": X, "flip": False}) == X).all()


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(f, static_argnames="power")])
def test_named_arguments_are_static(wrap: Callable[..., Any]) -> None:
    f = wrap(to_jax_function(raised, static_argnames="power"))
    assert (f(X, 1) == X**2).all()
    assert (f(X, 2, 1.0) == X**4 + 1).all()
    assert (f(X, shift=jnp.array(3.0), power=3) == X**8 + 3).all()


def test_arguments_are_known_by_position_after_stars_and_in_modules() -> None:
    def total(x: Tensor, *more: Tensor, power: Any) -> Any:
        return raised(x + sum(more), power)

    class Raised(torch.nn.Module):
        def forward(self, x: Tensor, power: Any) -> Any:
            return raised(x, power)

    assert (to_jax_function(total, static_argnames="power")(X, X, X, X, power=1) == (4 * X) ** 2).all()
    assert (to_jax_function(Raised(), static_argnames="power")(X, 1) == X**2).all()
    with pytest.raises(ValueError, match=r"\['x', 'power'\], got \['more'\]"):
        to_jax_function(total, static_argnames=("more", "power"))


def test_values_that_python_takes_for_equal_are_told_apart() -> None:
    seen: list[str] = []
    f = to_jax_function(lambda x, kind: seen.append(repr(kind)) or x, static_argnames=["kind"])  # type: ignore[func-returns-value]
    kinds = [1, 1.0, True, 0.0, -0.0, (1,), (True,), None, torch.tanh]
    for kind in (*kinds, *kinds):
        f(X, kind)
    assert seen == list(map(repr, kinds))


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"`static_argnames` must name .*\['x', 'power', 'shift'\], got \['times'\]"):
        to_jax_function(raised, static_argnames=("power", "times"))
    f = to_jax_function(raised, static_argnames="power")
    with pytest.raises(TypeError, match="the static argument 'power' must be hashable, got list: give a tuple"):
        f(X, [1])
    with pytest.raises(TypeError, match=r"the static argument 'power' is traced by JAX: .* static_argnames of jax.jit"):
        jax.jit(f)(X, 1)
    with pytest.raises(TypeError, match=r"got function at \[1\]\. Name the argument in static_argnames"):
        to_jax_function(lambda x, f: f(x))(X, lambda x: x)
