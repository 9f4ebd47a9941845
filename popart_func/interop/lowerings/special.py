"""Lowerings of special functions: gamma, Bessel, Airy, orthogonal polynomials; `table` says how an op is called.

They follow PyTorch's own kernels where JAX has no such function, or another convention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special

from popart_func.engines.native.c_code import header
from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering, operand

__all__ = ["SPECIAL"]


@functools.cache
def _coefficients(function: str, table: str) -> tuple[float, ...]:
    """A table of coefficients of a function in the native engine's special.hpp, the highest power first."""
    body = header("special.hpp").split(f"OUTLINE T {function}(T x) {{")[1]
    numbers = body.split(f"static const T {table}[] = {{")[1].split("};")[0]
    return tuple(map(float, numbers.replace(",", " ").split()))


def _digamma(x: Any) -> Any:
    return jnp.where(x == 0, -jnp.copysign(jnp.inf, x), jax.lax.digamma(x))


def _trigamma(x: Any) -> Any:
    """The derivative of digamma; below 1/2 by reflection."""
    low = x < 0.5
    y = jnp.where(low, 1 - x, x)
    value = jax.scipy.special.zeta(jnp.full_like(y, 2), y)
    return jnp.where(low, (math.pi / jnp.sin(math.pi * jnp.where(low, x, 0.25))) ** 2 - value, value)


def _polygamma(out: TensorSpec, order: int, x: Any) -> Any:
    return _polygamma_of(order, operand(x, out.dtype))


def _polygamma_of(order: int, x: Any) -> Any:
    """The derivatives of digamma, each of which is the derivative of the one before."""

    @jax.custom_jvp
    def value(x: Any) -> Any:
        if order < 2:
            return _trigamma(x) if order else _digamma(x)
        return (-1) ** (order + 1) * math.gamma(order + 1) * _zeta_of(jnp.full_like(x, order + 1), x)

    @value.defjvp
    def slope(primals: Any, tangents: Any) -> Any:
        return value(*primals), _polygamma_of(order + 1, *primals) * tangents[0]

    return value(x)


@jax.custom_jvp
def _zeta_of(order: Any, x: Any) -> Any:
    """The Hurwitz zeta function; JAX's is inaccurate for negative numbers, which are moved up to 1 and more."""
    whole, is_power = jnp.floor(x), order == jnp.floor(order)

    def move(state: Any) -> Any:
        total, at = state
        return jnp.where(at < 1, total + at**-order, total), jnp.where(at < 1, at + 1, at)

    total, at = jax.lax.while_loop(
        lambda state: (state[1] < 1).any(), move, (jnp.zeros_like(x), jnp.where((x < 0) & (x != whole), x, 1))
    )
    negative = jnp.where(is_power, total + jax.scipy.special.zeta(order, at), jnp.nan)
    value = jnp.where(x > 0, jax.scipy.special.zeta(order, x), jnp.where(x == whole, jnp.inf, negative))
    first = jnp.where(x == 1, 1, jnp.where(x < 1, jnp.inf, jnp.nan))  # x^-order; PyTorch has NaN above 1
    value = jnp.where(order == jnp.inf, first, value)
    return jnp.where(order == 1, jnp.inf, jnp.where(order < 1, jnp.nan, value))


@_zeta_of.defjvp
def _zeta_slope(primals: Any, tangents: Any) -> Any:
    order, x = primals
    return _zeta_of(order, x), -order * _zeta_of(order + 1, x) * tangents[1]


def _zeta(out: TensorSpec, order: Any, x: Any) -> Any:
    order, x = jnp.broadcast_arrays(operand(order, out.dtype), operand(x, out.dtype))
    return _zeta_of(jax.lax.stop_gradient(order), x)


def _incomplete_gamma(function: Callable[[Any, Any], Any], below: int, above: int) -> Lowering:
    """An incomplete gamma function, with PyTorch's values where an argument is infinite.

    PyTorch has no derivative in its first argument.
    """

    def op(out: TensorSpec, a: Any, x: Any) -> Any:
        a, x = jnp.broadcast_arrays(operand(a, out.dtype), operand(x, out.dtype))
        is_edge = jnp.isinf(a) | jnp.isinf(x) | (jnp.isnan(a) & (x == 0))
        edge = jnp.where(jnp.isinf(x), jnp.where(jnp.isinf(a), jnp.nan, above), below)
        edge = jnp.where(a == 0, jnp.where(x > 0, above, jnp.nan), edge)
        value = jnp.where(is_edge, edge, function(jnp.where(is_edge, 1, a), jnp.where(is_edge, 1, x)))
        return jnp.where((x < 0) | (a < 0), jnp.nan, value)

    return op


def _horner(x: Any, coefficients: Sequence[float]) -> Any:
    value = jnp.zeros_like(x)
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def _ratio(x: Any, function: str, numerator: str, denominator: str) -> Any:
    return _horner(x, _coefficients(function, numerator)) / _horner(x, _coefficients(function, denominator))


