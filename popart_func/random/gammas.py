"""Gamma numbers, and what is made of them: beta, chi-square, Dirichlet, F, Student's t, generalized normal, the ball.

JAX draws gamma numbers by Marsaglia and Tsang, "A simple method for generating gamma variables" (2000): candidates are
drawn until one is accepted. Here the candidates of the first `ROUNDS` rounds are drawn at once, and the first accepted
one is taken, which is JAX's. **If none is accepted, the result is NaN**: less than three in 10⁹ numbers.

What is accepted is JAX's but at the very edge, and numbers differ from JAX's by a few units in the last place: up to a
relative 2e-6 for `gamma` and `t`, 4e-6 for `beta`, `chisquare`, `f`, `generalized_normal` and `ball`, 8e-6 for
`dirichlet`, and an absolute 2e-6 for `loggamma`.

In eager mode gradients with respect to the parameters of gamma numbers are those of implicit reparametrization, as in
JAX. Where the function is traced, as in `interop.jax.to_jax_function`, they are NaN: no gradient is wrong in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from popart_func._torch import standard_gamma_grad
from popart_func._typing import Float, Integer, Num
from popart_func._xla import exp, float32, log, log1p, multiply_add, power, reciprocal_sqrt, sqrt
from popart_func.random import keys
from popart_func.random._arguments import as_shape, check_draw, parameters
from popart_func.random.basic import normal, rademacher, to_normal, to_unit
from popart_func.random.continuous import divide, exponential

__all__ = ["ball", "beta", "chisquare", "dirichlet", "f", "gamma", "generalized_normal", "loggamma", "t"]

ROUNDS = 8
"""How many candidates are drawn. At least 95 % of candidates are accepted."""
_TRIES = 4  # how many normal numbers for one candidate; less than 0.8 % can't be used
_SQUEEZE = float32(-0.0331)


def gamma(
    key: Integer[Tensor, "2"],
    a: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Gamma numbers of shape parameter a, float32: `jax.random.gamma`.

    >>> gamma(keys.key(0), 2.0, (2,))
    tensor([1.5898, 1.7599])
    """
    check_draw("gamma", key, dtype)
    shape, (a,) = parameters("gamma", key, shape, a=a)
    return _gamma(key, a.expand(shape), in_logarithms=False)


