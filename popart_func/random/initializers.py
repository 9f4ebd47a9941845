"""Initial parameters of networks: the initializers of `jax.nn.initializers`, which flax and haiku use, to the bit.

An initializer is a function of a key and a shape. Layouts are JAX's: dense kernels are ``[in, out]``, the transpose of
`torch.nn.Linear.weight`, and convolutions ``[..., in, out]``; ``in_axis`` and ``out_axis`` say where the two are.

>>> lecun_normal()(random.key(0), (2, 3)).shape
torch.Size([2, 3])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from popart_func import random
from popart_func._xla import float32
from popart_func.random._arguments import as_shape, check_dtype

__all__ = [
    "Initializer",
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

Initializer = Callable[..., Tensor]
"""``initializer(key, shape, dtype=None)`` gives float32 parameters of a shape."""

_Axes = int | Sequence[int]


def zeros(key: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An initializer: zeros. It draws nothing, so that the key may be None."""
    return constant(0.0)(key, shape, dtype)


def ones(key: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An initializer: ones. It draws nothing, so that the key may be None."""
    return constant(1.0)(key, shape, dtype)


def constant(value: int | float, dtype: torch.dtype | None = None) -> Initializer:
    """An initializer that fills with a number.

    >>> constant(0.5)(None, (2,))
    tensor([0.5000, 0.5000])
    """

    def initialize(key: Tensor | None, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), value, dtype=torch.float32, device=None if key is None else key.device)

    return _initializer("constant", dtype, initialize)


def uniform(scale: int | float = 1e-2, dtype: torch.dtype | None = None) -> Initializer:
    """An initializer: uniform numbers in ``[0, scale)``.

    >>> uniform(1.0)(random.key(0), (2,))
    tensor([0.9477, 0.9786])
    """
    return _initializer("uniform", dtype, lambda key, shape: random.uniform(key, shape) * scale)


def normal(stddev: int | float = 1e-2, dtype: torch.dtype | None = None) -> Initializer:
    """An initializer: normal numbers of mean 0 and a standard deviation.

    >>> normal(1.0)(random.key(0), (2,))
    tensor([1.6226, 2.0253])
    """
    return _initializer("normal", dtype, lambda key, shape: random.normal(key, shape) * stddev)


def truncated_normal(
    stddev: int | float = 1e-2,
    dtype: torch.dtype | None = None,
    lower: int | float = -2.0,
    upper: int | float = 2.0,
) -> Initializer:
    """An initializer: normal numbers between two bounds, then multiplied by ``stddev``.

    >>> truncated_normal(1.0)(random.key(0), (2,))
    tensor([1.4560, 1.7147])
    """
    return _initializer(
        "truncated_normal", dtype, lambda key, shape: random.truncated_normal(key, lower, upper, shape) * stddev
    )


def variance_scaling(
    scale: int | float,
    mode: str,
    distribution: str,
    in_axis: _Axes = -2,
    out_axis: _Axes = -1,
    batch_axis: _Axes = (),
    dtype: torch.dtype | None = None,
) -> Initializer:
    """An initializer of variance ``scale / n``, where n is the number of inputs or outputs of a unit.

    Args:
        scale: of the variance.
        mode: n: ``"fan_in"``, ``"fan_out"``, or their arithmetic or geometric mean, ``"fan_avg"``, ``"fan_geo_avg"``.
        distribution: ``"truncated_normal"`` (at two standard deviations), ``"normal"`` or ``"uniform"``.
        in_axis: the axis, or axes, of inputs.
        out_axis: the axis, or axes, of outputs.
        batch_axis: axes that count neither way. All others are the receptive field of a convolution.
        dtype: float32.

    Raises:
        ValueError: an unknown mode or distribution; when it is called, a shape without an axis of inputs.

    >>> variance_scaling(2.0, "fan_out", "normal")(random.key(0), (3, 4)).shape
    torch.Size([3, 4])
    """
    if mode not in ("fan_in", "fan_out", "fan_avg", "fan_geo_avg"):
        raise ValueError(
            f"variance_scaling: `mode` must be 'fan_in', 'fan_out', 'fan_avg' or 'fan_geo_avg', got {mode!r}."
        )
    if distribution not in ("truncated_normal", "normal", "uniform"):
        raise ValueError(
            f"variance_scaling: `distribution` must be 'truncated_normal', 'normal' or 'uniform', got {distribution!r}."
        )

    def initialize(key: Tensor, shape: Sequence[int]) -> Tensor:
        fan_in, fan_out = _fans(shape, in_axis, out_axis, batch_axis)
        means = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
        variance = float32(scale / means.get(mode, (fan_in * fan_out) ** 0.5))
        if distribution == "truncated_normal":
            # The constant is the standard deviation of the standard normal distribution between −2 and 2.
            stddev = float32(float32(math.sqrt(variance)) / float32(0.87962566103423978))
            return random.truncated_normal(key, -2, 2, shape) * stddev
        if distribution == "normal":
            return random.normal(key, shape) * float32(math.sqrt(variance))
        return random.uniform(key, shape, minval=-1.0) * float32(math.sqrt(float32(3 * variance)))

    return _initializer("variance_scaling", dtype, initialize)


def glorot_uniform(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: uniform numbers of variance ``2 / (inputs + outputs)`` (Glorot and Bengio, 2010)."""
    return variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis, batch_axis, dtype)


