"""Statements fill buffers; a program is a lowered step: statements that are not scheduled yet.

Printed, a statement is one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from popart_func.engines.native.expressions import Buffer, Expr, Load, index_names, leaves
from popart_func.engines.native.layouts import contiguous

__all__ = [
    "ArgReduce",
    "Cumulate",
    "MatMul",
    "Nested",
    "NestedResult",
    "Pointwise",
    "Program",
    "Reduce",
    "Scatter",
    "Statement",
    "Window",
    "needed",
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


class Window(NamedTuple):
    """A buffer of a scan's body that lies in a stack ``[rounds, ...]``: each round has the next part.

    Attributes:
        part: the body's buffer, which has no memory of its own.
        whole: the stack.
        is_written: whether the body writes it, as it does a y, or reads it, as it does an x.
    """

    part: Buffer
    whole: Buffer
    is_written: bool


@dataclass(frozen=True, eq=False)
class Nested:
    """A loop inside a step: runs programs that read buffers of the program around it.

    A `NestedResult` follows it for each of its results, so that what reads a result waits for the loop.

    Attributes:
        kind: ``"scan"``, ``"while"`` or ``"if"``.
        title: what it does, for people.
        target: stands for the loop in the order of statements.
        parts: the programs: a scan's body, the condition and the body of a while loop, or two branches.
        windows: the xs and ys of a scan.
        loads_of_results: the carry of a while loop; the predicate and the results of a choice.
        length: the rounds of a scan.
        reverse: whether a scan begins with the last x.
    """

    kind: str
    title: str
    target: Load
    parts: tuple[Program, ...]
    windows: tuple[Window, ...] = ()
    loads_of_results: tuple[Load, ...] = ()
    length: int = 0
    reverse: bool = False

    @property
    def changed(self) -> set[Buffer]:
        """The buffers of its carry, which it changes."""
        if self.kind == "scan":
            return set(self.parts[0].inputs[: len(self.parts[0].carry)])
        return {load.buffer for load in self.loads_of_results} if self.kind == "while" else set()

    @property
    def stacks(self) -> tuple[Buffer, ...]:
        """The buffers of a scan's ys. Each round fills a part of them, while later rounds are still to come."""
        return tuple(window.whole for window in self.windows if window.is_written)

    @property
    def chosen(self) -> tuple[Buffer, ...]:
        """The buffers of a choice's results: a branch writes each of them, though nothing may read it."""
        return tuple(load.buffer for load in self.loads_of_results[1:]) if self.kind == "if" else ()

    def loads(self) -> Iterator[Load]:
        """What it reads of the program around it: carries, stacks, and what its parts close over."""
        own = {window.part for window in self.windows}
        buffers = [window.whole for window in self.windows if not window.is_written]
        buffers += [buffer for part in self.parts for buffer in part.inputs if buffer not in own]
        yield from (Load(buffer, contiguous((buffer.numel,))) for buffer in dict.fromkeys(buffers))
        if self.kind == "if":
            yield self.loads_of_results[0]

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.title}".rstrip() + ":"]
        for position, part in enumerate(self.parts):
            lines += ["else:" if self.kind == "if" else "do:"] if position else []
            lines += [f"  {line}" for statement in part.statements for line in str(statement).split("\n")]
            for old, new in zip(part.inputs, part.carry, strict=False):
                lines += [f"  carry {old.name} <- {new.name}"] if new is not None else []
            if self.kind != "scan":
                lines.append(f"  give {', '.join(y.name for y in part.ys)}")
        lines += [f"  {one.part.name} lies in {one.whole.name}" for one in self.windows]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class NestedResult:
    """A result of a loop inside a step: the buffer has it once the loop is over.

    Attributes:
        target: the buffer.
        value: stands for the loop.
        overwrites: whether the buffer was filled before, as that of a carry.
    """

    target: Load
    value: Load
    overwrites: bool = False

    def __str__(self) -> str:
        return f"{self.target} is known"


Statement = Pointwise | Reduce | ArgReduce | Cumulate | Scatter | MatMul | Nested | NestedResult


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
    if isinstance(statement, Nested):
        yield from statement.loads()
        return
    if isinstance(statement, MatMul):
        values = statement.left, statement.right
    else:
        values = (statement.value, *(index.value for index in statement.target.dynamic))
    for value in values:
        yield from (leaf for leaf in leaves(value) if isinstance(leaf, Load))


def writes(statement: Statement) -> Buffer:
    """The buffer that a statement fills or changes."""
    return statement.target.buffer


def needed(statements: Sequence[Statement], outputs: Set[Buffer | None]) -> tuple[Statement, ...]:
    """The statements from which outputs are computed: the gradient of a loss, say, needs the shape of the loss only."""
    used, found = set(outputs), []
    for statement in reversed(statements):
        if writes(statement) in used:
            found.append(statement)
            used |= {load.buffer for load in reads(statement)}
    return tuple(reversed(found))


def _range(value: Expr) -> str:
    """The loop along the last axis."""
    return f"{index_names(value.shape)[-1]} < {value.shape[-1]}"


def _with_shape(load: Load) -> str:
    return f"{load}{list(load.shape)}"
