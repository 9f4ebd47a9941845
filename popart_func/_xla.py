"""XLA's float32 arithmetic on CPUs, to the bit, in plain PyTorch. `random` needs it to draw what JAX draws.

XLA rounds ``a * b + c`` once, and computes logarithms by the polynomials of Cephes. Here numbers are carried in
float64, in which a product of two float32 is exact, and rounded where XLA rounds. (Rounding twice instead of once
changes one result in 2²⁹.) A mode of PyTorch may override the public functions: in `interop.jax.to_jax_function` JAX
computes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["erfinv", "float32", "log", "multiply_add"]


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
    """The natural logarithm of float32 numbers from 2⁻¹²⁶ to 2⁷, with the bits of XLA."""
    return _log(x.double()).float()


@_overridable
def erfinv(x: Tensor) -> Tensor:
    """The inverse error function of float32 numbers in (−1, 1), with the bits of XLA."""
    wide = x.double()
    square = _round(-wide * wide)
    w = -torch.where(square > -_NEAR, _log1p_near(square), _log(_round(1 + square)))
    is_central = w < 5
    w = _round(torch.where(is_central, w - 2.5, _round(w.sqrt()) - 3))
    total = torch.where(is_central, _CENTRE[0], _TAIL[0])
    for centre, tail in zip(_CENTRE[1:], _TAIL[1:], strict=True):
        total = _round(total * w + torch.where(is_central, centre, tail))
    return (total * wide).float()


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
