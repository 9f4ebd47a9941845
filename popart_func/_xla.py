"""XLA's float32 arithmetic on CPUs, to the bit, in plain PyTorch. `random` needs it to draw what JAX draws.

XLA rounds ``a * b + c`` once. It computes exponentials and logarithms by the polynomials of Cephes, and the error
function by Eigen's. Here numbers are carried in float64, in which a product of two float32 is exact, and rounded where
XLA rounds. (Rounding twice instead of once changes one result in 2²⁹.) For `power` and `tan` XLA calls the C library,
whose last bit depends on the machine: here they are exact, then rounded, and may differ from XLA by one unit in the
last place.

A mode of PyTorch may override the public functions: in `interop.jax.to_jax_function` JAX computes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = [
    "erf",
    "erfinv",
    "exp",
    "float32",
    "lgamma",
    "log",
    "log1p",
    "multiply_add",
    "power",
    "reciprocal_sqrt",
    "sqrt",
    "step_inside",
    "tan",
]


def float32(number: int | float) -> float:
    """A Python number rounded to float32. No tensor is made: a trace could not read its value."""
    exponent = max(math.frexp(number)[1], -125)  # below are the denormal numbers
    return round(math.ldexp(number, 24 - exponent)) * 2.0 ** (exponent - 24)


def _rounded(*numbers: float) -> tuple[float, ...]:
    return tuple(map(float32, numbers))


# Cephes' logf: the polynomial in ``mantissa − 1``.
_LOG = _rounded(
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LN2_HIGH, _LN2_LOW = _rounded(0.693359375, -2.12194440e-4)
# Mantissas lie between √½ and √2. The bound is half a unit lower, so that rounding in `torch.log2` can't matter.
_LEAST_MANTISSA = math.log2(float32(math.sqrt(0.5)) - 2.0**-26)
# Cephes' expf: the range in which it is not 0 or infinite, and the polynomial of what the power of two leaves.
_EXP_RANGE = _rounded(-87.8, 88.8)
_LOG2_E = float32(math.log2(math.e))
_EXP = _rounded(
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
# Cephes' log1p near 0.
_NEAR = float32(math.sqrt(2) - 1)
_NUMERATOR = _rounded(
    *(4.5270000862445199635215e-5, 4.9854102823193375972212e-1, 6.5787325942061044846969, 2.9911919328553073277375e1),
    *(6.0949667980987787057556e1, 5.7112963590585538103336e1, 2.0039553499201281259648e1),
)
_DENOMINATOR = _rounded(
    *(1.0, 1.5062909083469192043167e1, 8.3047565967967209469434e1, 2.2176239823732856465394e2),
    *(3.0909872225312059774938e2, 2.1642788614495947685003e2, 6.0118660497603843919306e1),
)
# The inverse error function: Giles, "Approximating the erfinv function" (2012).
_CENTRE = _rounded(
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = _rounded(
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)
# Eigen's error function: a ratio of polynomials in x². From the bound on, it is ±1 in float32.
_ERF_NUMERATOR = _rounded(
    *(2.2905065e-4, 3.4082909e-3, 5.0955694e-2, 0.18520832, 1.1283791),
)
_ERF_DENOMINATOR = _rounded(
    *(-1.1791603e-7, 2.3547966e-5, 1.0179626e-3, 1.4070470e-2, 0.11098505, 0.49746925, 1.0),
)
_ERF_BOUND = float32(3.8325069)

# Lanczos' series for the gamma function.
_LANCZOS_BASE, *_LANCZOS = _rounded(
    *(0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.3234287776531, -176.6150291621406),
    *(12.507343278686905, -0.13857109526572012, 9.984369578019571e-6, 1.5056327351493116e-7),
)
_LOG_7_5, _LOG_ROOT_2_PI = _rounded(math.log(7.5), math.log(2 * math.pi) / 2)

_LARGEST = (2 - 2.0**-23) * 2.0**127


def _overridable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def public(*args: Any) -> Tensor:
        if has_torch_function(args):
            return handle_torch_function(public, args, *args)
        return function(*args)

    return public


@_overridable
def multiply_add(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` of float32, rounded once."""
    wide_b, wide_c = (part.double() if isinstance(part, Tensor) else part for part in (b, c))
    return (a.double() * wide_b + wide_c).float()


@_overridable
def log(x: Tensor) -> Tensor:
    """The natural logarithm of float32 numbers, zero and from 2⁻¹²⁶ on, with the bits of XLA."""
    return torch.where(x == 0, -math.inf, _log(x.double()).float())


@_overridable
def log1p(x: Tensor) -> Tensor:
    """``log(1 + x)`` of float32 numbers from −1 on, with the bits of XLA."""
    wide = x.double()
    value = torch.where(x.abs() < _NEAR, _log1p_near(wide), _log(_round(1 + wide))).float()
    return torch.where(x == -1, -math.inf, value)