def glorot_normal(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: truncated normal numbers of variance ``2 / (inputs + outputs)`` (Glorot and Bengio, 2010)."""
    return variance_scaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def lecun_uniform(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: uniform numbers of variance ``1 / inputs`` (LeCun et al., 1998)."""
    return variance_scaling(1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


def lecun_normal(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: truncated normal numbers of variance ``1 / inputs``, the default of flax (LeCun et al., 1998)."""
    return variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


def he_uniform(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: uniform numbers of variance ``2 / inputs`` (He et al., 2015)."""
    return variance_scaling(2.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, dtype)


def he_normal(
    in_axis: _Axes = -2, out_axis: _Axes = -1, batch_axis: _Axes = (), dtype: torch.dtype | None = None
) -> Initializer:
    """An initializer: truncated normal numbers of variance ``2 / inputs`` (He et al., 2015)."""
    return variance_scaling(2.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis, dtype)


# JAX's second names.
xavier_uniform, xavier_normal = glorot_uniform, glorot_normal
kaiming_uniform, kaiming_normal = he_uniform, he_normal


def orthogonal(scale: int | float = 1.0, column_axis: int = -1, dtype: torch.dtype | None = None) -> Initializer:
    """An initializer: a random orthogonal matrix, times a scale (Saxe et al., 2014). JAX's to rounding.

    Args:
        scale: a factor.
        column_axis: the axis of columns; all others are the rows.
        dtype: float32.

    >>> matrix = orthogonal()(random.key(0), (2, 2))
    >>> torch.allclose(matrix @ matrix.mT, torch.eye(2), atol=1e-6)
    True
    """

    def initialize(key: Tensor, shape: Sequence[int]) -> Tensor:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: `shape` must have at least two axes, got {tuple(shape)}.")
        if not all(shape):
            return torch.zeros(tuple(shape), dtype=torch.float32, device=key.device)
        columns = shape[column_axis]
        rest = list(shape)
        del rest[column_axis]
        matrix = random.orthogonal(key, math.prod(rest), m=columns)
        return matrix.reshape(*rest, columns).movedim(-1, column_axis) * scale

    return _initializer("orthogonal", dtype, initialize)


def delta_orthogonal(scale: int | float = 1.0, column_axis: int = -1, dtype: torch.dtype | None = None) -> Initializer:
    """An initializer: an orthogonal matrix at the centre of a convolution, zeros around it (Xiao et al., 2018).

    >>> delta_orthogonal()(random.key(0), (3, 2, 4)).abs().sum((1, 2)) > 0
    tensor([False,  True, False])
    """

    def initialize(key: Tensor, shape: Sequence[int]) -> Tensor:
        if len(shape) not in (3, 4, 5):
            raise ValueError(f"delta_orthogonal: `shape` must have three, four or five axes, got {tuple(shape)}.")
        if shape[-1] < shape[-2]:
            raise ValueError(f"delta_orthogonal: can't have fewer outputs than inputs, got shape {tuple(shape)}.")
        matrix = orthogonal(scale, column_axis)(key, shape[-2:])
        padding = [0, 0, 0, 0]
        for size in reversed(shape[:-2]):
            padding += [(size - 1) // 2, size - 1 - (size - 1) // 2]
        return torch.nn.functional.pad(matrix.reshape(*(1 for _ in shape[:-2]), *shape[-2:]), padding)

    return _initializer("delta_orthogonal", dtype, initialize)


def _initializer(name: str, default: torch.dtype | None, initialize: Callable[..., Tensor]) -> Initializer:
    check_dtype(name, default)

    def initializer(key: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        check_dtype(name, dtype)
        return initialize(key, as_shape(name, shape))

    return initializer


def _fans(shape: Sequence[int], in_axis: _Axes, out_axis: _Axes, batch_axis: _Axes) -> tuple[float, float]:
    """The numbers of inputs and outputs of a unit."""
    if in_axis == -2 and len(shape) < 2:
        raise ValueError(
            f"variance_scaling: `shape` must have at least two axes, or `in_axis` be given, got {tuple(shape)}."
        )
    inputs, outputs, batch = (
        shape[axes] if isinstance(axes, int) else math.prod(shape[axis] for axis in axes)
        for axes in (in_axis, out_axis, batch_axis)
    )
    field = math.prod(shape) / inputs / outputs / batch
    return inputs * field, outputs * field
