"""What fills buffers: the statements of a step, in the order in which they may run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from popart_func.engines.native.expressions import Buffer, Expr, Load, leaves

__all__ = ["ArgReduce", "MatMul", "Pointwise", "Reduce", "Scan", "Scatter", "Statement", "reads", "writes"]


@dataclass(frozen=True, eq=False)
class Pointwise:
    """``target[i] = value[i]``. Axes of length 1 are gone, so that loops of the same shape can be merged.

    ``overwrites``: the target's buffer has been written before, and some of it is to change.
    """

    target: Load
    value: Expr
    overwrites: bool = False


@dataclass(frozen=True, eq=False)
class Reduce:
    """``target[i] = combine over r of value[i, r]``, in order; ``combine`` is C++ in ``{0}`` (so far) and ``{1}``."""

    target: Load
    value: Expr
    start: str
    combine: str


@dataclass(frozen=True, eq=False)
class ArgReduce:
    """The position r of the first best ``value[i, r]``; ``better`` is C++ in ``{0}`` (new) and ``{1}`` (so far)."""

    target: Load
    value: Expr
    better: str


@dataclass(frozen=True, eq=False)
class Scan:
    """``target[i, r] = combine(target[i, r - 1], value[i, r])`` along the last axis."""

    target: Load
    value: Expr
    combine: str


@dataclass(frozen=True, eq=False)
class Scatter:
    """``target[i, index[i]] = combine(target[i, index[i]], value[i])``, one element after the other."""

    target: Load
    value: Expr
    combine: str


@dataclass(frozen=True, eq=False)
class MatMul:
    """``target[b, m, n] = Σ_k left[b, m, k] right[b, k, n]``, k in order."""

    target: Load
    left: Load
    right: Load


Statement = Pointwise | Reduce | ArgReduce | Scan | Scatter | MatMul


def reads(statement: Statement) -> Iterator[Load]:
    """All loads of a statement."""
    values: tuple[Expr, ...]
    if isinstance(statement, MatMul):
        values = statement.left, statement.right
    else:
        values = (statement.value, *(index.value for index in statement.target.dynamic))
    for value in values:
        yield from (leaf for leaf in leaves(value) if isinstance(leaf, Load))


def writes(statement: Statement) -> Buffer:
    """The buffer that a statement fills."""
    return statement.target.buffer
