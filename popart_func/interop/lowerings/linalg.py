"""Lowerings of linear algebra and Fourier transforms; `table` says how an op is called.

A matrix that PyTorch refuses as singular or not positive definite gives infinities and NaN, as in JAX. The error codes
that PyTorch's ops return are always 0.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering

__all__ = ["LINALG"]


def _success(out: TensorSpec) -> Any:
    return jnp.zeros(out.shape, jnp.int32)


def _transposed(x: Any) -> Any:
    return jnp.swapaxes(x, -1, -2)


def _factored(x: Any) -> list[Any]:
    """The LU decomposition, and the row that each row was exchanged with, counted from 1."""
    lu, pivots, _ = jax.lax.linalg.lu(x)
    return [lu, pivots + 1]


def _inverse(outs: Any, x: Any, *_: Any) -> list[Any]:
    return [jnp.linalg.inv(x), _success(outs[1])]


def _cholesky(outs: Any, x: Any, upper: bool = False, *_: Any) -> list[Any]:
    lower = jnp.linalg.cholesky(x, symmetrize_input=False)
    return [jnp.conj(_transposed(lower)) if upper else lower, _success(outs[1])]


def _solve(outs: Any, x: Any, y: Any, left: bool = True, *_: Any) -> list[Any]:
    is_vector = y.ndim == x.ndim - 1 and outs[0].shape == y.shape
    columns = y[..., None] if is_vector else y
    solution = jnp.linalg.solve(x, columns) if left else _transposed(jnp.linalg.solve(_transposed(x), _transposed(y)))
    return [solution.reshape(outs[0].shape), *_factored(x), _success(outs[3])]


def _solve_triangular(
    out: TensorSpec, x: Any, y: Any, upper: bool = False, left: bool = True, unitriangular: bool = False
) -> Any:
    return jax.lax.linalg.triangular_solve(x, y, left_side=left, lower=not upper, unit_diagonal=unitriangular)


def _svd(outs: Any, x: Any, full: bool = False, with_vectors: bool = True, *_: Any) -> list[Any]:
    if with_vectors:
        return list(jnp.linalg.svd(x, full_matrices=full))
    return [jnp.zeros(outs[0].shape), jnp.linalg.svd(x, compute_uv=False), jnp.zeros(outs[2].shape)]


def _eigh(outs: Any, x: Any, triangle: str = "L", with_vectors: bool = True) -> list[Any]:
    values, vectors = jnp.linalg.eigh(x, UPLO=triangle, symmetrize_input=False)
    return [values, vectors if with_vectors else jnp.zeros(outs[1].shape)]


def _fourier(x: Any, axes: Any, normalization: int, transform: Any, **options: Any) -> Any:
    """A Fourier transform, scaled as PyTorch does: by 1, 1 / sqrt(n) or 1 / n. JAX's must not scale it."""
    result = transform(x, axes=tuple(axes), **options)
    size = result if transform is jnp.fft.irfftn else x
    count = math.prod(size.shape[axis] for axis in axes)
    return result / count ** (normalization / 2)


def _fourier_of_real(out: TensorSpec, x: Any, axes: Any, normalization: int, one_sided: bool) -> Any:
    return _fourier(x, axes, normalization, jnp.fft.rfftn if one_sided else jnp.fft.fftn)


def _fourier_of_complex(out: TensorSpec, x: Any, axes: Any, normalization: int, forward: bool) -> Any:
    if forward:
        return _fourier(x, axes, normalization, jnp.fft.fftn)
    return _fourier(x, axes, normalization, jnp.fft.ifftn, norm="forward")


def _fourier_to_real(out: TensorSpec, x: Any, axes: Any, normalization: int, _: int) -> Any:
    sizes = tuple(out.shape[axis] for axis in axes)
    return _fourier(x, axes, normalization, jnp.fft.irfftn, s=sizes, norm="forward")


LINALG: dict[str, Lowering] = {
    "linalg_inv_ex": _inverse,
    "linalg_cholesky_ex": _cholesky,
    "_linalg_solve_ex": _solve,
    "linalg_solve_triangular": _solve_triangular,
    "_linalg_det": lambda outs, x: [jnp.linalg.det(x), *_factored(x)],
    "_linalg_slogdet": lambda outs, x: [*jnp.linalg.slogdet(x), *_factored(x)],
    "_linalg_svd": _svd,
    "_linalg_eigh": _eigh,
    "linalg_matrix_exp": lambda out, x: jax.scipy.linalg.expm(x),
    "_fft_r2c": _fourier_of_real,
    "_fft_c2c": _fourier_of_complex,
    "_fft_c2r": _fourier_to_real,
    "linalg_qr": lambda outs, x, mode="reduced": list(jnp.linalg.qr(x, mode)),
}
"""Every op of linear algebra, by its name in ATen."""
