"""Random vectors and matrices: orthogonal matrices, and normal vectors of a given covariance.

They factor a matrix by LAPACK, as JAX does. Its last bits depend on the library: numbers are JAX's to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popart_func._typing import Float, Integer
from popart_func.random._arguments import as_shape, check_draw
from popart_func.random.basic import normal

__all__ = ["multivariate_normal", "orthogonal"]


def orthogonal(
    key: Integer[Tensor, "2"],
    n: int,
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    m: int | None = None,
) -> Float[Tensor, "... n m"]:
    """Random orthogonal matrices, float32: `jax.random.orthogonal`.

    Args:
        key: the key.
        n: the number of rows.
        shape: of the batch of matrices.
        dtype: float32.
        m: the number of columns, n by default. Columns are orthonormal, or rows if there are fewer of them.

    >>> from popart_func.random import key
    >>> matrix = orthogonal(key(0), 3)
    >>> torch.allclose(matrix @ matrix.mT, torch.eye(3), atol=1e-6)
    True
    """
    check_draw("orthogonal", key, dtype)
    m = n if m is None else m
    shape = as_shape("orthogonal", (*shape, max(n, m), min(n, m)))
    q, r = torch.linalg.qr(normal(key, shape))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.mT if n < m else q


def multivariate_normal(
    key: Integer[Tensor, "2"],
    mean: Float[Tensor, "... n"],
    cov: Float[Tensor, "... n n"],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    method: str = "cholesky",
) -> Float[Tensor, "... n"]:
    """Normal vectors of a mean and a covariance, float32: `jax.random.multivariate_normal`.

    Args:
        key: the key.
        mean: means along the last axis.
        cov: positive definite matrices in the last two axes.
        shape: the result's without the last axis, to which the batches of ``mean`` and ``cov`` broadcast.
        dtype: float32.
        method: ``"cholesky"``. JAX's ``"eigh"`` and ``"svd"`` have factors whose signs depend on the library.

    >>> from popart_func.random import key
    >>> multivariate_normal(key(0), torch.tensor([0.0, 10.0]), torch.eye(2))
    tensor([ 1.6226, 12.0253])
    """
    check_draw("multivariate_normal", key, dtype)
    if method != "cholesky":
        raise ValueError(f"multivariate_normal: `method` must be 'cholesky', got {method!r}.")
    for name, tensor, axes in (("mean", mean, 1), ("cov", cov, 2)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.ndim < axes:
            raise TypeError(f"multivariate_normal: `{name}` must be a float32 tensor of at least {axes} axes.")
    size = mean.shape[-1]
    if cov.shape[-2:] != (size, size):
        raise ValueError(
            f"multivariate_normal: `cov` must end in {(size, size)} for a mean of {size}, got {tuple(cov.shape)}."
        )
    batch = tuple(torch.broadcast_shapes(mean.shape[:-1], cov.shape[:-2]))
    shape = batch if shape is None else as_shape("multivariate_normal", shape)
    if torch.broadcast_shapes(batch, shape) != shape:
        raise ValueError(f"multivariate_normal: `mean` and `cov` must broadcast to `shape`, got {batch} for {shape}.")
    factor = torch.linalg.cholesky_ex(cov).L
    return mean + (factor @ normal(key, (*shape, size)).unsqueeze(-1)).squeeze(-1)
