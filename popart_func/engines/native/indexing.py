"""The ops that move elements without computing on them: views, joins, reads and writes at computed places, sorts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from popart_func.engines.native.expressions import (
    Const,
    DynamicIndex,
    Expr,
    Iota,
    Layout,
    Load,
)
from popart_func.engines.tracing.step_graph import TensorSpec

if TYPE_CHECKING:
    from popart_func.engines.native.lower import Kernel

__all__ = ["INDEXING", "NotLoweredError"]


class NotLoweredError(Exception):
    """The op is in the table, but not with these arguments; the message says what of them."""


def _view(kernel: Kernel, out: TensorSpec, x: Expr, *_: Any) -> Expr:
    if out.dtype != x.dtype:
        raise NotLoweredError(f"the bits of {x.dtype} seen as {out.dtype}")
    return kernel.reshape(x, out.shape)


def _permute(kernel: Kernel, out: TensorSpec, x: Expr, axes: Sequence[int]) -> Expr:
    return kernel.permute(x, [axis % len(x.shape) for axis in axes])


def _expand(kernel: Kernel, out: TensorSpec, x: Expr, *_: Any) -> Expr:
    return kernel.expand(x, out.shape)


def _repeat(kernel: Kernel, out: TensorSpec, x: Expr, repeats: Sequence[int]) -> Expr:
    shape = (1,) * (len(repeats) - len(x.shape)) + tuple(x.shape)
    split = tuple(size for axis in range(len(shape)) for size in (1, shape[axis]))
    spread = tuple(size for axis in range(len(shape)) for size in (repeats[axis], shape[axis]))
    return kernel.reshape(kernel.expand(kernel.reshape(x, split), spread), out.shape)


def _slice(
    kernel: Kernel, out: TensorSpec, x: Expr, axis: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Expr:
    axis %= len(x.shape)
    first, _, _ = slice(start, end, step).indices(x.shape[axis])
    return kernel.slice(x, axis, first, out.shape[axis], step)


def _select(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: int) -> Expr:
    axis %= len(x.shape)
    return kernel.select(x, axis, index % x.shape[axis])


def _flip(kernel: Kernel, out: TensorSpec, x: Expr, axes: Sequence[int]) -> Expr:
    for axis in axes:
        x = kernel.slice(x, axis % len(x.shape), x.shape[axis] - 1, x.shape[axis], -1)
    return x


def _diagonal(kernel: Kernel, out: TensorSpec, x: Expr, shift: int = 0, first: int = 0, second: int = 1) -> Expr:
    first, second = first % len(x.shape), second % len(x.shape)
    x = kernel.slice(x, first, max(-shift, 0), out.shape[-1])
    x = kernel.slice(x, second, max(shift, 0), out.shape[-1])

    def view(layout: Layout) -> Layout:
        kept = [axis for axis in range(len(layout.shape)) if axis not in (first, second)]
        strides = (*(layout.strides[axis] for axis in kept), layout.strides[first] + layout.strides[second])
        return Layout(out.shape, strides, layout.offset)

    return kernel.view(x, view)


def _unfold(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, size: int, step: int) -> Expr:
    if not x.shape:  # becomes a vector
        return kernel.slice(kernel.reshape(x, (1,)), 0, 0, size)
    axis %= len(x.shape)

    def view(layout: Layout) -> Layout:
        strides = list(layout.strides)
        strides[axis] *= step
        return Layout(out.shape, (*strides, layout.strides[axis]), layout.offset)

    return kernel.view(kernel.stored(x), view)


def _pieces(kernel: Kernel, outs: Any, x: Expr, lengths: Any, axis: int = 0, *_: Any) -> list[Expr]:
    outs, axis = outs if isinstance(outs, list) else [outs], axis % len(x.shape)
    starts = [sum(out.shape[axis] for out in outs[:position]) for position in range(len(outs))]
    return [kernel.slice(x, axis, start, out.shape[axis]) for start, out in zip(starts, outs, strict=True)]


def _cat(kernel: Kernel, out: TensorSpec, parts: Sequence[Expr], axis: int = 0) -> Expr:
    target, axis, start = kernel.buffer(out.shape, out.dtype), axis % len(out.shape), 0
    for part in parts:
        if part.shape == (0,) and len(out.shape) != 1:  # PyTorch lets an empty vector pass
            continue
        piece = kernel.slice(target, axis, start, part.shape[axis])
        kernel.store(_place(piece), kernel.cast(part, out.dtype))
        start += part.shape[axis]
    return target


def _pad(kernel: Kernel, out: TensorSpec, x: Expr, pads: Sequence[int], value: Any = 0) -> Expr:
    target = kernel.copied(Const(value, out.dtype, out.shape))
    place: Expr = target
    for position in range(len(pads) // 2):
        axis, (before, after) = len(x.shape) - 1 - position, pads[2 * position : 2 * position + 2]
        length = x.shape[axis] + min(before, 0) + min(after, 0)
        x = kernel.slice(x, axis, max(-before, 0), length)
        place = kernel.slice(place, axis, max(before, 0), length)
    kernel.store(_place(place), x, overwrites=True)
    return target


def _slice_scatter(
    kernel: Kernel,
    out: TensorSpec,
    x: Expr,
    source: Expr,
    axis: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Expr:
    target, axis = kernel.copied(x), axis % len(x.shape)
    first, _, _ = slice(start, end, step).indices(x.shape[axis])
    part = kernel.slice(target, axis, first, source.shape[axis], step)
    kernel.store(_place(part), kernel.cast(source, out.dtype), overwrites=True)
    return target


def _diagonal_scatter(
    kernel: Kernel, out: TensorSpec, x: Expr, source: Expr, shift: int = 0, first: int = 0, second: int = 1
) -> Expr:
    target = kernel.copied(x)
    part = _diagonal(kernel, TensorSpec(source.shape, out.dtype, out.device), target, shift, first, second)
    kernel.store(_place(part), kernel.cast(source, out.dtype), overwrites=True)
    return target


def _along(kernel: Kernel, x: Load, axis: int, index: Expr) -> Load:
    """``x``, its axis indexed by an index of the result's shape: `torch.gather`."""
    shape, strides, offset = x.layout
    dynamic = DynamicIndex(index, strides[axis], shape[axis])
    strides = (*strides[:axis], 0, *strides[axis + 1 :])
    return Load(x.buffer, Layout(index.shape, strides, offset), (dynamic,))


