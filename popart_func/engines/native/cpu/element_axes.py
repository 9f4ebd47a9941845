"""The loops of a nest over the elements of one lane: which axes are one loop, and which loop is the innermost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from popart_func.engines.native.expressions import Expr, Iota, Load, index_names, leaves
from popart_func.engines.native.layouts import StridedLayout

__all__ = ["Axis", "axes_of", "indices_of", "innermost_last", "layouts_of", "strides_of", "without_last"]


class Axis(NamedTuple):
    """A loop over one axis, or over several neighbouring axes that every layout walks through in equal steps.

    Attributes:
        axis: the number of the axis; of several, the last one.
        size: the rounds of the loop.
        contiguous: how many layouts have stride 1 along it.
    """

    axis: int
    size: int
    contiguous: int

    @property
    def name(self) -> str:
        """The name of the index."""
        return f"i{self.axis}"


def layouts_of(*values: Expr) -> list[StridedLayout]:
    """The layouts of the leaves of expressions, those of computed indices included."""
    return [leaf.layout for value in values for leaf in leaves(value) if isinstance(leaf, Load | Iota)]


def strides_of(layout: StridedLayout) -> list[int]:
    """The strides, 0 along axes of length 1."""
    return [stride if size != 1 else 0 for size, stride in zip(layout.shape, layout.strides, strict=True)]


def without_last(layout: StridedLayout) -> StridedLayout:
    """The layout without its last axis."""
    return StridedLayout(layout.shape[:-1], layout.strides[:-1], layout.offset)


def axes_of(shape: Sequence[int], layouts: Sequence[StridedLayout]) -> list[Axis]:
    """The loops over a shape, outermost first.

    Neighbouring axes are one loop where every layout walks through them in equal steps. Axes of length 1 have none.
    """
    groups: list[Axis] = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        contiguous = sum(layout.strides[axis] == 1 for layout in layouts)
        length = size
        if groups and all(layout.strides[groups[-1].axis] == size * layout.strides[axis] for layout in layouts):
            length *= groups.pop().size
        groups.append(Axis(axis, length, contiguous))
    return groups


def innermost_last(axes: Sequence[Axis]) -> list[Axis]:
    """The axes with the one last along which most layouts are contiguous; the others keep their order."""
    if not axes:
        return []
    best = max(axes, key=lambda axis: (axis.contiguous, axis.axis))
    return [*(axis for axis in axes if axis is not best), best]


def indices_of(shape: Sequence[int], axes: Sequence[Axis]) -> list[str]:
    """The index along each axis of a shape: 0 along axes that have no loop of their own."""
    looped = {axis.axis for axis in axes}
    return [name if axis in looped else "0" for axis, name in enumerate(index_names(shape))]
