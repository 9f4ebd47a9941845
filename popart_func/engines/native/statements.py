"""Statements fill buffers; a program is a lowered step: statements that are not scheduled yet.

Printed, a statement is one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from popart_func.engines.native.expressions import Buffer, Expr, Load, index_names, leaves

__all__ = [
    "ArgReduce",
    "Cumulate",
    "MatMul",
    "Pointwise",
    "Program",
    "Reduce",
    "Scatter",
    "Statement",
    "reads",
    "writes",
]


@dataclass(frozen=True, eq=False)
class Pointwise:
    """``target[i] = value[i]``. Axes of length 1 are dropped, so that loops of the same shape can be merged.

    ``overwrites``: an earlier statement has filled the buffer, and this one changes some or all of it.
    """

    target: Load
    value: Expr
    overwrites: bool = False

    def __str__(self) -> str:
        return f"{self.target} = {self.value}"


@dataclass(frozen=True, eq=False)
class Reduce:
    """``target[i] = combine over r of value[i, r]``, in order; ``combine`` is C++ in ``{0}`` (so far) and ``{1}``."""

    target: Load
    value: Expr
    start: str
    combine: str

    def __str__(self) -> str:
        by = f"{self.combine.format('so_far', 'value')}, from {self.start}"
        return f"{self.target} = reduce({by}; {_range(self.value)}; {self.value})"


@dataclass(frozen=True, eq=False)
class ArgReduce:
    """The position r of the first best ``value[i, r]``; ``better`` is C++ in ``{0}`` (new) and ``{1}`` (so far)."""

    target: Load
    value: Expr
    better: str

    def __str__(self) -> str:
        by = self.better.format("value", "best")
        return f"{self.target} = position of the first best({by}; {_range(self.value)}; {self.value})"


@dataclass(frozen=True, eq=False)
class Cumulate:
    """``target[i, r] = combine(target[i, r - 1], value[i, r])`` along the last axis: `cumsum` and the like."""

    target: Load
    value: Expr
    combine: str

    def __str__(self) -> str:
        return f"{self.target} = cumulate({self.combine.format('so_far', 'value')}; {_range(self.value)}; {self.value})"


@dataclass(frozen=True, eq=False)
class Scatter:
    """``target[i, index[i]] = combine(target[i, index[i]], value[i])``, one element after the other."""

    target: Load
    value: Expr
    combine: str

    def __str__(self) -> str:
        return f"{self.target} = {self.combine.format(self.target, self.value)}, one after the other"


@dataclass(frozen=True, eq=False)
class MatMul:
    """``target[b, m, n] = Σ_k left[b, m, k] right[b, k, n]``, k in order."""

    target: Load
    left: Load
    right: Load

    def __str__(self) -> str:
        return f"{self.target} = {_with_shape(self.left)} @ {_with_shape(self.right)}"


Statement = Pointwise | Reduce | ArgReduce | Cumulate | Scatter | MatMul


class Program(NamedTuple):
    """A lowered step.

    Attributes:
        inputs: a buffer for each input of the step and each constant: carry, xs, hyper-parameters, constants.
        xs: how many inputs are xs; they follow the carry.
        statements: in an order in which they may run.
        carry: the buffer that each leaf of the carry becomes; None for a leaf that stays as it is.
        ys: the buffers of the other outputs.
    """

    inputs: tuple[Buffer, ...]
    xs: int
    statements: tuple[Statement, ...]
    carry: tuple[Buffer | None, ...]
    ys: tuple[Buffer, ...]

    @property
    def moving(self) -> tuple[Buffer, ...]:
        """The inputs that change from step to step: carry and xs."""
        return self.inputs[: len(self.carry) + self.xs]


def reads(statement: Statement) -> Iterator[Load]:
    """All loads of a statement, those of computed indices included."""
    values: tuple[Expr, ...]
    if isinstance(statement, MatMul):
        values = statement.left, statement.right
    else:
        values = (statement.value, *(index.value for index in statement.target.dynamic))
    for value in values:
        yield from (leaf for leaf in leaves(value) if isinstance(leaf, Load))


def writes(statement: Statement) -> Buffer:
    """The buffer that a statement fills or changes."""
    return statement.target.buffer


def _range(value: Expr) -> str:
    """The loop along the last axis."""
    return f"{index_names(value.shape)[-1]} < {value.shape[-1]}"


def _with_shape(load: Load) -> str:
    return f"{load}{list(load.shape)}"