def _chebyshev_series(x: Any, coefficients: Sequence[float]) -> Any:
    """A Chebyshev series, by Clenshaw's recurrence."""
    before, last, value = jnp.zeros_like(x), jnp.zeros_like(x), jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        before, last, value = last, value, x * value - last + coefficient
    return 0.5 * (value - before)


def _far(order: int, x: Any, turn: Any, other: Any, sign: int) -> Any:
    """The Bessel functions beyond 5: a slowly changing amplitude times cosine and sine."""
    square = 25 / (x * x)
    first, second = (_ratio(square, f"bessel_j{order}", f"{part}P", f"{part}Q") for part in "PQ")
    angle = x - (0.25 + 0.5 * order) * math.pi
    both = first * turn(angle) + sign * 5 / x * second * other(angle)
    return both * math.sqrt(2 / math.pi) / jnp.sqrt(x)


def _bessel_j0(x: Any) -> Any:
    x = jnp.abs(x)
    square = x * x
    roots = (square - 5.78318596294678452118) * (square - 30.4712623436620863991)
    near = roots * _ratio(square, "bessel_j0", "RP", "RQ")
    near = jnp.where(x < 1e-5, 1 - square / 4, near)
    return jnp.where(x <= 5, near, _far(0, jnp.where(x <= 5, 6, x), jnp.cos, jnp.sin, -1))


def _bessel_j1(x: Any) -> Any:
    size = jnp.abs(x)
    square = size * size
    roots = (square - 14.6819706421238932572) * (square - 49.2184563216946036703)
    near = _ratio(square, "bessel_j1", "RP", "RQ") * size * roots
    value = jnp.where(size <= 5, near, _far(1, jnp.where(size <= 5, 6, size), jnp.cos, jnp.sin, -1))
    return jnp.where(x < 0, -value, value)


def _second_kind(order: int, x: Any) -> Any:
    square, inside = x * x, jnp.where(x > 0, x, 1)
    rational = _ratio(square, f"bessel_y{order}", "YP", "YQ")
    if order == 0:
        near = rational + 2 / math.pi * jnp.log(inside) * _bessel_j0(x)
    else:
        near = x * rational + 2 / math.pi * (_bessel_j1(x) * jnp.log(inside) - 1 / inside)
    value = jnp.where(x <= 5, near, _far(order, jnp.where(x <= 5, 6, x), jnp.sin, jnp.cos, 1))
    return jnp.where(x == 0, -jnp.inf, jnp.where(x < 0, jnp.nan, value))


def _modified_second_kind(order: int, x: Any, scaled: bool) -> Any:
    inside = jnp.where(x > 0, x, 1)
    near = _chebyshev_series(inside * inside - 2, _coefficients(f"modified_bessel_k{order}", "A"))
    log = jnp.log(0.5 * inside)
    near = near - log * jax.scipy.special.i0(x) if order == 0 else log * jax.scipy.special.i1(x) + near / inside
    far = _chebyshev_series(8 / inside - 2, _coefficients(f"modified_bessel_k{order}", "B")) / jnp.sqrt(inside)
    value = jnp.where(x <= 2, near * (jnp.exp(x) if scaled else 1), far * (1 if scaled else jnp.exp(-x)))
    return jnp.where(x == 0, jnp.inf, jnp.where(x > 0, value, jnp.nan))  # NaN where x is NaN, too


def _airy(x: Any) -> Any:
    scale = 1 / math.sqrt(math.pi)
    below = jnp.where(x < -2.09, x, -3)
    zeta = -2 * below * jnp.sqrt(-below) / 3
    z = 1 / zeta
    f = 1 + z * z * _ratio(z * z, "airy_ai", "AFN", "AFD")
    g = z * _ratio(z * z, "airy_ai", "AGN", "AGD")
    angle = zeta + 0.25 * math.pi
    oscillating = scale / jnp.sqrt(jnp.sqrt(-below)) * (jnp.sin(angle) * f - jnp.cos(angle) * g)
    above = jnp.where(x >= 2.09, x, 3)
    zeta = 2 * above * jnp.sqrt(above) / 3
    ratio = _ratio(1 / zeta, "airy_ai", "AN", "AD")
    falling = scale * ratio / (2 * jnp.sqrt(jnp.sqrt(above)) * jnp.exp(zeta))
    inner = jnp.where(jnp.abs(x) < 2.1, x, 0)
    first, second, m, n, k = jnp.ones_like(x), inner, jnp.ones_like(x), inner, 1
    for _ in range(15):
        m, n = m * inner**3 / ((k + 1) * (k + 2)), n * inner**3 / ((k + 2) * (k + 3))
        first, second, k = first + m, second + n, k + 3
    series = 0.355028053887817239260 * first - 0.258819403792806798405 * second
    value = jnp.where(x < -2.09, oscillating, jnp.where(x >= 2.09, falling, series))
    return jnp.where(jnp.isfinite(x), jnp.where(x > 103.892, 0, value), jnp.nan)


def _spherical_j0(x: Any) -> Any:
    x = jnp.abs(x)
    inside = jnp.where(jnp.isinf(x) | (x == 0), 1, x)
    series = 1 + sum((-1) ** k * x ** (2 * k) / float(math.factorial(2 * k + 1)) for k in range(1, 7))
    return jnp.where(jnp.isinf(x), 0, jnp.where(x < 0.5, series, jnp.sin(inside) / inside))


