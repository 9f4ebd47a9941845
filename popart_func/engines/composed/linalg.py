"""Linear algebra on small matrices: factorizations and solves, column by column, unrolled.

The number of operations grows with the size of a matrix, and so does the time that a kernel takes to compile: matrices
of more than `LARGEST` rows or columns are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func.engines.lane_scan import NotLoweredError

__all__ = ["LARGEST", "LINEAR_ALGEBRA"]

LARGEST = 24
"""The most rows or columns of a matrix that is factored or solved with."""


def _check(x: Tensor) -> None:
    if max(x.shape[-2:]) > LARGEST:
        raise NotLoweredError(f"a matrix of more than {LARGEST} rows or columns, got {list(x.shape[-2:])}")


def _no_errors(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-2], dtype=torch.int32, device=x.device)


# Triangular solves.


def _solve_lower(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    """``a⁻¹ b`` for a lower triangular ``a``, row by row."""
    rows: list[Tensor] = []
    for row in range(a.shape[-1]):
        right = b[..., row, :]
        for earlier, found in enumerate(rows):
            right = right - a[..., row, earlier, None] * found
        rows.append(right if unit else right / a[..., row, row, None])
    return torch.stack(torch.broadcast_tensors(*rows), -2) if rows else b


def _solve_triangular(a: Tensor, b: Tensor, upper: bool, left: bool = True, unit: bool = False) -> Tensor:
    _check(a)
    if not left:
        return _solve_triangular(a.mT, b.mT, not upper, unit=unit).mT
    if upper:
        return _solve_lower(a.flip(-1, -2), b.flip(-2), unit).flip(-2)
    return _solve_lower(a, b, unit)


def _triangular_solve(
    b: Tensor, a: Tensor, upper: bool = True, transpose: bool = False, unit: bool = False
) -> tuple[Tensor, Tensor]:
    matrix = a.mT if transpose else a
    solution = torch.linalg.solve_triangular(matrix, b, upper=upper != transpose, unitriangular=unit)
    return solution, a.expand(*solution.shape[:-2], *a.shape[-2:]).clone()


# Cholesky.


def _cholesky_of_lower(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of the lower half of a matrix; and the first leading minor that is not positive, or 0."""
    _check(x)
    size = x.shape[-1]
    columns: list[Tensor] = []
    info = _no_errors(x)
    for column in range(size):
        below = x[..., column:, column]
        for earlier in columns:
            below = below - earlier[..., column:] * earlier[..., column, None]
        pivot = below[..., :1]
        bad = ~(pivot[..., 0] > 0)
        info = torch.where((info == 0) & bad, column + 1, info).to(torch.int32)
        full = below / pivot.sqrt()
        full = torch.cat([pivot.sqrt(), full[..., 1:]], -1)
        columns.append(torch.constant_pad_nd(full, [column, 0]))
    return torch.stack(columns, -1) if columns else x.clone(), info


def _cholesky_ex(x: Tensor, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    factor, info = _cholesky_of_lower(x.mT if upper else x)
    return (factor.mT if upper else factor), info


def _cholesky(x: Tensor, upper: bool = False) -> Tensor:
    return torch.linalg.cholesky_ex(x, upper=upper).L


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    lower = factor.mH if upper else factor
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mH, half, upper=True)


def _identity(x: Tensor) -> Tensor:
    size = x.shape[-1]
    return torch.eye(size, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], size, size)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    return torch.cholesky_solve(_identity(factor), factor, upper)


# LU with partial pivoting.


