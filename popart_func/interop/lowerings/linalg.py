"""Lowerings of linear algebra and Fourier transforms; `table` says how an op is called.

A matrix that PyTorch refuses as singular or not positive definite gives infinities and NaN, as in JAX. The error codes
that PyTorch's ops return are always 0.
"""

from __future__ import annotations

import functools
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


def _mirrored(x: Any, upper: bool = False) -> Any:
    """The symmetric matrix that has this triangle. As in PyTorch, its derivative is that of the symmetric part."""
    triangle = jnp.triu(x) if upper else jnp.tril(x)
    strict = jnp.triu(x, 1) if upper else jnp.tril(x, -1)
    part = (x + jnp.conj(_transposed(x))) / 2
    return jax.lax.stop_gradient(triangle + jnp.conj(_transposed(strict)) - part) + part


def _factored(x: Any) -> list[Any]:
    """The LU decomposition, and the row that each row was exchanged with, counted from 1."""
    lu, pivots, _ = jax.lax.linalg.lu(x)
    return [lu, pivots + 1]


def _from_pivots(pivots: Any, rows: int) -> Any:
    """The order of the rows after PyTorch's exchanges, which are counted from 1."""
    return jax.lax.linalg.lu_pivots_to_permutation(pivots.astype(jnp.int32) - 1, rows)


def _lu_factor(outs: Any, x: Any, pivot: bool = True, *_: Any) -> list[Any]:
    if not pivot:
        raise NotImplementedError("pivot=False")
    return [*_factored(x), _success(outs[2])]


def _lu_parts(lu: Any, pivots: Any) -> list[Any]:
    rows, columns = lu.shape[-2:]
    least = min(rows, columns)
    lower = jnp.tril(lu[..., :least], -1) + jnp.eye(rows, least, dtype=lu.dtype)
    order = _from_pivots(pivots, rows)
    exchange = (jnp.arange(rows)[:, None] == order[..., None, :]).astype(lu.dtype)
    return [exchange, lower, jnp.triu(lu[..., :least, :])]


def _lu(outs: Any, x: Any, pivot: bool = True) -> list[Any]:
    if not pivot:
        raise NotImplementedError("pivot=False")
    return _lu_parts(*_factored(x))


def _lu_unpack(outs: Any, lu: Any, pivots: Any, data: bool = True, with_pivots: bool = True) -> list[Any]:
    wanted = (with_pivots, data, data)
    parts = zip(_lu_parts(lu, pivots), wanted, outs, strict=True)
    return [part if is_wanted else jnp.zeros(out.shape) for part, is_wanted, out in parts]


def _householder(out: TensorSpec, x: Any, scales: Any) -> Any:
    """The product of reflections, whose vectors are the columns below a diagonal of ones.

    `jax.lax.linalg.householder_product` has no derivative.
    """
    rows, columns, count = x.shape[-2], x.shape[-1], scales.shape[-1]
    places = jnp.arange(rows)[:, None]

    def reflect(product: Any, position: Any) -> Any:
        column = jnp.take_along_axis(x, jnp.full((*x.shape[:-1], 1), position), -1)
        vector = jnp.where(places > position, column, (places == position).astype(x.dtype))
        scale = jnp.take(scales, position, -1)[..., None, None]
        row = jnp.matmul(jnp.conj(_transposed(vector)), product, precision=jax.lax.Precision.HIGHEST)
        return product - scale * vector * row, None

    start = jnp.broadcast_to(jnp.eye(rows, columns, dtype=x.dtype), x.shape)
    return jax.lax.scan(reflect, start, jnp.arange(count), reverse=True)[0]


