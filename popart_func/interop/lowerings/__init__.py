"""The table of lowerings: each ATen op in `jax.numpy`, as a JAX user would write it, so that JAX can transform it.

An op is called with the spec of its result (a list of them if there are several) and its arguments in the schema's
order; tensors among them are arrays. What it returns is cast to the result's dtype. Where a derivative is a matter of
convention (clamp at its bounds, relu at 0), it is PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import torch

from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.interop.lowerings.linalg import LINALG
from popart_func.interop.lowerings.movement import MOVEMENT
from popart_func.interop.lowerings.networks import NETWORKS
from popart_func.interop.lowerings.order import ORDER
from popart_func.interop.trees import jax_dtype, torch_dtype

__all__ = ["LOWERINGS"]

Op = Callable[..., Any]
HIGHEST = jax.lax.Precision.HIGHEST


def _maximum(x: Any, low: Any) -> Any:
    """Where they are equal, the derivative is that of ``x``."""
    return jnp.where((x >= low) | (x != x), x, low)


def _minimum(x: Any, high: Any) -> Any:
    return jnp.where((x <= high) | (x != x), x, high)


def _absolute(x: Any) -> Any:
    """The derivative at 0 is 0."""
    return x * jnp.sign(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


def _sign(x: Any) -> Any:
    if x.dtype == bool:
        return x
    return jnp.where(x != x, 0, jnp.sign(x)) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.sign(x)


def _acosh(x: Any) -> Any:
    """Of complex numbers too the derivative is on the right branch, which JAX's own is not."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.arccosh(x)
    return jnp.log(x + jnp.sqrt(x - 1) * jnp.sqrt(x + 1))


