"""Lowerings of pointwise ops; `table` says how an op is called.

Where a derivative is a matter of convention (clamp at its bounds, relu at 0), it is PyTorch's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
import torch

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.operands import Lowering, operand
from popart_func.interop.trees import torch_dtype

__all__ = ["POINTWISE"]


def _maximum(x: Any, low: Any) -> Any:
    """The maximum; of equal numbers the derivative is that of ``x``."""
    return jnp.where((x >= low) | (x != x), x, low)


def _minimum(x: Any, high: Any) -> Any:
    return jnp.where((x <= high) | (x != x), x, high)


def _absolute(x: Any) -> Any:
    """The absolute value; its derivative at 0 is 0."""
    return x * jnp.sign(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


def _sign(x: Any) -> Any:
    if x.dtype == bool:
        return x
    return jnp.where(x != x, 0, jnp.sign(x)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.sign(x)


def _acosh(x: Any) -> Any:
    """The inverse hyperbolic cosine; of complex numbers JAX's own has a derivative on the wrong branch."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.arccosh(x)
    return jnp.log(x + jnp.sqrt(x - 1) * jnp.sqrt(x + 1))


# Operands are cast to the result's dtype.
ARITHMETIC: dict[str, Lowering] = {
    **{name: getattr(jnp, name) for name in ("maximum", "minimum", "hypot", "fmod", "gcd", "lcm")},
    **{name: getattr(jnp, name) for name in ("remainder", "bitwise_and", "bitwise_or", "bitwise_xor", "sqrt")},
    **{name: getattr(jnp, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos")},
    **{name: getattr(jnp, name) for name in ("tan", "sinh", "cosh", "tanh", "floor", "ceil", "trunc")},
    "mul": jnp.multiply,
    "fmax": lambda x, y: jnp.where((x >= y) | (y != y), x, y),  # where they are equal, the derivative is that of x
    "fmin": lambda x, y: jnp.where((x <= y) | (y != y), x, y),
    "copysign": lambda x, y: _absolute(x) * jnp.copysign(jnp.ones_like(y), y),
    "atan2": jnp.arctan2,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "acosh": lambda x: _acosh(x),
    "atanh": jnp.arctanh,
    "neg": jnp.negative,
    "sign": lambda x: _sign(x),
    "rsqrt": jax.lax.rsqrt,
    "reciprocal": lambda x: 1 / x,
    "erf": jax.lax.erf,
    "erfc": jax.lax.erfc,
    "erfinv": jax.lax.erf_inv,
    "lgamma": jax.lax.lgamma,
    "i0": jax.scipy.special.i0,
    "special_i0e": jax.scipy.special.i0e,
    "special_i1": jax.scipy.special.i1,
    "special_i1e": jax.scipy.special.i1e,
    "special_ndtri": jax.scipy.special.ndtri,
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda x: jnp.where((x > 0) | (x != x), x, 0),
    "bitwise_not": jnp.bitwise_not,
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), lambda x, y: _shift(x, y, left=True)),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), lambda x, y: _shift(x, y, left=False)),
}

# Operands are cast to their common dtype.
COMPARISONS: dict[str, Lowering] = {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    **{name: getattr(jnp, name) for name in ("logical_and", "logical_or", "logical_xor", "logical_not")},
    **{name: getattr(jnp, name) for name in ("isnan", "isinf", "signbit")},
}


def _arithmetic(function: Lowering) -> Lowering:
    def op(out: TensorSpec, *operands: Any) -> Any:
        return function(*(operand(part, out.dtype) for part in operands if part is not None))

    return op


def _comparison(function: Lowering) -> Lowering:
    def op(out: TensorSpec, *operands: Any) -> Any:
        samples = [
            part
            if isinstance(part, bool | int | float | complex)
            else torch.empty((0,) if part.ndim else (), dtype=torch_dtype(part.dtype))
            for part in operands
        ]
        dtype = torch.result_type(samples[0], samples[-1])
        return function(*(operand(part, dtype) for part in operands))

    return op


def _shift(x: Any, by: Any, *, left: bool) -> Any:
    right = (
        jax.lax.shift_right_arithmetic if jnp.issubdtype(x.dtype, jnp.signedinteger) else jax.lax.shift_right_logical
    )
    shift = jax.lax.shift_left if left else right
    return shift(*jnp.broadcast_arrays(x, by))  # XLA gives what PyTorch does for shifts past the width


