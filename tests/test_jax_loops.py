"""Loops inside a function that becomes JAX's: JAX's own loops, which it jits, differentiates and maps."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optree
import pytest
from loop_programs import MANY, PARAMS, PROGRAMS, XS, H, W, gradient_inside, nested, recurrent
from torch.func import grad, vmap

from popart_func.interop.jax import to_jax_function


def arrays(tree: Any) -> Any:
    """Float32, since JAX's 64-bit types are off here."""
    return optree.tree_map(
        lambda leaf: jax.numpy.asarray(leaf.float().numpy() if leaf.is_floating_point() else leaf.numpy()), tree
    )


def floats(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, tree)


def close(got: Any, expected: Any) -> None:
    for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), other.numpy(), rtol=2e-4, atol=2e-5)


TABLE = ("scan", "scan in reverse, grad", "while_loop, vmap", "while_loop, jvp", "cond, vmap of grad", "cond")


@pytest.mark.parametrize("name", TABLE)
def test_jax_computes_what_python_does(name: str):
    function, arguments = PROGRAMS[name]
    if name.startswith("scan"):  # which weighs by integers, and float64 would come of them
        arguments = floats(arguments)
    with jax.enable_x64(True):
        given = optree.tree_map(lambda leaf: jax.numpy.asarray(leaf.numpy()), arguments)
        close(jax.jit(to_jax_function(function))(*given), function(*arguments))


def test_jax_differentiates_and_maps_loops():
    with jax.enable_x64(True):
        given = optree.tree_map(lambda leaf: jax.numpy.asarray(leaf.numpy()), (PARAMS, W, H, XS, MANY))
        params, w, h, xs, many = given
        close(jax.grad(to_jax_function(gradient_inside))(params, h, xs), grad(gradient_inside)(PARAMS, H, XS))
        mapped = jax.jit(jax.vmap(jax.grad(to_jax_function(nested)), (None, 0, None)))
        close(mapped(w, many, xs), vmap(grad(nested), (None, 0, None))(W, MANY, XS))


def test_a_loop_is_jaxs_own():
    text = str(jax.make_jaxpr(to_jax_function(recurrent))(*arrays((W, H, XS))))
    assert text.count("scan[") == 1
    assert "tanh" in text