def _gather(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr, *_: Any) -> Expr:
    x = kernel.stored(x)
    if not x.shape:
        x, index = _place(kernel.reshape(x, (1,))), kernel.reshape(index, (math.prod(index.shape),))
    return kernel.reshape(_along(kernel, x, axis % len(x.shape), kernel.stored(index)), out.shape)


def _index_select(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr) -> Expr:
    indices: list[Expr | None] = [None] * (axis % max(len(x.shape), 1))
    return _indexed(kernel, kernel.stored(x), [*indices, index], wraps=False)


def _embedding(kernel: Kernel, out: TensorSpec, weight: Expr, index: Expr, *_: Any) -> Expr:
    return _indexed(kernel, kernel.stored(weight), [index], wraps=False)


def _index(kernel: Kernel, out: TensorSpec, x: Expr, indices: Sequence[Expr | None]) -> Expr:
    return _indexed(kernel, kernel.stored(x), indices)


def _indexed(kernel: Kernel, x: Load, indices: Sequence[Expr | None], *, wraps: bool = True) -> Load:
    """``x[indices]``: the index tensors are broadcast, and their axes stand where they stood, or in front if apart."""
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if any(str(index.dtype) == "torch.bool" for index in indices if index is not None):
        raise NotLoweredError("a mask as an index gives a shape that depends on values; use torch.where")
    values = [kernel.stored(index) for index in indices if index is not None]
    shape, strides, offset = x.layout
    if not shape:
        return Load(x.buffer, Layout(values[0].shape, (0,) * len(values[0].shape), offset))
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
    return Load(x.buffer, Layout(out_shape, out_strides, offset), tuple(dynamic))


