"""Ops that the native engine composes of simpler ones, and special functions: cases by family, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["FAMILIES", "SHAPES", "gradients"]

SHAPES = {"x": (2, 4, 6, 7), "y": (2, 4, 9), "w": (4, 2, 3, 2), "grid": (2, 3, 5, 2)}
"""The arguments of every family."""

Cases = dict[str, Tensor]


def gradients(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """The value of a function and its gradients in all arguments, in one vector; each result has another weight."""

    def loss(*given: Tensor) -> tuple[Tensor, Tensor]:
        value = function(*given)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
        return (value * weights).sum(), value

    slopes, value = torch.func.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
    return torch.cat([part.reshape(-1) for part in (value, *slopes)])


def convolutions(x: Tensor, y: Tensor, w: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]; w: [4, 2, 3, 2]."""
    bias = w[:, 0, 0, 0]
    volume = x.reshape(2, 2, 2, 6, 7)
    cube = w.reshape(4, 2, 1, 3, 2)
    line = w[:, :, :, 0]
    return {
        "1d": gradients(lambda y, w: F.conv1d(y[:, :2], w, stride=2, padding=1), y, line),
        "1d groups": gradients(lambda y, w, b: F.conv1d(y, w, b, dilation=2, groups=2), y, line, bias),
        "2d": gradients(lambda x, w, b: F.conv2d(x[:, :2], w, b), x, w, bias),
        "2d strides": gradients(lambda x, w: F.conv2d(x, w, stride=(2, 3), padding=(2, 1), groups=2), x, w),
        "2d dilation": gradients(lambda x, w: F.conv2d(x, w, padding="same", dilation=2, groups=2), x, w),
        "3d": gradients(lambda x, w: F.conv3d(x, w, stride=(1, 2, 1), padding=(0, 1, 1)), volume, cube),
        "transposed 1d": gradients(lambda y, w: F.conv_transpose1d(y, w, stride=2, output_padding=1), y, line),
        "transposed 2d": gradients(
            lambda x, w: F.conv_transpose2d(x, w, stride=(2, 1), padding=1, groups=2, dilation=(1, 2)), x, w
        ),
        "transposed uneven": gradients(
            lambda x, w: F.conv_transpose2d(x, w, dilation=2, output_padding=1, padding=2), x, w
        ),
        "transposed by one": gradients(lambda x, w: F.conv_transpose2d(x, w, padding=(1, 0)), x, w),
    }


def pools(x: Tensor, y: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]."""
    volume = x.reshape(2, 2, 2, 6, 7)
    return {
        "max 1d": gradients(lambda y: F.max_pool1d(y, 3, 2, padding=1), y),
        "max 2d": gradients(lambda x: F.max_pool2d(x, 2), x),
        "max 2d overlapping": gradients(lambda x: F.max_pool2d(x, 3, 2, padding=1, ceil_mode=True), x),
        "max 2d indices": F.max_pool2d(x, (2, 3), 1, dilation=2, return_indices=True)[1],
        "max 2d of nothing": F.max_pool2d(x * 0 - torch.inf, 3, 2, padding=1, return_indices=True)[1],
        "max 3d": gradients(lambda x: F.max_pool3d(x, 2, stride=1), volume),
        "average 1d": gradients(lambda y: F.avg_pool1d(y, 3, 2, padding=1), y),
        "average 2d": gradients(lambda x: F.avg_pool2d(x, 2), x),
        "average 2d without padding": gradients(
            lambda x: F.avg_pool2d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False), x
        ),
        "average 3d": gradients(lambda x: F.avg_pool3d(x, 2, 1, divisor_override=3), volume),
        "adaptive average 1d": gradients(lambda y: F.adaptive_avg_pool1d(y, 4), y),
        "adaptive average 2d": gradients(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), x),
        "adaptive average 3d": gradients(lambda x: F.adaptive_avg_pool3d(x, (1, 4, 3)), volume),
        "adaptive max 1d": gradients(lambda y: F.adaptive_max_pool1d(y, 4), y),
        "adaptive max 2d": gradients(lambda x: F.adaptive_max_pool2d(x, (4, 3)), x),
        "unfold": gradients(lambda x: F.unfold(x, (2, 3), dilation=2, padding=1, stride=2), x),
        "fold": gradients(lambda y: F.fold(y.reshape(1, 8, 9), (6, 6), (2, 2), stride=2), y),
    }


def images(x: Tensor, y: Tensor, grid: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]; grid: [2, 3, 5, 2]."""
    volume = x.reshape(2, 2, 2, 6, 7)
    return {
        "nearest": gradients(lambda x: F.interpolate(x, (4, 9)), x),
        "linear": gradients(lambda y: F.interpolate(y, 13, mode="linear"), y),
        "bilinear": gradients(lambda x: F.interpolate(x, (9, 4), mode="bilinear", align_corners=True), x),
        "bicubic": gradients(lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), x),
        "trilinear": gradients(lambda x: F.interpolate(x, (3, 4, 5), mode="trilinear"), volume),
        "grid sample": gradients(lambda x, grid: F.grid_sample(x, grid, align_corners=False), x, grid),
        "grid sample nearest": F.grid_sample(x, grid, mode="nearest", padding_mode="border", align_corners=True),
        "grid sample cubic": gradients(
            lambda x, grid: F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False),
            x,
            grid,
        ),
        "grid sample border": gradients(
            lambda x, grid: F.grid_sample(x, grid * 2, padding_mode="border", align_corners=True), x, grid
        ),
        "grid sample 3d": gradients(
            lambda x, grid: F.grid_sample(x, grid, padding_mode="reflection", align_corners=True),
            volume,
            torch.stack([grid, grid.flip(1) * 2], 1)[..., [0, 1, 0]],
        ),
        "replication": gradients(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), x),
        "reflection": gradients(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), x),
        "circular": gradients(lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"), x),
        "pixel shuffle": F.pixel_shuffle(x, 2),
        "as_strided": torch.as_strided(x.clone(), (3, 4), (5, 2), 7),
    }