def _add(out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Any:
    y = operand(y, out.dtype)
    return jnp.add(operand(x, out.dtype), y if alpha == 1 else y * operand(alpha, out.dtype))


def _sub(out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Any:
    y = operand(y, out.dtype)
    return jnp.subtract(operand(x, out.dtype), y if alpha == 1 else y * operand(alpha, out.dtype))


def _div(out: TensorSpec, x: Any, y: Any, rounding: str | None = None) -> Any:
    x, y = operand(x, out.dtype), operand(y, out.dtype)
    if rounding is None:
        return jnp.true_divide(x, y)
    if rounding == "floor":
        return jnp.floor_divide(x, y) if not out.dtype.is_floating_point else _floor_divide(x, y)
    return jnp.trunc(jnp.true_divide(x, y)) if out.dtype.is_floating_point else jax.lax.div(*jnp.broadcast_arrays(x, y))


def _floor_divide(x: Any, y: Any) -> Any:
    """The floor of the quotient as PyTorch computes it: infinite for a divisor of 0, else exact."""
    rest = jnp.fmod(x, y)
    quotient = (x - rest) / y
    quotient = jnp.where((rest != 0) & ((y < 0) != (rest < 0)), quotient - 1, quotient)
    return jnp.where(y == 0, x / y, jnp.round(quotient))


def _pow(out: TensorSpec, x: Any, y: Any) -> Any:
    if (
        isinstance(y, int | float)
        and float(y).is_integer()
        and abs(y) <= 64
        and (out.dtype.is_floating_point or y >= 0)
    ):
        return jax.lax.integer_pow(operand(x, out.dtype), int(y))
    if isinstance(y, float) and y == 0.5:
        return jnp.sqrt(operand(x, out.dtype))
    return jnp.power(operand(x, out.dtype), operand(y, out.dtype))


def _clamp(out: TensorSpec, x: Any, low: Any = None, high: Any = None) -> Any:
    x = operand(x, out.dtype)
    x = x if low is None else _maximum(x, operand(low, out.dtype))
    return x if high is None else _minimum(x, operand(high, out.dtype))


def _hardtanh(out: TensorSpec, x: Any, low: Any = -1, high: Any = 1) -> Any:
    """Clamps; unlike that of `_clamp`, its derivative at the bounds is 0."""
    x, low, high = (operand(part, out.dtype) for part in (x, low, high))
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


def _where(out: TensorSpec, condition: Any, x: Any, y: Any) -> Any:
    return jnp.where(condition.astype(bool), operand(x, out.dtype), operand(y, out.dtype))


def _gelu(out: TensorSpec, x: Any, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _round(out: TensorSpec, x: Any, decimals: int = 0) -> Any:
    if not decimals:
        return jnp.round(x)
    factor = 10.0 ** abs(decimals)
    return jnp.round(x * factor) / factor if decimals > 0 else jnp.round(x / factor) * factor


POINTWISE: dict[str, Lowering] = {
    **{name: _arithmetic(function) for name, function in ARITHMETIC.items()},
    **{name: _comparison(function) for name, function in COMPARISONS.items()},
    "complex": lambda out, x, y: jax.lax.complex(*jnp.broadcast_arrays(x, y)),
    "polar": lambda out, x, y: jax.lax.complex(x * jnp.cos(y), x * jnp.sin(y)),
    "angle": lambda out, x: jnp.angle(x),
    "abs": lambda out, x: jnp.abs(x) if out.dtype != torch_dtype(x.dtype) else _absolute(x),  # of complex numbers real
    "add": _add,
    "sub": _sub,
    "div": _div,
    "pow": _pow,
    "clamp": _clamp,
    "hardtanh": _hardtanh,
    "where": _where,
    **dict.fromkeys(("_conj", "_conj_physical"), lambda out, x: jnp.conj(x)),
    "view_as_real": lambda out, x: jnp.stack([x.real, x.imag], -1),
    "view_as_complex": lambda out, x: jax.lax.complex(x[..., 0], x[..., 1]),
    "gelu": _gelu,
    "round": _round,
}
"""Every pointwise op, by its name in ATen."""
