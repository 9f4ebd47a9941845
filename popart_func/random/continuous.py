"""Continuous distributions by the inverse of their distribution function, or of a fixed number of normal numbers.

Where parameters are tensors, gradients flow to them, as in JAX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from popart_func._typing import Float, Integer, Num
from popart_func._xla import erf, erfinv, exp, log, log1p, multiply_add, power, sqrt, step_inside, tan
from popart_func.random import keys
from popart_func.random._arguments import as_shape, check_draw, parameters
from popart_func.random.basic import normal, rademacher, scaled_normal, uniform

__all__ = [
    "cauchy",
    "divide",
    "double_sided_maxwell",
    "exponential",
    "laplace",
    "logistic",
    "lognormal",
    "maxwell",
    "pareto",
    "rayleigh",
    "triangular",
    "truncated_normal",
    "wald",
    "weibull_min",
]

_TINY = 2.0**-126


def truncated_normal(
    key: Integer[Tensor, "2"],
    lower: int | float | Num[Tensor, "..."],
    upper: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Standard normal numbers between two bounds, float32: `jax.random.truncated_normal`.

    Args:
        key: the key.
        lower: a number or a tensor; no number drawn equals it.
        upper: likewise.
        shape: the result's, to which the bounds broadcast.
        dtype: float32.

    >>> truncated_normal(keys.key(0), -2, 2, (2,))
    tensor([1.4560, 1.7147])
    """
    check_draw("truncated_normal", key, dtype)
    shape, (lower, upper) = parameters("truncated_normal", key, shape, lower=lower, upper=upper)
    root = torch.full((), math.sqrt(2), dtype=torch.float32, device=key.device)
    u = uniform(key, shape, minval=erf(lower / root), maxval=erf(upper / root))
    drawn = torch.where(u < 1, torch.where(u > -1, erfinv(u) * root, -math.inf), math.inf)
    above, below = step_inside(lower.detach(), upper.detach())
    return torch.minimum(torch.maximum(drawn, above), below)


