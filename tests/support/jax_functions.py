"""One function of both libraries, its arguments, and how results are compared: for the tests of the bridges."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

__all__ = ["JW", "JX", "W", "X", "close", "jax_f", "torch_f"]


def torch_f(w: Tensor, x: Tensor) -> Tensor:
    """w: [2, 3]; x: [3]; neither symmetric nor linear."""
    return torch.tanh(w @ x).square().sum() + (w[0] * x**3).sum()


def jax_f(w: Any, x: Any) -> Any:
    return jnp.square(jnp.tanh(w @ x)).sum() + (w[0] * x**3).sum()


W = torch.tensor([[0.1, -0.4, 0.7], [1.1, 0.3, -0.2]])
X = torch.tensor([0.5, -1.2, 0.8])
JW, JX = jnp.asarray(W.numpy()), jnp.asarray(X.numpy())


def close(got: Any, expected: Any) -> None:
    """Asserts that two trees of arrays or tensors have the same shapes and values, to float32's rounding."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert tuple(a.shape) == tuple(b.shape)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)
