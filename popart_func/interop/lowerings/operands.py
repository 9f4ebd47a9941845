"""What lowerings of several kinds share: operands in a dtype, and axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from popart_func.interop.trees import jax_dtype

__all__ = ["Lowering", "axes_of", "operand"]

Lowering = Callable[..., Any]
"""``lowering(out, *arguments)``: see `table`."""


def operand(value: Any, dtype: torch.dtype) -> Any:
    """An operand in a dtype; a Python number is rounded as PyTorch rounds it."""
    if isinstance(value, bool | int | float | complex):
        wide = torch.float64 if isinstance(value, float) else torch.int64
        wide = torch.complex128 if dtype.is_complex else wide
        return np.asarray(torch.tensor(value, dtype=wide).to(dtype).to(wide).item()).astype(jax_dtype(dtype))
    return jnp.asarray(value).astype(jax_dtype(dtype))


def axes_of(x: Any, axes: Any) -> tuple[int, ...]:
    """The axes that an op names, counted from 0; all axes where it names none."""
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    some = isinstance(axes, list | tuple) and axes and x.ndim
    return tuple(axis % x.ndim for axis in axes) if some else tuple(range(x.ndim))