@_overridable
def exp(x: Tensor) -> Tensor:
    """The exponential function of float32 numbers, with the bits of XLA."""
    wide = x.double().clamp(*_EXP_RANGE)
    exponent = torch.floor(_round(wide * _LOG2_E + 0.5)).clamp(-127, 127)
    rest = _round(_round(wide - exponent * _LN2_HIGH) - exponent * _LN2_LOW)
    total = _round(1 + _round(_polynomial(rest, _EXP) * _round(rest * rest) + rest))
    power_of_two = torch.where(exponent > -127, torch.exp2(exponent), 0.0)
    result = (total * power_of_two).float()
    return torch.where(result >= 2.0**-126, result, 0.0)  # XLA has no denormal numbers


@_overridable
def erf(x: Tensor) -> Tensor:
    """The error function of float32 numbers, with the bits of XLA."""
    wide = x.double().clamp(-_ERF_BOUND, _ERF_BOUND)
    square = _round(wide * wide)
    ratio = _round(wide * _polynomial(square, _ERF_NUMERATOR)) / _polynomial(square, _ERF_DENOMINATOR)
    return torch.where(x.abs() < _ERF_BOUND, ratio.float(), x.sign())


@_overridable
def lgamma(x: Tensor) -> Tensor:
    """The logarithm of the gamma function of float32 numbers from 1 on; XLA's may differ by one unit in the last place.

    Source: Lanczos, "A precision approximation of the gamma function" (1964).
    """
    z = x - 1
    series = torch.full_like(z, _LANCZOS_BASE)
    for position, coefficient in enumerate(_LANCZOS):
        series = series + coefficient / (z + (position + 1))
    shifted = z + 7.5
    logarithm = log1p(z / 7.5) + _LOG_7_5
    return multiply_add(z + 0.5 - shifted / logarithm, logarithm, _LOG_ROOT_2_PI) + log(series)


@_overridable
def power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x ** exponent`` of float32 numbers, rounded once. XLA's may differ by one unit in the last place."""
    return torch.pow(x.double(), exponent.double()).float()


@_overridable
def tan(x: Tensor) -> Tensor:
    """The tangent of float32 numbers, rounded once. XLA's may differ by one unit in the last place."""
    return torch.tan(x.double()).float()


@_overridable
def sqrt(x: Tensor) -> Tensor:
    """The square root of float32 numbers, rounded once, as in XLA; engines may have a faster one."""
    return x.double().sqrt().float()


@_overridable
def erfinv(x: Tensor) -> Tensor:
    """The inverse error function of float32 numbers in (−1, 1), with the bits of XLA."""
    wide = x.double()
    square = _round(-wide * wide)
    w = -torch.where(square > -_NEAR, _log1p_near(square), _log(_round(1 + square)))
    is_central = w < 5
    w = _round(torch.where(is_central, w - 2.5, _round(w.clamp(min=5).sqrt()) - 3))  # the slope of a root at 0: none
    # A choice between two Python numbers would have PyTorch's default dtype, whatever that is.
    coefficients = (
        torch.where(is_central, centre, w.new_full((), tail)) for centre, tail in zip(_CENTRE, _TAIL, strict=True)
    )
    total = next(coefficients)
    for coefficient in coefficients:
        total = _round(total * w + coefficient)
    return (total * wide).float()


@_overridable
def reciprocal_sqrt(x: Tensor) -> Tensor:
    """``1 / √x`` of float32 numbers, rounded once. XLA's has the last bit of the processor's approximation."""
    return (1 / x.double().sqrt()).float()


def step_inside(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 numbers next to two bounds, on their inner side: the next above the one, the next below the other."""
    return -_next_below(-lower), _next_below(upper)


def _next_below(x: Tensor) -> Tensor:
    # Five eighths of the spacing of the mantissas from 1 on: for each mantissa this rounds to the neighbour.
    below = x - (x.abs() * (1.25 * 2.0**-24) + 2.0**-149)
    return torch.where(x.isinf(), x, below).clamp(-_LARGEST, _LARGEST)


def _log(x: Tensor) -> Tensor:
    exponent = torch.floor(torch.log2(x) - _LEAST_MANTISSA)
    y = _round(x * torch.exp2(-exponent)) - 1  # exact, since the rounding removes the error of exp2
    square = _round(y * y)
    cube = _round(square * y)
    first, second, third = (_polynomial(y, _LOG[start : start + 3]) for start in (0, 3, 6))
    total = _round(_round(first * cube + second) * cube + third)
    total = _round(total * cube + _round(exponent * _LN2_LOW))
    return _round(exponent * _LN2_HIGH + _round(_round(y - 0.5 * square) + total))


def _log1p_near(x: Tensor) -> Tensor:
    square = _round(x * x)
    ratio = _round(_polynomial(x, _NUMERATOR) / _polynomial(x, _DENOMINATOR))
    return _round(x + _round(_round(_round(x * square) * ratio) - 0.5 * square))


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    total = _round(x * coefficients[0] + coefficients[1])
    for coefficient in coefficients[2:]:
        total = _round(total * x + coefficient)
    return total


def _round(x: Tensor) -> Tensor:
    """Rounds to float32; the result is float64 again."""
    return x.float().double()
