"""Ops that read and write elements at computed places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from popart_func.engines.lane_scan import NotLoweredError
from popart_func.engines.native.expressions import Const, DynamicIndex, Expr, Load
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.native.layouts import StridedLayout
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["INDEXING", "along"]


def along(x: Expr, axis: int, index: Expr) -> Load:
    """A buffer ``x``, one axis indexed by an expression of the result's shape: `torch.gather`."""
    assert isinstance(x, Load), "only a buffer can be indexed: store the expression first"
    shape, strides, offset = x.layout
    dynamic = DynamicIndex(index, strides[axis], shape[axis])
    strides = (*strides[:axis], 0, *strides[axis + 1 :])
    return Load(x.buffer, StridedLayout(index.shape, strides, offset), (dynamic,))


def _gather(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr, *_: Any) -> Expr:
    x = kernel.stored(x)
    if not x.shape:
        shapes = (1,), (math.prod(index.shape),)
        x, index = kernel.reshape(x, shapes[0]), kernel.reshape(index, shapes[1])
    return kernel.reshape(along(x, axis % len(x.shape), kernel.stored(index)), out.shape)


def _index_select(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr) -> Expr:
    if not x.shape:
        x = kernel.reshape(x, (1,))
    indices: list[Expr | None] = [None] * (axis % max(len(x.shape), 1))
    return kernel.reshape(_indexed(kernel, kernel.stored(x), [*indices, index], wraps=False), out.shape)


def _embedding(kernel: Kernel, out: TensorSpec, weight: Expr, index: Expr, *_: Any) -> Expr:
    return _indexed(kernel, kernel.stored(weight), [index], wraps=False)


def _index(kernel: Kernel, out: TensorSpec, x: Expr, indices: Sequence[Expr | None]) -> Expr:
    return _indexed(kernel, kernel.stored(x), indices)


def _indexed(kernel: Kernel, x: Load, indices: Sequence[Expr | None], *, wraps: bool = True) -> Load:
    """``x[indices]`` with NumPy's rules.

    The index tensors are broadcast against each other. The axes of the result replace the indexed axes if those are
    neighbours, and come first if they are not.
    """
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if any(index.dtype == torch.bool for index in indices if index is not None):
        raise NotLoweredError("a mask as an index gives a shape that depends on values; use torch.where")
    values = [kernel.stored(index) for index in indices if index is not None]
    shape, strides, offset = x.layout
    if not shape:
        return Load(x.buffer, StridedLayout(values[0].shape, (0,) * len(values[0].shape), offset))
    index_shape: tuple[int, ...] = ()
    for value in values:
        index_shape = tuple(max(a, b) if 0 not in (a, b) else 0 for a, b in _aligned(index_shape, value.shape))
    together = given == list(range(given[0], given[-1] + 1))
    at = given[0] if together else 0
    free = [axis for axis in range(len(shape)) if axis not in given]
    before, after = free[:at], free[at:]
    out_shape = (*(shape[axis] for axis in before), *index_shape, *(shape[axis] for axis in after))
    out_strides = (*(strides[axis] for axis in before), *(0 for _ in index_shape), *(strides[axis] for axis in after))
    dynamic = []
    for axis, value in zip(given, values, strict=True):
        placed = kernel.reshape(kernel.expand(value, index_shape), (*index_shape, *(1 for _ in after)))
        dynamic.append(DynamicIndex(kernel.expand(placed, out_shape), strides[axis], shape[axis], wraps))
    return Load(x.buffer, StridedLayout(out_shape, out_strides, offset), tuple(dynamic))


def _aligned(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """The lengths of two shapes, axis by axis, the last axes side by side."""
    rank = max(len(first), len(second))
    return list(zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in (first, second)), strict=True))


def _index_put(
    kernel: Kernel,
    out: TensorSpec,
    x: Expr,
    indices: Sequence[Expr | None],
    values: Expr,
    accumulate: bool = False,
    *_: Any,
) -> Expr:
    # Writing one value where a mask is true has a fixed shape: it is a `torch.where`.
    masks = [index for index in indices if index is not None and index.dtype == torch.bool]
    if len(masks) == 1 and len(indices) == 1 and math.prod(values.shape) == 1:
        mask = kernel.reshape(masks[0], (*masks[0].shape, *(1 for _ in x.shape[len(masks[0].shape) :])))
        value = kernel.pointwise("{0} + {1}", out.dtype, x, values) if accumulate else values
        return kernel.pointwise("{0} ? {1} : {2}", out.dtype, mask, value, x)
    target = kernel.copied(x)
    place = _indexed(kernel, target, indices)
    values = kernel.expand(kernel.cast(values, out.dtype), place.shape)
    kernel.scatter(place, values, "{0} + {1}" if accumulate else "{1}")
    return target


# How a scattered value and what lies at its place are combined.
_COMBINE = {
    "add": "{0} + {1}",
    "sum": "{0} + {1}",
    "multiply": "{0} * {1}",
    "prod": "{0} * {1}",
    "amax": "maximum({0}, {1})",
    "amin": "minimum({0}, {1})",
    None: "{1}",
}


def _scatter(
    kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr, source: Any, reduce: Any = None, *rest: Any
) -> Expr:
    if reduce not in _COMBINE or (rest and rest[0] is False):
        raise NotLoweredError(f"reduce={reduce!r}, include_self={rest[0] if rest else True}")
    target, index = kernel.copied(x), kernel.stored(index)
    if not isinstance(source, Expr):
        source = Const(source, out.dtype, index.shape)
    for other, size in enumerate(index.shape):
        source = kernel.slice(source, other, 0, size)
    place: Expr = target
    if not x.shape:
        place, index, source = (kernel.reshape(value, (1,)) for value in (target, index, source))
    place = along(place, axis % len(place.shape), index)
    kernel.scatter(place, kernel.cast(source, out.dtype), _COMBINE[reduce])
    return target


def _scatter_add(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr, source: Expr) -> Expr:
    return _scatter(kernel, out, x, axis, index, source, "add")


INDEXING: dict[str, Lowering] = {
    "gather": _gather,
    "index_select": _index_select,
    "embedding": _embedding,
    "index": _index,
    "index_put": _index_put,
    **dict.fromkeys(("scatter", "scatter_reduce"), _scatter),
    "scatter_add": _scatter_add,
}
"""Every op that reads or writes at computed places, by its name in ATen."""
