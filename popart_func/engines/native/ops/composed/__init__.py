"""Ops that are composed of simpler ones: for each a function in PyTorch, which is traced and lowered in its place.

A function is called with the op's arguments in its schema's order, and returns what the op returns. It closes over no
tensor, and reads no values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from popart_func._torch import OpOverload, core_decompositions, schema
from popart_func.engines.native.ops.composed.convolution import CONVOLUTIONS
from popart_func.engines.native.ops.composed.gradients import GRADIENTS
from popart_func.engines.native.ops.composed.indexing import SCATTERS
from popart_func.engines.native.ops.composed.linalg import LINEAR_ALGEBRA
from popart_func.engines.native.ops.composed.order import ORDER
from popart_func.engines.native.ops.composed.pooling import POOLS
from popart_func.engines.native.ops.composed.products import PRODUCTS
from popart_func.engines.native.ops.composed.resampling import RESAMPLING

__all__ = ["COMPOSED", "composition", "is_composed"]

COMPOSED: dict[str, Callable[..., Any]] = {
    **CONVOLUTIONS,
    **POOLS,
    **SCATTERS,
    **ORDER,
    **PRODUCTS,
    **LINEAR_ALGEBRA,
    **GRADIENTS,
    **RESAMPLING,
}
"""Every op that is composed of simpler ones here, by its name in ATen."""

FROM_PYTORCH = frozenset(("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"))
"""The ops that PyTorch's own decomposition composes, though it is none of the core ones."""


def is_composed(name: str) -> bool:
    """Whether an op of this name in ATen is composed of simpler ones."""
    return name in COMPOSED or name in FROM_PYTORCH


@functools.cache
def composition(op: OpOverload) -> Callable[..., Any] | None:
    """The function that composes an op of simpler ones, called with the arguments in its schema's order; else None."""
    name = schema(op).name.removeprefix("aten::") if schema(op) is not None else ""
    if name not in FROM_PYTORCH:
        return COMPOSED.get(name)
    table = core_decompositions()[1]
    if op not in table:
        return None
    decomposed, arguments = table[op], schema(op).arguments

    def function(*values: Any) -> Any:
        positional = [value for argument, value in zip(arguments, values, strict=True) if not argument.kwarg_only]
        named = {argument.name: value for argument, value in zip(arguments, values, strict=True) if argument.kwarg_only}
        return decomposed(*positional, **named)

    return function