def _lu(x: Tensor, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The packed factors ``L - 1 + U``, the row that each row is swapped with, from 0 on, and the permutation."""
    _check(x)
    rows, columns = x.shape[-2:]
    numbers = torch.arange(rows, device=x.device)
    order = numbers.expand(*x.shape[:-2], rows)
    swaps = []
    for step in range(min(rows, columns)):
        if pivot:
            best = x[..., step:, step].abs().argmax(-1, keepdim=True) + step
        else:
            best = torch.full((*x.shape[:-2], 1), step, device=x.device)
        swaps.append(best)
        source = torch.where(numbers == step, best, torch.where(numbers == best, step, numbers))
        order = order.gather(-1, source)
        x = x.gather(-2, source.unsqueeze(-1).expand(x.shape))
        diagonal = x[..., step, step, None]
        factors = torch.where(diagonal == 0, 0, x[..., step + 1 :, step] / diagonal)
        rest = x[..., step + 1 :, step + 1 :] - factors.unsqueeze(-1) * x[..., step, None, step + 1 :]
        below = torch.cat([x[..., step + 1 :, :step], factors.unsqueeze(-1), rest], -1)
        x = torch.cat([x[..., : step + 1, :], below], -2)
    pivots = torch.cat(swaps, -1) if swaps else torch.zeros((*x.shape[:-2], 0), dtype=torch.int64, device=x.device)
    return x, pivots, order


def _zero_pivot(lu: Tensor) -> Tensor:
    """The number, from 1 on, of the first pivot that is 0; 0 where there is none."""
    is_zero = lu.diagonal(dim1=-2, dim2=-1) == 0
    if not is_zero.shape[-1]:
        return _no_errors(lu)
    return torch.where(is_zero.any(-1), is_zero.to(torch.int32).argmax(-1) + 1, 0).to(torch.int32)


def _lu_factor_ex(x: Tensor, pivot: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    lu, pivots, _ = _lu(x, pivot)
    return lu, (pivots + 1).to(torch.int32), _zero_pivot(lu)


def _parts(lu: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, with ones on its diagonal, and the upper one."""
    rows, columns = lu.shape[-2:]
    size = min(rows, columns)
    ones = torch.eye(rows, size, dtype=lu.dtype, device=lu.device)
    return lu[..., :, :size].tril(-1) + ones, lu[..., :size, :].triu()


def _permutation(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix ``P`` of ``A = P L U``, for the row of A that became each row."""
    rows = order.shape[-1]
    return (torch.arange(rows, device=order.device).unsqueeze(-1) == order.unsqueeze(-2)).to(dtype)


def _linalg_lu(x: Tensor, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    lu, _, order = _lu(x, pivot)
    lower, upper = _parts(lu)
    return (_permutation(order, x.dtype) if pivot else x.new_zeros(0)), lower, upper


def _order_of(pivots: Tensor, rows: int) -> Tensor:
    """The row that became each row, from the swaps, which count from 1 on."""
    numbers = torch.arange(rows, device=pivots.device)
    order = numbers.expand(*pivots.shape[:-1], rows)
    for step in range(pivots.shape[-1]):
        best = pivots[..., step, None].long() - 1
        source = torch.where(numbers == step, best, torch.where(numbers == best, step, numbers))
        order = order.gather(-1, source)
    return order


def _lu_unpack(
    lu: Tensor, pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    _check(lu)
    lower, upper = _parts(lu) if unpack_data else (lu.new_zeros(0), lu.new_zeros(0))
    order = _permutation(_order_of(pivots, lu.shape[-2]), lu.dtype) if unpack_pivots else lu.new_zeros(0)
    return order, lower, upper


def _solve_with(lu: Tensor, order: Tensor, b: Tensor) -> Tensor:
    """``a⁻¹ b`` from a factorization of a."""
    shape = (*torch.broadcast_tensors(lu[..., 0, 0], b[..., 0, 0])[0].shape, *b.shape[-2:])
    b = b.expand(shape).gather(-2, order.unsqueeze(-1).expand(shape))
    half = torch.linalg.solve_triangular(lu, b, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(lu, half, upper=True)


def _lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, left: bool = True, adjoint: bool = False) -> Tensor:
    if not left:
        return torch.linalg.lu_solve(lu, pivots, b.mH, adjoint=not adjoint).mH
    if not b.numel():
        return b.clone()
    order = torch.lu_unpack(lu, pivots, unpack_data=False)[0].real.argmax(-2)
    if not adjoint:
        return _solve_with(lu, order, b)
    half = torch.linalg.solve_triangular(lu.mH, b, upper=False)
    solved = torch.linalg.solve_triangular(lu.mH, half, upper=True, unitriangular=True)
    return solved.gather(-2, order.argsort(-1).unsqueeze(-1).expand(solved.shape))


def _solve_ex(
    a: Tensor, b: Tensor, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    is_vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if is_vector else b
    lu, pivots, order = _lu(a)
    if not right.numel():
        solution = torch.zeros_like(right)
    elif left:
        solution = _solve_with(lu, order, right)
    else:
        solution = torch.linalg.lu_solve(lu, (pivots + 1).to(torch.int32), right, left=False)
    solution = solution.squeeze(-1) if is_vector else solution
    return solution, lu, (pivots + 1).to(torch.int32), _zero_pivot(lu)


def _inv_ex(x: Tensor, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return x.clone(), _no_errors(x)
    lu, _, order = _lu(x)
    return _solve_with(lu, order, _identity(x)), _zero_pivot(lu)


def _sign_of(pivots: Tensor, dtype: torch.dtype) -> Tensor:
    """The sign of the permutation that swaps, from 0 on, make."""
    numbers = torch.arange(pivots.shape[-1], device=pivots.device)
    odd = (pivots != numbers).long().sum(-1) % 2
    return (1 - 2 * odd).to(dtype)


def _det(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lu, pivots, _ = _lu(x)
    product = lu.diagonal(dim1=-2, dim2=-1).prod(-1)
    return product * _sign_of(pivots, x.dtype), lu, (pivots + 1).to(torch.int32)


def _slogdet(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lu, pivots, _ = _lu(x)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    sign = diagonal.sign().prod(-1) * _sign_of(pivots, x.dtype)
    return sign, diagonal.abs().log().sum(-1), lu, (pivots + 1).to(torch.int32)


# QR by Householder's reflections.


def _householder_product(vectors: Tensor, factors: Tensor) -> Tensor:
    """The first columns of ``H_1 H_2 ...``, where ``H_i = 1 - factor_i v_i v_iᵀ``; v_i has 1 at i and zeros above."""
    _check(vectors)
    rows, columns = vectors.shape[-2:]
    result = torch.eye(rows, columns, dtype=vectors.dtype, device=vectors.device)
    result = result.expand(vectors.shape)
    for step in reversed(range(factors.shape[-1])):
        result = _reflected(result, _vector(vectors, step), factors[..., step, None, None])
    return result


def _vector(vectors: Tensor, step: int) -> Tensor:
    column = torch.constant_pad_nd(vectors[..., step + 1 :, step], [1, 0], 1.0)
    return torch.constant_pad_nd(column, [step, 0])


def _reflected(x: Tensor, vector: Tensor, factor: Tensor) -> Tensor:
    along = (vector.unsqueeze(-1) * x).sum(-2, keepdim=True)
    return x - factor * vector.unsqueeze(-1) * along


def _geqrf(x: Tensor) -> tuple[Tensor, Tensor]:
    """The packed form of LAPACK: R above, and Householder's vectors below the diagonal; and their factors."""
    _check(x)
    factors = []
    size = min(x.shape[-2:])
    for step in range(size):
        head, tail = x[..., step, step], x[..., step + 1 :, step]
        below = (tail * tail).sum(-1)
        is_done = below == 0
        length = torch.sqrt(head * head + below)
        beta = torch.where(head >= 0, -length, length)
        factor = torch.where(is_done, 0, (beta - head) / torch.where(is_done, 1, beta))
        scale = torch.where(is_done, 1, head - beta)
        tail = tail / scale.unsqueeze(-1)
        vector = torch.constant_pad_nd(torch.constant_pad_nd(tail, [1, 0], 1.0), [step, 0])
        rest = _reflected(x[..., step + 1 :], vector, factor[..., None, None])
        on = torch.where(is_done, head, beta).unsqueeze(-1)
        column = torch.cat([x[..., :step, step], on, tail], -1)
        x = torch.cat([x[..., :step], column.unsqueeze(-1), rest], -1)
        factors.append(factor)
    stacked = torch.stack(factors, -1) if factors else x.new_zeros((*x.shape[:-2], 0))
    return x, stacked


def _qr(x: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    size = min(rows, columns)
    packed, factors = _geqrf(x)
    height = rows if mode == "complete" else size
    upper = packed[..., :height, :].triu()
    if mode == "r":
        return x.new_zeros(0), packed[..., :size, :].triu()
    vectors = packed[..., :, :size]
    if height > size:
        vectors = torch.constant_pad_nd(vectors, [0, height - size])
    return _householder_product(vectors, factors), upper


def _ormqr(vectors: Tensor, factors: Tensor, x: Tensor, left: bool = True, transpose: bool = False) -> Tensor:
    rows, count = vectors.shape[-2], factors.shape[-1]
    columns = torch.constant_pad_nd(vectors[..., :count], [0, rows - count])
    matrix = torch.linalg.householder_product(columns, factors)
    matrix = matrix.mH if transpose else matrix
    return matrix @ x if left else x @ matrix


LINEAR_ALGEBRA: dict[str, Callable[..., Any]] = {
    "linalg_solve_triangular": lambda a, b, upper, left=True, unit=False: _solve_triangular(a, b, upper, left, unit),
    "triangular_solve": _triangular_solve,
    "linalg_cholesky_ex": _cholesky_ex,
    "cholesky": _cholesky,
    "cholesky_solve": _cholesky_solve,
    "cholesky_inverse": _cholesky_inverse,
    "linalg_lu_factor_ex": _lu_factor_ex,
    "linalg_lu": _linalg_lu,
    "lu_unpack": _lu_unpack,
    "linalg_lu_solve": _lu_solve,
    "_linalg_solve_ex": _solve_ex,
    "linalg_inv_ex": _inv_ex,
    "_linalg_det": _det,
    "_linalg_slogdet": _slogdet,
    "linalg_qr": _qr,
    "linalg_householder_product": _householder_product,
    "ormqr": _ormqr,
}
"""Linear algebra, by its name in ATen."""
