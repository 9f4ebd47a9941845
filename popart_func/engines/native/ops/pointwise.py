"""Ops that compute each element by itself: one line of C++ each, or a small function.

Templates are C++; the functions in them come from `arithmetic.hpp` and the target's own header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from popart_func.engines.native.expressions import Const, Expr
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["POINTWISE"]

# Operands are cast to the result's dtype. BAD stands for the lane's error bits, where what went wrong is noted.
ARITHMETIC = {
    "mul": "{0} * {1}",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "fmax": "skipping_maximum({0}, {1})",
    "fmin": "skipping_minimum({0}, {1})",
    "copysign": "math_copysign({0}, {1})",
    "hypot": "math_hypot({0}, {1})",
    "atan2": "math_atan2({0}, {1})",
    "fmod": "modulo_c({0}, {1}, BAD)",
    "remainder": "modulo_python({0}, {1}, BAD)",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "bitwise_left_shift": "shift_left({0}, {1})",
    "bitwise_right_shift": "shift_right({0}, {1})",
    "__lshift__": "shift_left({0}, {1})",
    "__rshift__": "shift_right({0}, {1})",
    "neg": "-{0}",
    "abs": "absolute({0})",
    "sign": "sign({0})",
    "sqrt": "math_sqrt({0})",
    "rsqrt": "1 / math_sqrt({0})",
    "reciprocal": "1 / {0}",
    "exp": "vector_exp({0})",
    "exp2": "vector_exp2({0})",
    "expm1": "vector_expm1({0})",
    "log": "vector_log({0})",
    "log2": "vector_log2({0})",
    "log10": "vector_log10({0})",
    "log1p": "vector_log1p({0})",
    "sin": "vector_sin({0})",
    "cos": "vector_cos({0})",
    "tan": "vector_tan({0})",
    "asin": "vector_asin({0})",
    "acos": "vector_acos({0})",
    "atan": "vector_atan({0})",
    "sinh": "vector_sinh({0})",
    "cosh": "vector_cosh({0})",
    "tanh": "vector_tanh({0})",
    "asinh": "vector_asinh({0})",
    "acosh": "vector_acosh({0})",
    "atanh": "vector_atanh({0})",
    "erf": "vector_erf({0})",
    "erfc": "vector_erfc({0})",
    "sigmoid": "1 / (1 + vector_exp(-{0}))",
    "relu": "maximum({0}, 0)",
    "floor": "round_floor({0})",
    "ceil": "round_ceil({0})",
    "trunc": "round_trunc({0})",
    "bitwise_not": "invert({0})",
}

_ONE = ("lgamma", "digamma", "erfinv", "i0")
_SPECIAL_ONE = (
    *("i0e", "i1", "i1e", "ndtri", "erfcx", "airy_ai", "bessel_j0", "bessel_j1", "bessel_y0", "bessel_y1"),
    *("modified_bessel_i0", "modified_bessel_i1", "modified_bessel_k0", "modified_bessel_k1"),
    *("scaled_modified_bessel_k0", "scaled_modified_bessel_k1", "spherical_bessel_j0"),
)
_TWO = ("igamma", "igammac", "nextafter")
_SPECIAL_TWO = (
    *("zeta", "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
    *(f"{shift}chebyshev_polynomial_{kind}" for shift in ("", "shifted_") for kind in "tuvw"),
)

# Functions of special.hpp.
SPECIAL = {
    **{name: f"special::{name}({{0}})" for name in _ONE},
    **{f"special_{name}": f"special::{name}({{0}})" for name in _SPECIAL_ONE},
    **{name: f"special::{name}({{0}}, {{1}})" for name in _TWO},
    **{f"special_{name}": f"special::{name}({{0}}, {{1}})" for name in _SPECIAL_TWO},
}

# Operands are cast to their common dtype; the result has its own.
COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": "truth({0}) & truth({1})",
    "logical_or": "truth({0}) | truth({1})",
    "logical_xor": "truth({0}) ^ truth({1})",
    "logical_not": "!truth({0})",
    "isnan": "{0} != {0}",
    "isinf": "is_infinite({0})",
    "signbit": "has_sign({0})",
}


def _common_dtype(*operands: Any) -> torch.dtype:
    """The dtype that operands are promoted to: a 0-d tensor or a number counts only if its kind is higher."""
    samples = [
        part
        if isinstance(part, int | float)
        else torch.empty((0,) if part.shape else (), dtype=part.dtype, device="meta")
        for part in operands
    ]
    return torch.result_type(samples[0], samples[-1])


def _arithmetic(template: str) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, *operands: Any) -> Expr:
        used = (part for part in operands if isinstance(part, Expr | int | float))
        return kernel.pointwise(template, out.dtype, *(kernel.operand(part, out.dtype) for part in used))

    return op


def _comparison(template: str) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, *operands: Any) -> Expr:
        dtype = _common_dtype(*operands)
        return kernel.pointwise(template, out.dtype, *(kernel.operand(part, dtype) for part in operands))

    return op


def _sum(sign: str) -> Lowering:
    def op(kernel: Kernel, out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Expr:
        x, y = kernel.operand(x, out.dtype), kernel.operand(y, out.dtype)
        if alpha != 1:
            y = kernel.pointwise("{0} * {1}", out.dtype, y, kernel.operand(alpha, out.dtype))
        # The sum of two bools is their "or"; PyTorch refuses their difference.
        return kernel.pointwise(f"{{0}} {'|' if out.dtype == torch.bool else sign} {{1}}", out.dtype, x, y)

    return op


def _div(kernel: Kernel, out: TensorSpec, x: Any, y: Any, rounding: str | None = None) -> Expr:
    template = {None: "{0} / {1}", "floor": "divide_floor({0}, {1}, BAD)", "trunc": "divide_trunc({0}, {1}, BAD)"}
    return _arithmetic(template[rounding])(kernel, out, x, y)


def _pow(kernel: Kernel, out: TensorSpec, x: Any, y: Any) -> Expr:
    # Stored, since the templates name their operand several times.
    simple = {0: "1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "math_sqrt({0})", -1: "1 / {0}"}
    if isinstance(y, int | float) and y in simple and (out.dtype.is_floating_point or y >= 0):
        return kernel.pointwise(simple[y], out.dtype, kernel.stored(kernel.operand(x, out.dtype)))
    return _arithmetic("power({0}, {1})")(kernel, out, x, y)


def _clamp(kernel: Kernel, out: TensorSpec, x: Expr, low: Any = None, high: Any = None) -> Expr:
    x = kernel.cast(x, out.dtype)
    if low is not None:
        x = kernel.pointwise("maximum({0}, {1})", out.dtype, x, kernel.operand(low, out.dtype))
    if high is not None:
        x = kernel.pointwise("minimum({0}, {1})", out.dtype, x, kernel.operand(high, out.dtype))
    return x


def _where(kernel: Kernel, out: TensorSpec, condition: Expr, x: Any, y: Any) -> Expr:
    operands = (kernel.cast(condition, torch.bool), *(kernel.operand(part, out.dtype) for part in (x, y)))
    return kernel.pointwise("{0} ? {1} : {2}", out.dtype, *operands)


def _round(kernel: Kernel, out: TensorSpec, x: Expr, decimals: int = 0) -> Expr:
    if not decimals:
        return kernel.pointwise("round_even({0})", out.dtype, x)
    factor = Const(10.0 ** abs(decimals), out.dtype)
    template = "round_even({0} * {1}) / {1}" if decimals > 0 else "round_even({0} / {1}) * {1}"
    return kernel.pointwise(template, out.dtype, x, factor)


def _polygamma(kernel: Kernel, out: TensorSpec, order: int, x: Expr) -> Expr:
    return kernel.pointwise(f"special::polygamma_of({{0}}, {int(order)})", out.dtype, kernel.cast(x, out.dtype))


def _frexp(kernel: Kernel, outs: Sequence[TensorSpec], x: Expr) -> list[Expr]:
    parts = zip(("special::mantissa({0})", "special::exponent({0})"), outs, strict=True)
    return [kernel.pointwise(template, out.dtype, x) for template, out in parts]


def _gelu(kernel: Kernel, out: TensorSpec, x: Expr, approximate: str = "none") -> Expr:
    return kernel.pointwise("gelu_tanh({0})" if approximate == "tanh" else "gelu({0})", out.dtype, x)


def _copy(kernel: Kernel, out: TensorSpec, x: Any, *_: Any) -> Expr:
    return kernel.expand(kernel.operand(x, out.dtype), out.shape)


POINTWISE: dict[str, Lowering] = {
    **{name: _arithmetic(template) for name, template in ARITHMETIC.items()},
    **{name: _arithmetic(template) for name, template in SPECIAL.items()},
    **{name: _comparison(template) for name, template in COMPARISONS.items()},
    **dict.fromkeys(("_to_copy", "clone"), _copy),
    "add": _sum("+"),
    "sub": _sum("-"),
    "div": _div,
    "pow": _pow,
    "clamp": _clamp,
    "hardtanh": _clamp,
    "where": _where,
    "round": _round,
    "polygamma": _polygamma,
    "frexp": _frexp,
    "gelu": _gelu,
    "copy": lambda kernel, out, _, source, *__: _copy(kernel, out, source),
}
"""Every op that computes each element by itself, by its name in ATen."""