# Operands are cast to the result's dtype.
ARITHMETIC: dict[str, Op] = {
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
    "digamma": lambda x: jnp.where(x == 0, -jnp.copysign(jnp.inf, x), jax.lax.digamma(x)),
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
COMPARISONS: dict[str, Op] = {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    **{name: getattr(jnp, name) for name in ("logical_and", "logical_or", "logical_xor", "logical_not")},
    **{name: getattr(jnp, name) for name in ("isnan", "isinf", "signbit")},
}


def _operand(value: Any, dtype: torch.dtype) -> Any:
    """An operand in a dtype; a number as PyTorch rounds it."""
    if isinstance(value, bool | int | float | complex):
        wide = torch.float64 if isinstance(value, float) else torch.int64
        wide = torch.complex128 if dtype.is_complex else wide
        return np.asarray(torch.tensor(value, dtype=wide).to(dtype).to(wide).item()).astype(jax_dtype(dtype))
    return jnp.asarray(value).astype(jax_dtype(dtype))


def _arithmetic(function: Op) -> Op:
    def op(out: TensorSpec, *operands: Any) -> Any:
        return function(*(_operand(part, out.dtype) for part in operands if part is not None))

    return op


def _comparison(function: Op) -> Op:
    def op(out: TensorSpec, *operands: Any) -> Any:
        samples = [
            part
            if isinstance(part, bool | int | float | complex)
            else torch.empty((0,) if part.ndim else (), dtype=torch_dtype(part.dtype))
            for part in operands
        ]
        dtype = torch.result_type(samples[0], samples[-1])
        return function(*(_operand(part, dtype) for part in operands))

    return op


def _shift(x: Any, by: Any, *, left: bool) -> Any:
    right = (
        jax.lax.shift_right_arithmetic if jnp.issubdtype(x.dtype, jnp.signedinteger) else jax.lax.shift_right_logical
    )
    shift = jax.lax.shift_left if left else right
    return shift(*jnp.broadcast_arrays(x, by))  # XLA gives what PyTorch does for shifts past the width


def _add(out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Any:
    y = _operand(y, out.dtype)
    return jnp.add(_operand(x, out.dtype), y if alpha == 1 else y * _operand(alpha, out.dtype))


def _sub(out: TensorSpec, x: Any, y: Any, alpha: Any = 1) -> Any:
    y = _operand(y, out.dtype)
    return jnp.subtract(_operand(x, out.dtype), y if alpha == 1 else y * _operand(alpha, out.dtype))


def _div(out: TensorSpec, x: Any, y: Any, rounding: str | None = None) -> Any:
    x, y = _operand(x, out.dtype), _operand(y, out.dtype)
    if rounding is None:
        return jnp.true_divide(x, y)
    if rounding == "floor":
        return jnp.floor_divide(x, y) if not out.dtype.is_floating_point else _floor_divide(x, y)
    return jnp.trunc(jnp.true_divide(x, y)) if out.dtype.is_floating_point else jax.lax.div(*jnp.broadcast_arrays(x, y))


def _floor_divide(x: Any, y: Any) -> Any:
    """As PyTorch has it: infinite for a divisor of 0, else exact."""
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
        return jax.lax.integer_pow(_operand(x, out.dtype), int(y))
    if isinstance(y, float) and y == 0.5:
        return jnp.sqrt(_operand(x, out.dtype))
    return jnp.power(_operand(x, out.dtype), _operand(y, out.dtype))


def _clamp(out: TensorSpec, x: Any, low: Any = None, high: Any = None) -> Any:
    x = _operand(x, out.dtype)
    x = x if low is None else _maximum(x, _operand(low, out.dtype))
    return x if high is None else _minimum(x, _operand(high, out.dtype))


def _hardtanh(out: TensorSpec, x: Any, low: Any = -1, high: Any = 1) -> Any:
    """Unlike `_clamp`, without derivative at its bounds."""
    x, low, high = (_operand(part, out.dtype) for part in (x, low, high))
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


def _where(out: TensorSpec, condition: Any, x: Any, y: Any) -> Any:
    return jnp.where(condition.astype(bool), _operand(x, out.dtype), _operand(y, out.dtype))


def _gelu(out: TensorSpec, x: Any, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _round(out: TensorSpec, x: Any, decimals: int = 0) -> Any:
    if not decimals:
        return jnp.round(x)
    factor = 10.0 ** abs(decimals)
    return jnp.round(x * factor) / factor if decimals > 0 else jnp.round(x / factor) * factor


def _axes(x: Any, axes: Any) -> tuple[int, ...]:
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    some = isinstance(axes, list | tuple) and axes and x.ndim
    return tuple(axis % x.ndim for axis in axes) if some else tuple(range(x.ndim))


def _reduction(function: Op) -> Op:
    def op(out: TensorSpec, x: Any, axes: Any = None, *_: Any) -> Any:
        return function(_operand(x, out.dtype), axis=_axes(x, axes)).reshape(out.shape)

    return op


def _mean(out: TensorSpec, x: Any, axes: Any = None, *_: Any) -> Any:
    return jnp.mean(_operand(x, out.dtype), axis=_axes(x, axes)).reshape(out.shape)


def _var(out: TensorSpec, x: Any, axes: Any = None, correction: Any = 1, *_: Any) -> Any:
    axes, x = _axes(x, axes), _operand(x, out.dtype)
    count = math.prod(x.shape[axis] for axis in axes)
    squares = jnp.square(x - jnp.mean(x, axis=axes, keepdims=True)).sum(axes)
    return (squares / max(count - (1 if correction is None else correction), 0.0)).reshape(out.shape)


def _along(function: Op) -> Op:
    """A function along an axis; of a number, as if it were a vector."""

    def op(out: TensorSpec, x: Any, axis: int, *_: Any) -> Any:
        x = _operand(x, out.dtype)
        return function(x, axis=axis % x.ndim) if x.ndim else function(x[None], axis=0)[0]

    return op


def _softmax(x: Any, axis: int) -> Any:
    """Where everything is masked, the derivative is 0, for `scaled_dot_product_attention` to put 0 there."""
    masked = (x == -jnp.inf).all(axis, keepdims=True)
    return jnp.where(masked, jnp.nan, jax.nn.softmax(jnp.where(masked, 0, x), axis))


def _mm(out: TensorSpec, left: Any, right: Any) -> Any:
    return jnp.matmul(left, right, precision=HIGHEST)


def _addmm(out: TensorSpec, bias: Any, left: Any, right: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _mm(out, left, right)
    product = product if alpha == 1 else product * _operand(alpha, out.dtype)
    if beta == 0:
        return jnp.broadcast_to(product, out.shape)
    return (bias if beta == 1 else bias * _operand(beta, out.dtype)) + product


LOWERINGS: dict[str, Op] = {
    "complex": lambda out, x, y: jax.lax.complex(x, y),
    "polar": lambda out, x, y: jax.lax.complex(x * jnp.cos(y), x * jnp.sin(y)),
    "angle": lambda out, x: jnp.angle(x),
    "polygamma": lambda out, order, x: jax.lax.polygamma(jnp.full_like(x, order), x),
    **{name: _arithmetic(function) for name, function in ARITHMETIC.items()},
    **{name: _comparison(function) for name, function in COMPARISONS.items()},
    **MOVEMENT,
    **NETWORKS,
    **LINALG,
    **ORDER,
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
    "hardshrink_backward": lambda out, cotangent, x, bound: jnp.where(jnp.abs(x) <= bound, 0, cotangent),
    "softshrink_backward": lambda out, cotangent, x, bound: jnp.where(jnp.abs(x) <= bound, 0, cotangent),
    "gelu": _gelu,
    "round": _round,
    "sum": _reduction(jnp.sum),
    "prod": _reduction(jnp.prod),
    "amax": _reduction(jnp.max),
    "amin": _reduction(jnp.min),
    "any": _reduction(jnp.any),
    "mean": _mean,
    "var": _var,
    "var_mean": lambda outs, x, axes=None, *rest: [_var(outs[0], x, axes, *rest), _mean(outs[1], x, axes)],
    "_softmax": _along(_softmax),
    "_log_softmax": _along(jax.nn.log_softmax),
    "cumsum": _along(jnp.cumsum),
    "cumprod": _along(jnp.cumprod),
    "logcumsumexp": _along(jax.lax.cumlogsumexp),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "addmv"), _addmm),
}
"""Every op that JAX is given, by its name in ATen."""