def _pseudoinverse(out: TensorSpec, x: Any, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> Any:
    """The pseudoinverse: singular values of at most ``max(atol, rtol * largest)`` count as 0."""
    if 0 in x.shape:
        return jnp.zeros(out.shape, x.dtype)
    least = jnp.zeros(1) if atol is None else jnp.asarray(atol)[..., None]
    share = jnp.where(least > 0, 0, max(x.shape[-2:]) * jnp.finfo(x.dtype).eps)
    share = share if rtol is None else jnp.asarray(rtol)[..., None]
    # As in PyTorch, the derivative is that of the whole matrix.
    x = x + jax.lax.stop_gradient(_mirrored(x) - x) if hermitian else x
    return _inverted(x, least.astype(x.real.dtype), share.astype(x.real.dtype))


@jax.custom_jvp
def _inverted(x: Any, least: Any, share: Any) -> Any:
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    bound = jnp.maximum(least, share * values[..., :1])
    inverse = jnp.where(values > bound, 1 / jnp.where(values > bound, values, 1), 0)
    return jnp.matmul(
        jnp.conj(_transposed(right)) * inverse[..., None, :].astype(x.dtype),
        jnp.conj(_transposed(left)),
        precision=jax.lax.Precision.HIGHEST,
    )


@_inverted.defjvp
def _inverted_slope(primals: Any, tangents: Any) -> Any:
    """Golub and Pereyra, 1973, equation 4.12; it does not divide by differences of singular values."""
    x, change = primals[0], tangents[0]
    inverse = _inverted(*primals)
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    adjoint = lambda part: jnp.conj(_transposed(part))  # noqa: E731
    rows, columns = jnp.eye(x.shape[-2], dtype=x.dtype), jnp.eye(x.shape[-1], dtype=x.dtype)
    slope = -multiply(multiply(inverse, change), inverse)
    slope += multiply(multiply(multiply(inverse, adjoint(inverse)), adjoint(change)), rows - multiply(x, inverse))
    slope += multiply(multiply(columns - multiply(inverse, x), adjoint(change)), multiply(adjoint(inverse), inverse))
    return inverse, slope


def _eigen(outs: Any, x: Any) -> list[Any]:
    values, vectors = jax.lax.linalg.eig(x, compute_left_eigenvectors=False, enable_eigvec_derivs=True)
    return [values, vectors]


def _inverse(outs: Any, x: Any, *_: Any) -> list[Any]:
    return [jnp.linalg.inv(x), _success(outs[1])]


def _cholesky(outs: Any, x: Any, upper: bool = False, *_: Any) -> list[Any]:
    lower = jnp.linalg.cholesky(_mirrored(x, upper), symmetrize_input=False)
    return [jnp.conj(_transposed(lower)) if upper else lower, _success(outs[1])]


def _solve(outs: Any, x: Any, y: Any, left: bool = True, *_: Any) -> list[Any]:
    is_vector = y.ndim == x.ndim - 1 and outs[0].shape == y.shape
    columns = y[..., None] if is_vector else y
    solution = jnp.linalg.solve(x, columns) if left else _transposed(jnp.linalg.solve(_transposed(x), _transposed(y)))
    return [solution.reshape(outs[0].shape), *_factored(x), _success(outs[3])]


def _solve_triangular(
    out: TensorSpec, x: Any, y: Any, upper: bool = False, left: bool = True, unitriangular: bool = False
) -> Any:
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (jnp.broadcast_to(part, (*batch, *part.shape[-2:])) for part in (x, y))
    return jax.lax.linalg.triangular_solve(x, y, left_side=left, lower=not upper, unit_diagonal=unitriangular)


def _svd(outs: Any, x: Any, full: bool = False, with_vectors: bool = True, *_: Any) -> list[Any]:
    if with_vectors:
        return list(jnp.linalg.svd(x, full_matrices=full))
    return [jnp.zeros(outs[0].shape), jnp.linalg.svd(x, compute_uv=False), jnp.zeros(outs[2].shape)]


def _eigh(outs: Any, x: Any, triangle: str = "L", with_vectors: bool = True) -> list[Any]:
    values, vectors = jnp.linalg.eigh(_mirrored(x, triangle == "U"), symmetrize_input=False)
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
    "_linalg_det": lambda outs, x: [jnp.linalg.det(x) if x.size else jnp.ones(outs[0].shape), *_factored(x)],
    "_linalg_slogdet": lambda outs, x: [*jnp.linalg.slogdet(x), *_factored(x)],
    "_linalg_svd": _svd,
    "_linalg_eigh": _eigh,
    "linalg_matrix_exp": lambda out, x: jax.scipy.linalg.expm(x),
    "_fft_r2c": _fourier_of_real,
    "_fft_c2c": _fourier_of_complex,
    "_fft_c2r": _fourier_to_real,
    "linalg_lu_factor_ex": _lu_factor,
    "linalg_lu": _lu,
    "lu_unpack": _lu_unpack,
    "linalg_householder_product": _householder,
    "linalg_pinv": _pseudoinverse,
    "linalg_eig": _eigen,
    "_linalg_eigvals": lambda out, x: jnp.linalg.eigvals(x),
    "linalg_qr": lambda outs, x, mode="reduced": list(jnp.linalg.qr(x, mode)),
}
"""Every op of linear algebra, by its name in ATen."""