def loggamma(
    key: Integer[Tensor, "2"],
    a: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """The logarithm of gamma numbers, right for small shape parameters, too, float32: `jax.random.loggamma`.

    >>> loggamma(keys.key(0), 2.0, (2,))
    tensor([0.4636, 0.5653])
    """
    check_draw("loggamma", key, dtype)
    shape, (a,) = parameters("loggamma", key, shape, a=a)
    return _gamma(key, a.expand(shape), in_logarithms=True)


def beta(
    key: Integer[Tensor, "2"],
    a: int | float | Num[Tensor, "..."],
    b: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Beta numbers, float32: `jax.random.beta`.

    >>> beta(keys.key(0), 2.0, 3.0, (2,))
    tensor([0.2363, 0.4905])
    """
    check_draw("beta", key, dtype)
    shape, (a, b) = parameters("beta", key, shape, a=a, b=b)
    first, second = keys.split(key)
    log_a, log_b = loggamma(first, a, shape), loggamma(second, b, shape)
    greater = torch.maximum(log_a, log_b)
    gamma_a, gamma_b = exp(log_a - greater), exp(log_b - greater)
    return gamma_a / (gamma_a + gamma_b)


def dirichlet(
    key: Integer[Tensor, "2"],
    alpha: Num[Tensor, "... n"],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... n"]:
    """Dirichlet vectors, which sum to one, float32: `jax.random.dirichlet`.

    Args:
        key: the key.
        alpha: concentrations along the last axis.
        shape: the result's without the last axis.
        dtype: float32.

    >>> dirichlet(keys.key(0), torch.tensor([1.0, 2.0, 3.0])).shape
    torch.Size([3])
    """
    check_draw("dirichlet", key, dtype)
    if not isinstance(alpha, Tensor) or not alpha.ndim:
        raise ValueError("dirichlet: `alpha` must be a tensor with an axis of concentrations.")
    size = alpha.shape[-1:]
    full = alpha.shape if shape is None else (*as_shape("dirichlet", shape), *size)
    logarithms = loggamma(key, alpha, full)
    unnormalized = exp(logarithms - logarithms.amax(-1, keepdim=True).detach())
    return divide(unnormalized, unnormalized.sum(-1, keepdim=True))


def chisquare(
    key: Integer[Tensor, "2"],
    df: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Chi-square numbers of df degrees of freedom, float32: `jax.random.chisquare`.

    >>> chisquare(keys.key(0), 3.0, (2,))
    tensor([2.2051, 2.4900])
    """
    check_draw("chisquare", key, dtype)
    shape, (df,) = parameters("chisquare", key, shape, df=df)
    return exp(loggamma(key, df / 2, shape)) * 2


def f(
    key: Integer[Tensor, "2"],
    dfnum: int | float | Num[Tensor, "..."],
    dfden: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Numbers of Fisher's F distribution, float32: `jax.random.f`.

    >>> f(keys.key(0), 3.0, 5.0, (2,))
    tensor([2.5797, 0.1922])
    """
    check_draw("f", key, dtype)
    shape, (dfnum, dfden) = parameters("f", key, shape, dfnum=dfnum, dfden=dfden)
    below, above = keys.split(key)
    return (chisquare(above, dfnum, shape) / dfnum) / (chisquare(below, dfden, shape) / dfden)


def t(
    key: Integer[Tensor, "2"],
    df: int | float | Num[Tensor, "..."],
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """Numbers of Student's t distribution of df degrees of freedom, float32: `jax.random.t`.

    >>> t(keys.key(0), 3.0, (2,))
    tensor([ 0.6902, -3.2393])
    """
    check_draw("t", key, dtype)
    shape, (df,) = parameters("t", key, shape, df=df)
    first, second = keys.split(key)
    half = df / 2
    return normal(first, shape) * sqrt(half / gamma(second, half, shape))


def generalized_normal(
    key: Integer[Tensor, "2"], p: int | float, shape: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Float[Tensor, "..."]:
    """Numbers of density proportional to ``exp(−|x|^p)``, float32: `jax.random.generalized_normal`.

    >>> generalized_normal(keys.key(0), 2.0, (2,))
    tensor([0.9543, 0.0902])
    """
    check_draw("generalized_normal", key, dtype)
    _, (exponent,) = parameters("generalized_normal", key, None, p=p)
    first, second = keys.split(key)
    return rademacher(second, shape) * power(
        gamma(first, 1 / exponent, as_shape("generalized_normal", shape)), 1 / exponent
    )


def ball(
    key: Integer[Tensor, "2"],
    d: int,
    p: int | float = 2,
    shape: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... d"]:
    """Points from the unit ball of the p-norm in d dimensions, float32: `jax.random.ball`.

    Source: Barthe, Guédon, Mendelson, Naor, "A probabilistic approach to the geometry of the ℓp-ball" (2005).

    >>> ball(keys.key(0), 3).norm() < 1
    tensor(True)
    """
    check_draw("ball", key, dtype)
    shape = as_shape("ball", shape)
    _, (exponent,) = parameters("ball", key, None, p=p)
    first, second = keys.split(key)
    point = generalized_normal(first, p, (*shape, d))
    total = power(point.abs(), exponent).sum(-1) + exponential(second, shape)
    return divide(point, power(total, 1 / exponent)[..., None])


def _gamma(key: Tensor, a: Tensor, in_logarithms: bool) -> Tensor:
    fixed = a.detach()
    drawn = _drawn_gamma(keys.split(key, a.shape), fixed, in_logarithms)
    if not a.requires_grad:
        return drawn + (a - fixed).sqrt() * 0.0  # adds 0, whose derivative is NaN
    sample = exp(drawn).clamp(min=2.0**-126) if in_logarithms else drawn
    slope = standard_gamma_grad(fixed, sample)
    return drawn + (a - fixed) * (slope / sample if in_logarithms else slope)


def _drawn_gamma(lanes: Tensor, a: Tensor, in_logarithms: bool) -> Tensor:
    """Gamma numbers ``[...]`` for keys ``[..., 2]`` and parameters ``[...]``."""
    is_large = a >= 1
    d = torch.where(is_large, a, a + 1) - 1 / 3  # below 1, gamma(a) = gamma(a + 1) u^(1 / a)
    c = reciprocal_sqrt(d) * (1 / 3)
    lanes, boost_keys = _children(lanes, 2)
    normal_keys, uniform_keys = [], []
    for _ in range(ROUNDS):
        lanes, normal_key, uniform_key = _children(lanes, 3)
        normal_keys.append(normal_key)
        uniform_keys.append(uniform_key)
    chain, tries = torch.stack(normal_keys, -2), []
    for _ in range(_TRIES):
        chain, now = _children(chain, 2)
        tries.append(to_normal(_unit(now)))
    x = torch.stack(tries, -1)  # [..., rounds, tries]
    x = _first(multiply_add(x, c[..., None, None], 1.0) > 0, x)
    v = multiply_add(x, c[..., None], 1.0)
    square, cube = x * x, v * v * v
    u = _unit(torch.stack(uniform_keys, -2))
    is_accepted = (u < multiply_add(square * square, _SQUEEZE, 1.0)) | (
        log(u) < multiply_add(d[..., None], 1 - cube + log(cube), square * 0.5)
    )
    cube = _first(is_accepted | v.isnan(), cube)
    unit = _unit(boost_keys)
    if in_logarithms:
        logarithm = log1p(-unit)
        boost = torch.where(is_large | (logarithm == 0), 0.0, logarithm * (1 / a))
        return log(d) + log(cube) + boost
    result = d * cube * torch.where(is_large, 1.0, power(1 - unit, 1 / a))
    return torch.where(result < 2.0**-126, 0.0, result)  # XLA has no denormal numbers


def _children(parents: Tensor, count: int) -> list[Tensor]:
    """Each key split into several: tensors ``[..., 2]``."""
    low = torch.arange(count, dtype=torch.int32, device=parents.device)
    words = keys.threefry(parents[..., None, :], torch.zeros_like(low), low)
    return list(torch.stack(words, -1).unbind(-2))


def _unit(parents: Tensor) -> Tensor:
    """A uniform number in [0, 1) from each key."""
    zero = torch.zeros((), dtype=torch.int32, device=parents.device)
    first, second = keys.threefry(parents, zero, zero)
    return to_unit(first ^ second)


def _first(mask: Tensor, values: Tensor) -> Tensor:
    """The value at the first true entry along the last axis; NaN where there is none."""
    result = torch.full_like(values[..., 0], math.nan)
    for is_it, value in reversed(list(zip(mask.unbind(-1), values.unbind(-1), strict=True))):
        result = torch.where(is_it, value, result)
    return result