def _aligned(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
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
    masks = [index for index in indices if index is not None and str(index.dtype) == "torch.bool"]
    if len(masks) == 1 and len(indices) == 1 and math.prod(values.shape) == 1:
        mask = kernel.reshape(masks[0], (*masks[0].shape, *(1 for _ in x.shape[len(masks[0].shape) :])))
        value = kernel.op("{0} + {1}", out.dtype, x, values) if accumulate else values
        return kernel.op("{0} ? {1} : {2}", out.dtype, mask, value, x)
    target = kernel.copied(x)
    place = _indexed(kernel, target, indices)
    values = kernel.expand(kernel.cast(values, out.dtype), place.shape)
    kernel.scatter(place, values, "{0} + {1}" if accumulate else "{1}")
    return target


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
    kernel.scatter(
        _along(kernel, _place(place), axis % len(place.shape), index), kernel.cast(source, out.dtype), _COMBINE[reduce]
    )
    return target


def _scatter_add(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, index: Expr, source: Expr) -> Expr:
    return _scatter(kernel, out, x, axis, index, source, "add")


def _sort(kernel: Kernel, outs: Sequence[TensorSpec], x: Expr, *options: Any) -> list[Expr]:
    # sort(x, axis, descending) and sort(x, stable, axis, descending); here all are stable
    axis, descending = options[-2:]
    return _sorted(kernel, x, axis, descending, x.shape[axis] if x.shape else 1)


def _topk(
    kernel: Kernel, outs: Sequence[TensorSpec], x: Expr, count: int, axis: int = -1, largest: bool = True, *_: Any
) -> list[Expr]:
    return _sorted(kernel, x, axis, largest, count)


def _sorted(kernel: Kernel, x: Expr, axis: int, descending: bool, count: int) -> list[Expr]:
    """The first ``count`` values in order, and where they stood: equal ones as they stood, NaN greater than the rest.

    A value's place is the number of those that come before it. To count them takes the square of the axis' length, but
    it is the same for all lanes, so that they are sorted in one register.
    """
    if not x.shape:
        return [x, Const(0, torch.int64)]
    axis %= len(x.shape)
    row = kernel.stored(kernel.last(x, [axis]))
    shape, batch = row.shape, (0,) * (len(row.shape) - 1)
    mine, its = kernel.reshape(row, (*shape, 1)), kernel.reshape(row, (*shape[:-1], 1, shape[-1]))
    where, where_its = (Iota(Layout((*shape, shape[-1]), (*batch, *strides))) for strides in ((1, 0), (0, 1)))
    better = "better_max({0}, {1})" if descending else "better_max({1}, {0})"
    swapped = "better_max({1}, {0})" if descending else "better_max({0}, {1})"
    comes_before = kernel.op(f"{{3}} < {{2}} ? !{better} : {swapped}", torch.int32, mine, its, where, where_its)
    rank = kernel.stored(kernel.reduce(comes_before, [len(shape)], "0", "{0} + {1}"))
    order = kernel.copied(Const(0, torch.int64, shape))
    kernel.scatter(_along(kernel, order, len(batch), rank), Iota(Layout(shape, (*batch, 1))), "{1}")
    first = kernel.slice(order, len(batch), 0, count)
    back = [*range(axis), len(batch), *range(axis, len(batch))]
    return [kernel.permute(part, back) for part in (_along(kernel, row, len(batch), first), first)]


def _place(expr: Expr) -> Load:
    assert isinstance(expr, Load)
    return expr


INDEXING: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "unsqueeze", "squeeze"), _view),
    "permute": _permute,
    "expand": _expand,
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "flip": _flip,
    "diagonal": _diagonal,
    "unfold": _unfold,
    "split_with_sizes": _pieces,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "slice_scatter": _slice_scatter,
    "diagonal_scatter": _diagonal_scatter,
    "gather": _gather,
    "index_select": _index_select,
    "embedding": _embedding,
    "index": _index,
    "index_put": _index_put,
    **dict.fromkeys(("scatter", "scatter_reduce"), _scatter),
    "scatter_add": _scatter_add,
    "sort": _sort,
    "topk": _topk,
}
"""Every op that moves elements, by its name in ATen."""
