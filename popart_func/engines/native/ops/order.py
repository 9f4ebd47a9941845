"""Ops that sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from popart_func.engines.native.expressions import Const, Expr, Iota
from popart_func.engines.native.kernel import Kernel, Lowering
from popart_func.engines.native.layouts import StridedLayout
from popart_func.engines.native.ops.indexing import along
from popart_func.engines.tracing.step_graph import TensorSpec

__all__ = ["ORDER"]


def _sort(kernel: Kernel, outs: Sequence[TensorSpec], x: Expr, *options: Any) -> list[Expr]:
    # The overloads are sort(x, axis, descending) and sort(x, stable, axis, descending). Here every sort is stable.
    axis, descending = options[-2:]
    return _sorted(kernel, x, axis, descending, x.shape[axis] if x.shape else 1)


def _topk(
    kernel: Kernel, outs: Sequence[TensorSpec], x: Expr, count: int, axis: int = -1, largest: bool = True, *_: Any
) -> list[Expr]:
    return _sorted(kernel, x, axis, largest, count)


def _sorted(kernel: Kernel, x: Expr, axis: int, descending: bool, count: int) -> list[Expr]:
    """The first ``count`` sorted values and their former positions. Equal values keep their order; NaN is the greatest.

    The rank of a value is the number of values that come before it. Counting them takes the square of the axis' length,
    but all lanes do the same, so that a register of lanes is sorted at once; a sort that branches could not do that.
    """
    if not x.shape:
        return [x, Const(0, torch.int64)]
    axis %= len(x.shape)
    row = kernel.stored(kernel.last(x, [axis]))
    shape, batch = row.shape, (0,) * (len(row.shape) - 1)
    mine, its = kernel.reshape(row, (*shape, 1)), kernel.reshape(row, (*shape[:-1], 1, shape[-1]))
    where, where_its = (Iota(StridedLayout((*shape, shape[-1]), (*batch, *strides))) for strides in ((1, 0), (0, 1)))
    better = "better_max({0}, {1})" if descending else "better_max({1}, {0})"
    swapped = "better_max({1}, {0})" if descending else "better_max({0}, {1})"
    comes_before = kernel.pointwise(f"{{3}} < {{2}} ? !{better} : {swapped}", torch.int32, mine, its, where, where_its)
    rank = kernel.stored(kernel.reduce(comes_before, [len(shape)], "0", "{0} + {1}"))
    order = kernel.copied(Const(0, torch.int64, shape))
    kernel.scatter(along(order, len(batch), rank), Iota(StridedLayout(shape, (*batch, 1))), "{1}")
    first = kernel.slice(order, len(batch), 0, count)
    back = [*range(axis), len(batch), *range(axis, len(batch))]
    return [kernel.permute(part, back) for part in (along(row, len(batch), first), first)]


ORDER: dict[str, Lowering] = {"sort": _sort, "topk": _topk}
"""Every op that sorts, by its name in ATen."""
