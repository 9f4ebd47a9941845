"""The ops that compute each element by itself: one line of C++ each, or a small function.

Templates are C++; the functions in them are `arithmetic.hpp`'s. `ops` says how an op is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from popart_func.engines.native.expressions import Const, Expr, Iota, Layout
from popart_func.engines.tracing.step_graph import TensorSpec

if TYPE_CHECKING:
    from popart_func.engines.native.lower import Kernel

__all__ = ["C_TYPES", "POINTWISE", "operand"]

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
"""The dtypes that the engine has, and what they are in C++."""

# Operands are cast to the result's dtype.
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


def operand(kernel: Kernel, value: Any, dtype: torch.dtype) -> Expr:
    """An operand as an expression of a dtype."""
    if isinstance(value, int | float):
        wide = torch.float64 if isinstance(value, float) else torch.int64
        return Const(torch.tensor(value, dtype=wide, device="cpu").to(dtype).item(), dtype)
    return kernel.cast(value, dtype)


def _common_dtype(*operands: Any) -> torch.dtype:
    """PyTorch's promotion: a 0-d tensor or a number only counts where it is of a higher kind."""
    samples = [
        part
        if isinstance(part, int | float)
        else torch.empty((0,) if part.shape else (), dtype=part.dtype, device="meta")
        for part in operands
    ]
    dtype = torch.result_type(samples[0], samples[-1])
    return dtype


def _arithmetic(template: str) -> Callable[..., Expr]:
    def op(kernel: Kernel, out: TensorSpec, *operands: Any) -> Expr:
        used = (part for part in operands if isinstance(part, Expr | int | float))
        return kernel.op(template, out.dtype, *(operand(kernel, part, out.dtype) for part in used))

    return op


def _comparison(template: str) -> Callable[..., Expr]:
    def op(kernel: Kernel, out: TensorSpec, *operands: Any) -> Expr:
        dtype = _common_dtype(*operands)
        return kernel.op(template, out.dtype, *(operand(kernel, part, dtype) for part in operands))

    return op


def _add(kernel: Kernel, out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Expr:
    y = operand(kernel, y, out.dtype)
    if alpha != 1:
        y = kernel.op("{0} * {1}", out.dtype, y, operand(kernel, alpha, out.dtype))
    return kernel.op(
        "{0} | {1}" if out.dtype == torch.bool else "{0} + {1}", out.dtype, operand(kernel, x, out.dtype), y
    )


def _sub(kernel: Kernel, out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Expr:
    y = operand(kernel, y, out.dtype)
    if alpha != 1:
        y = kernel.op("{0} * {1}", out.dtype, y, operand(kernel, alpha, out.dtype))
    return kernel.op("{0} - {1}", out.dtype, operand(kernel, x, out.dtype), y)


def _div(kernel: Kernel, out: TensorSpec, x: Any, y: Any, rounding: str | None = None) -> Expr:
    template = {None: "{0} / {1}", "floor": "divide_floor({0}, {1}, BAD)", "trunc": "divide_trunc({0}, {1}, BAD)"}
    return _arithmetic(template[rounding])(kernel, out, x, y)


def _pow(kernel: Kernel, out: TensorSpec, x: Any, y: Any) -> Expr:
    simple = {0: "1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "math_sqrt({0})", -1: "1 / {0}"}
    if isinstance(y, int | float) and y in simple and (out.dtype.is_floating_point or y >= 0):
        return kernel.op(simple[y], out.dtype, kernel.stored(operand(kernel, x, out.dtype)))
    return _arithmetic("power({0}, {1})")(kernel, out, x, y)


def _clamp(kernel: Kernel, out: TensorSpec, x: Expr, low: Any = None, high: Any = None) -> Expr:
    x = kernel.cast(x, out.dtype)
    if low is not None:
        x = kernel.op("maximum({0}, {1})", out.dtype, x, operand(kernel, low, out.dtype))
    if high is not None:
        x = kernel.op("minimum({0}, {1})", out.dtype, x, operand(kernel, high, out.dtype))
    return x


def _where(kernel: Kernel, out: TensorSpec, condition: Expr, x: Any, y: Any) -> Expr:
    operands = (kernel.cast(condition, torch.bool), *(operand(kernel, part, out.dtype) for part in (x, y)))
    return kernel.op("{0} ? {1} : {2}", out.dtype, *operands)


def _round(kernel: Kernel, out: TensorSpec, x: Expr, decimals: int = 0) -> Expr:
    if not decimals:
        return kernel.op("round_even({0})", out.dtype, x)
    factor = Const(10.0 ** abs(decimals), out.dtype)
    template = "round_even({0} * {1}) / {1}" if decimals > 0 else "round_even({0} / {1}) * {1}"
    return kernel.op(template, out.dtype, x, factor)


def _gelu(kernel: Kernel, out: TensorSpec, x: Expr, approximate: str = "none") -> Expr:
    return kernel.op("gelu_tanh({0})" if approximate == "tanh" else "gelu({0})", out.dtype, x)


def _copy(kernel: Kernel, out: TensorSpec, x: Any, *_: Any) -> Expr:
    return kernel.expand(operand(kernel, x, out.dtype), out.shape)


def _full(kernel: Kernel, out: TensorSpec, _: Any, value: Any = 0, *__: Any) -> Expr:
    return kernel.expand(operand(kernel, value, out.dtype), out.shape)


def _scalar_tensor(kernel: Kernel, out: TensorSpec, value: Any, *_: Any) -> Expr:
    return operand(kernel, value, out.dtype)


def _empty(kernel: Kernel, out: TensorSpec, *_: Any) -> Expr:
    return Const(0, out.dtype, out.shape)


def _arange(kernel: Kernel, out: TensorSpec, start: Any, end: Any, step: Any = 1, *_: Any) -> Expr:
    indices = Iota(Layout(out.shape, (1,)))
    if all(isinstance(value, int) for value in (start, step)):
        return kernel.cast(Iota(Layout(out.shape, (step,), start)), out.dtype)
    operands = (operand(kernel, value, out.dtype) for value in (start, step))
    return kernel.op("{1} + {0} * {2}", out.dtype, kernel.cast(indices, out.dtype), *operands)


POINTWISE: dict[str, Callable[..., Any]] = {
    **{name: _arithmetic(template) for name, template in ARITHMETIC.items()},
    **{name: _comparison(template) for name, template in COMPARISONS.items()},
    **dict.fromkeys(("_to_copy", "clone"), _copy),
    **dict.fromkeys(("full", "full_like"), _full),
    **dict.fromkeys(("empty", "empty_permuted"), _empty),
    "add": _add,
    "sub": _sub,
    "div": _div,
    "pow": _pow,
    "clamp": _clamp,
    "hardtanh": _clamp,
    "where": _where,
    "round": _round,
    "gelu": _gelu,
    "copy": lambda kernel, out, _, source, *__: _copy(kernel, out, source),
    "scalar_tensor": _scalar_tensor,
    "arange": _arange,
}
"""Every op that computes each element by itself, by its name in ATen."""