def exponential(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Standard exponential numbers, ``−log(1 − u)``, float32: `jax.random.exponential`.

    >>> exponential(keys.key(0), (2,))
    tensor([2.9501, 3.8434])
    """
    check_draw("exponential", key, dtype)
    return -log1p(-uniform(key, shape))


def laplace(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Standard Laplace numbers, float32: `jax.random.laplace`.

    >>> laplace(keys.key(0), (2,))
    tensor([-2.2570, -3.1503])
    """
    check_draw("laplace", key, dtype)
    u = uniform(key, shape, minval=-1 + 2.0**-24, maxval=1.0)
    return u.sign() * log1p(-u.abs())


def logistic(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Standard logistic numbers, ``log u − log(1 − u)``, float32: `jax.random.logistic`.

    >>> logistic(keys.key(0), (2,))
    tensor([2.8964, 3.8218])
    """
    check_draw("logistic", key, dtype)
    u = uniform(key, shape, minval=_TINY, maxval=1.0)
    return log(u) - log1p(-u)


def cauchy(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Standard Cauchy numbers, ``tan(π (u − ½))``, float32: `jax.random.cauchy`, to one unit in the last place.

    >>> cauchy(keys.key(0), (2,))
    tensor([ 6.0275, 14.8379])
    """
    check_draw("cauchy", key, dtype)
    return tan((uniform(key, shape, minval=2.0**-23, maxval=1.0) - 0.5) * math.pi)


def pareto(
    key: Integer[Tensor, "2"],
    b: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Pareto numbers of shape parameter b, from 1 on, float32: `jax.random.pareto`.

    >>> pareto(keys.key(0), 2.0, (2,))
    tensor([4.3713, 6.8326])
    """
    check_draw("pareto", key, dtype)
    shape, (b,) = parameters("pareto", key, shape, b=b)
    return exp(divide(exponential(key, shape), b))


def rayleigh(
    key: Integer[Tensor, "2"],
    scale: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Rayleigh numbers, ``scale √(−2 log u)``, float32: `jax.random.rayleigh`.

    >>> rayleigh(keys.key(0), 1.0, (2,))
    tensor([0.3279, 0.2081])
    """
    check_draw("rayleigh", key, dtype)
    shape, (scale,) = parameters("rayleigh", key, shape, scale=scale)
    return scale * sqrt(log(uniform(key, shape)) * -2)


def weibull_min(
    key: Integer[Tensor, "2"],
    scale: int | float | Num[Tensor, "..."],
    concentration: int | float | Num[Tensor, "..."],
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Weibull numbers, float32: `jax.random.weibull_min`, to two units in the last place.

    Args:
        key: the key.
        scale: a number or a tensor.
        concentration: the shape parameter.
        shape: of the uniform numbers, which broadcast with the parameters to the result.
        dtype: float32.

    >>> weibull_min(keys.key(0), 1.0, 2.0, (2,))
    tensor([1.7176, 1.9605])
    """
    check_draw("weibull_min", key, dtype)
    _, (scale, concentration) = parameters("weibull_min", key, None, scale=scale, concentration=concentration)
    return power(exponential(key, shape), 1 / concentration) * scale


def lognormal(
    key: Integer[Tensor, "2"],
    sigma: int | float | Num[Tensor, "..."] = 1.0,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """The exponential of normal numbers of standard deviation sigma, float32: `jax.random.lognormal`.

    >>> lognormal(keys.key(0), 0.5, (2,))
    tensor([2.2509, 2.7528])
    """
    check_draw("lognormal", key, dtype)
    shape, (sigma,) = parameters("lognormal", key, shape, sigma=sigma)
    return exp(scaled_normal(key, shape, sigma))


def triangular(
    key: Integer[Tensor, "2"],
    left: int | float | Num[Tensor, "..."],
    mode: int | float | Num[Tensor, "..."],
    right: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Numbers whose density rises from left to mode and falls to right, float32: `jax.random.triangular`.

    >>> triangular(keys.key(0), 0.0, 1.0, 2.0, (2,))
    tensor([1.6765, 1.7930])
    """
    check_draw("triangular", key, dtype)
    shape, (left, mode, right) = parameters("triangular", key, shape, left=left, mode=mode, right=right)
    u = uniform(key, shape)
    rising = left + sqrt(u * (right - left) * (mode - left))
    falling = right - sqrt((1 - u) * (right - left) * (right - mode))
    return torch.where(u < (mode - left) / (right - left), rising, falling)


def maxwell(
    key: Integer[Tensor, "2"], shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """The length of three standard normal numbers, float32: `jax.random.maxwell`.

    >>> maxwell(keys.key(0), (2,))
    tensor([2.6311, 0.9910])
    """
    check_draw("maxwell", key, dtype)
    x, y, z = normal(key, (*as_shape("maxwell", shape), 3)).square().unbind(-1)
    return sqrt(x + z + y)  # XLA's order


def double_sided_maxwell(
    key: Integer[Tensor, "2"],
    loc: int | float | Num[Tensor, "..."],
    scale: int | float | Num[Tensor, "..."],
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Maxwell numbers with a random sign, times scale, plus loc, float32: `jax.random.double_sided_maxwell`.

    Args:
        key: the key.
        loc: a number or a tensor.
        scale: likewise.
        shape: of draws; the shape to which the parameters broadcast is appended to it.
        dtype: float32.

    >>> double_sided_maxwell(keys.key(0), 0.0, 1.0, (2,))
    tensor([1.5457, 1.5741])
    """
    check_draw("double_sided_maxwell", key, dtype)
    inner, (loc, scale) = parameters("double_sided_maxwell", key, None, loc=loc, scale=scale)
    shape = (*(as_shape("double_sided_maxwell", shape) or inner), *inner)
    first, second = keys.split(key)
    return rademacher(second, shape) * maxwell(first, shape) * scale + loc


def wald(
    key: Integer[Tensor, "2"],
    mean: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Wald (inverse Gaussian) numbers of scale 1, float32: `jax.random.wald`.

    >>> wald(keys.key(0), 1.0, (2,))
    tensor([0.3806, 0.4157])
    """
    check_draw("wald", key, dtype)
    shape, (mean,) = parameters("wald", key, shape, mean=mean)
    first, second = keys.split(key)
    root = normal(first, shape)
    y = root * root
    square = mean * mean
    sqrt_term = sqrt(multiply_add(4 * mean, y, square * (y * y)))
    x = multiply_add(-mean / 2, sqrt_term, mean + square * y / 2)
    return torch.where(uniform(second, shape) <= mean / (mean + x), x, square / x)


def divide(x: Tensor, by: Tensor) -> Tensor:
    """``x / by`` as XLA computes it: times the reciprocal of what broadcasts."""
    return x * (1 / by) if by.numel() < x.numel() else x / by