Step = Callable[[Any, Any, Any, Any], Any]
"""``step(k, x, before, last)`` gives the polynomial of order k."""


def _polynomial(first: Callable[[Any], Any], step: Step, shifted: bool = False, most: int | None = None) -> Lowering:
    """Orthogonal polynomials, of the order that each element names, by their recurrence.

    They are 0 for a negative order and, as in PyTorch, for one that is no number or infinite.
    """

    def op(out: TensorSpec, x: Any, order: Any) -> Any:
        x, order = jnp.broadcast_arrays(operand(x, out.dtype), operand(order, out.dtype))
        x, order = 2 * x - 1 if shifted else x, jnp.where(jnp.isfinite(order), order, -1).astype(jnp.int32)

        def advance(state: Any) -> Any:
            k, before, last = state
            value = step(k.astype(x.dtype), x, before, last)
            return k + 1, jnp.where(k <= order, last, before), jnp.where(k <= order, value, last)

        top = order.max(initial=0) if most is None else jnp.minimum(order.max(initial=0), most)
        start = jnp.asarray(2, jnp.int32), jnp.ones_like(x), first(x)
        _, _, last = jax.lax.while_loop(lambda state: state[0] <= top, advance, start)
        value = jnp.where(order < 0, 0, jnp.where(order == 0, 1, last))
        return value if most is None else jnp.where(order > most, jnp.nan, value)

    return op


def _chebyshev_step(k: Any, x: Any, before: Any, last: Any) -> Any:
    return 2 * x * last - before


_CHEBYSHEV: dict[str, Callable[[Any], Any]] = {
    "t": lambda x: x,
    "u": lambda x: 2 * x,
    "v": lambda x: 2 * x - 1,
    "w": lambda x: 2 * x + 1,
}


def _of_one(function: Callable[[Any], Any]) -> Lowering:
    return lambda out, x: function(operand(x, out.dtype))


def _nextafter(out: TensorSpec, x: Any, y: Any) -> Any:
    return jnp.nextafter(operand(x, out.dtype), operand(y, out.dtype))


def _frexp(outs: Any, x: Any) -> list[Any]:
    mantissa, exponent = jnp.frexp(x)
    is_finite = jnp.isfinite(x)
    return [jnp.where(is_finite, mantissa, x), jnp.where(is_finite, exponent, 0)]


SPECIAL: dict[str, Lowering] = {
    "digamma": _of_one(lambda x: _polygamma_of(0, x)),
    "polygamma": _polygamma,
    "special_zeta": _zeta,
    "igamma": _incomplete_gamma(jax.scipy.special.gammainc, below=0, above=1),
    "igammac": _incomplete_gamma(jax.scipy.special.gammaincc, below=1, above=0),
    "special_erfcx": _of_one(jax.scipy.special.erfcx),
    "special_bessel_j0": _of_one(_bessel_j0),
    "special_bessel_j1": _of_one(_bessel_j1),
    "special_bessel_y0": _of_one(lambda x: _second_kind(0, x)),
    "special_bessel_y1": _of_one(lambda x: _second_kind(1, x)),
    "special_modified_bessel_i0": _of_one(jax.scipy.special.i0),
    "special_modified_bessel_i1": _of_one(jax.scipy.special.i1),
    "special_modified_bessel_k0": _of_one(lambda x: _modified_second_kind(0, x, False)),
    "special_modified_bessel_k1": _of_one(lambda x: _modified_second_kind(1, x, False)),
    "special_scaled_modified_bessel_k0": _of_one(lambda x: _modified_second_kind(0, x, True)),
    "special_scaled_modified_bessel_k1": _of_one(lambda x: _modified_second_kind(1, x, True)),
    "special_spherical_bessel_j0": _of_one(_spherical_j0),
    "special_airy_ai": _of_one(_airy),
    **{f"special_chebyshev_polynomial_{kind}": _polynomial(f, _chebyshev_step) for kind, f in _CHEBYSHEV.items()},
    **{
        f"special_shifted_chebyshev_polynomial_{kind}": _polynomial(f, _chebyshev_step, shifted=True)
        for kind, f in _CHEBYSHEV.items()
    },
    "special_hermite_polynomial_h": _polynomial(
        lambda x: 2 * x, lambda k, x, p, q: 2 * (x * q - (k - 1) * p), most=128
    ),
    "special_hermite_polynomial_he": _polynomial(lambda x: x, lambda k, x, p, q: x * q - (k - 1) * p, most=128),
    "special_laguerre_polynomial_l": _polynomial(
        lambda x: 1 - x, lambda k, x, p, q: ((2 * k - 1 - x) * q - (k - 1) * p) / k
    ),
    "special_legendre_polynomial_p": _polynomial(
        lambda x: x, lambda k, x, p, q: ((2 * k - 1) * x * q - (k - 1) * p) / k
    ),
    "nextafter": _nextafter,
    "frexp": _frexp,
}
"""Every special function, by its name in ATen."""