def orders(x: Tensor, y: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]."""
    ties = (y * 2).round()
    holes = torch.where(ties == 0, torch.nan, y)
    index = (y.abs() * 100).long() % 9
    rising = y[0].sort(-1).values
    results = {
        "kthvalue": y.kthvalue(3, 1)[0],
        "median": y.median(),
        "median of NaN": holes.median(-1)[0],
        "nanmedian": holes.nanmedian(-1)[0],
        "mode": ties.mode(-1)[0],
        "cummax": torch.stack([*ties.cummax(-1)][:1]),
        "cummax indices": ties.cummax(-1)[1],
        "cummin of NaN": holes.cummin(1)[1],
        "logcumsumexp": torch.logcumsumexp(y, 1),
        "searchsorted": torch.searchsorted(rising, y[1].contiguous(), right=True),
        "bucketize": torch.bucketize(ties, rising[0].contiguous()),
        "bucketize NaN": torch.bucketize(holes, rising[0].contiguous(), out_int32=True),
        "put": y.put(index[0, 0], y[1, 1]),
        "histc": y.histc(5, -1, 2),
        "histc of all": y[0].histc(4),
        "mode of integers": index.mode(1)[1],
        "median of integers": index.median(-1)[0],
        "scatter mean of integers": index.scatter_reduce(-1, index, index * 3, "mean", include_self=False),
        "scatter amin of integers": index.scatter_reduce(-1, index, index * 3, "amin", include_self=False),
    }
    for reduce in ("sum", "prod", "mean", "amax", "amin"):
        results[f"scatter_reduce {reduce}"] = y.scatter_reduce(-1, index, y * 2, reduce, include_self=False)
        results[f"scatter_reduce {reduce} self"] = y.scatter_reduce(1, index % 4, y * 2, reduce)
    for reduce in ("prod", "mean", "amax", "amin"):
        results[f"index_reduce {reduce}"] = y.index_reduce(1, index[0, 0] % 4, y.repeat(1, 3, 1)[:, :9], reduce)
    return results


def matrices(x: Tensor, y: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]."""
    a = x[0, :, :4, :4]  # four matrices 4 x 4
    a = a + 3 * torch.eye(4, dtype=a.dtype)
    positive = a @ a.mT + torch.eye(4, dtype=a.dtype)
    b, wide = x[1, :, :4, :3], x[0, 0, :3]
    lu, pivots = torch.linalg.lu_factor(a)
    return {
        "cholesky": gradients(torch.linalg.cholesky, positive),
        "cholesky_solve": torch.cholesky_solve(b, torch.linalg.cholesky(positive)),
        "cholesky_inverse": torch.cholesky_inverse(torch.linalg.cholesky(positive[0])),
        "solve": gradients(torch.linalg.solve, a, b),
        "solve from the right": torch.linalg.solve(a, b.mT, left=False),
        "solve_triangular": gradients(lambda a, b: torch.linalg.solve_triangular(a, b, upper=True), a, b),
        "inv": gradients(torch.linalg.inv, a),
        "det": torch.linalg.det(a),
        "slogdet": torch.linalg.slogdet(a)[1],
        "lu": torch.cat([part.reshape(-1) for part in torch.linalg.lu(wide)]),
        "lu_factor": torch.cat([lu.reshape(-1), pivots.reshape(-1)]),
        "lu_solve": torch.linalg.lu_solve(lu, pivots, b, adjoint=True),
        "qr": torch.cat([part.reshape(-1) for part in torch.linalg.qr(wide)]),
        "qr complete": torch.linalg.qr(wide.mT, "complete")[0],
        "addbmm": torch.addbmm(x[0, 0, :4, :3], a, b, beta=0.5, alpha=2),
        "bilinear": F.bilinear(y[0], y[1], x.reshape(-1)[:162].reshape(2, 9, 9)),
        **{
            f"cdist {p}": gradients(lambda a, b, p=p: torch.cdist(a, b, p=p), y[0], y[1, :3])
            for p in (0.0, 1.0, 1.5, 2.0, 3.0, torch.inf)
        },
        "pdist": gradients(F.pdist, y[0]),
    }


