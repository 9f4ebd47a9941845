"""Ops that move elements without computing: views, joins, padding, and writes to fixed places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from popart_func.engines.lane_scan import NotLoweredError
from popart_func.engines.native.expressions import Const, Expr
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.native.layouts import StridedLayout
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["MOVEMENT", "VIEWS"]

VIEWS = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze"),
        *("as_strided", "unfold", "select", "slice", "diagonal", "flip", "alias", "detach", "clone"),
    )
)
"""Ops that only show other elements of one tensor; `expand` may show an element several times."""


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

    def view(layout: StridedLayout) -> StridedLayout:
        kept = [axis for axis in range(len(layout.shape)) if axis not in (first, second)]
        strides = (*(layout.strides[axis] for axis in kept), layout.strides[first] + layout.strides[second])
        return StridedLayout(out.shape, strides, layout.offset)

    return kernel.view(x, view)


def _unfold(kernel: Kernel, out: TensorSpec, x: Expr, axis: int, size: int, step: int) -> Expr:
    if not x.shape:  # becomes a vector
        return kernel.slice(kernel.reshape(x, (1,)), 0, 0, size)
    axis %= len(x.shape)

    def view(layout: StridedLayout) -> StridedLayout:
        strides = list(layout.strides)
        strides[axis] *= step
        return StridedLayout(out.shape, (*strides, layout.strides[axis]), layout.offset)

    # Stored, since windows overlap: an expression would be computed again for each.
    return kernel.view(kernel.stored(x), view)


def _as_strided(
    kernel: Kernel, out: TensorSpec, x: Expr, shape: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> Expr:
    # `lower` has checked that the tensor's elements lie in its memory in order, as those of a buffer do.
    return kernel.view(kernel.whole(x), lambda _: StridedLayout(tuple(shape), tuple(strides), offset or 0))


def _as_strided_scatter(
    kernel: Kernel,
    out: TensorSpec,
    x: Expr,
    source: Expr,
    shape: Sequence[int],
    strides: Sequence[int],
    offset: int | None = None,
) -> Expr:
    target = kernel.copied(x)
    part = kernel.view(target, lambda _: StridedLayout(tuple(shape), tuple(strides), offset or 0))
    kernel.store(part, kernel.cast(source, out.dtype), overwrites=True)
    return target


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
        kernel.store(piece, kernel.cast(part, out.dtype))
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
    kernel.store(place, x, overwrites=True)
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
    kernel.store(part, kernel.cast(source, out.dtype), overwrites=True)
    return target


def _diagonal_scatter(
    kernel: Kernel, out: TensorSpec, x: Expr, source: Expr, shift: int = 0, first: int = 0, second: int = 1
) -> Expr:
    target = kernel.copied(x)
    part = _diagonal(kernel, TensorSpec(source.shape, out.dtype, out.device), target, shift, first, second)
    kernel.store(part, kernel.cast(source, out.dtype), overwrites=True)
    return target


MOVEMENT: dict[str, Lowering] = {
    **dict.fromkeys(("view", "unsqueeze", "squeeze"), _view),
    "permute": _permute,
    "expand": _expand,
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "flip": _flip,
    "diagonal": _diagonal,
    "unfold": _unfold,
    "as_strided": _as_strided,
    "as_strided_scatter": _as_strided_scatter,
    "split_with_sizes": _pieces,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "slice_scatter": _slice_scatter,
    "diagonal_scatter": _diagonal_scatter,
}
"""Every op that moves elements to or from fixed places, by its name in ATen."""