def functions(x: Tensor, y: Tensor) -> Cases:
    """x: [2, 4, 6, 7]; y: [2, 4, 9]."""
    special = torch.special
    z, n = y * 2, (y.abs() * 4).floor()
    within = torch.tanh(y)
    names = (
        *("i0", "i0e", "i1", "i1e", "digamma", "gammaln", "erfcx", "log_ndtr", "airy_ai"),
        *("bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1", "modified_bessel_i0", "modified_bessel_i1"),
        *("modified_bessel_k0", "modified_bessel_k1", "spherical_bessel_j0"),
        *("scaled_modified_bessel_k0", "scaled_modified_bessel_k1"),
    )
    polynomials = (
        *(f"chebyshev_polynomial_{kind}" for kind in "tuvw"),
        *("hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
        *(f"shifted_chebyshev_polynomial_{kind}" for kind in "tuvw"),
    )
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 0.5, -2.0], dtype=y.dtype)
    results: dict[str, Any] = {}
    for name in names:
        results[name] = getattr(special, name)(z)
        results[f"{name} at the edges"] = getattr(special, name)(edges)
    for name in polynomials:
        results[name] = getattr(special, name)(within, n)
        results[f"{name} of NaN"] = getattr(special, name)(edges, torch.full_like(edges, 7))
    return {
        **results,
        "erfinv": torch.erfinv(within),
        "erfinv at the edges": torch.erfinv(edges),
        "ndtri": special.ndtri(within.abs()),
        "zeta": special.zeta(z.abs() + 1.5, n + 1),
        "igamma": torch.igamma(z.abs() + 0.1, y.abs()),
        "igammac": torch.igammac(y.abs() * 30 + 20, z.abs() * 20),
        **{f"polygamma {order}": torch.polygamma(order, z.abs() + 0.2) for order in (0, 1, 2, 4)},
        "nextafter": torch.nextafter(y, z),
        "frexp": torch.frexp(z)[0],
        "frexp exponent": torch.frexp(edges)[1],
        "ldexp": torch.ldexp(y, n),
        "angle": torch.angle(edges),
        "lgamma": gradients(lambda y: torch.lgamma(y.abs() + 0.2), y),
        "hardshrink": gradients(F.hardshrink, y),
        "softshrink": gradients(F.softshrink, y),
    }


FAMILIES: dict[str, Callable[..., Cases]] = {
    "convolutions": lambda x, y, w, grid: convolutions(x, y, w),
    "pools": lambda x, y, w, grid: pools(x, y),
    "images": lambda x, y, w, grid: images(x, y, grid),
    "orders": lambda x, y, w, grid: orders(x, y),
    "matrices": lambda x, y, w, grid: matrices(x, y),
    "functions": lambda x, y, w, grid: functions(x, y),
}
"""By name: the function that returns the cases of a family, for arguments of `SHAPES`."""
