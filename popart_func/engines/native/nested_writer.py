"""Loops inside a step as C++: a loop over rounds, a loop until lanes are done, or a choice.

`write_nested_of_one` writes the loops of one lane: a `while_loop` ends when that lane is done, and a `cond` runs one of
its branches. `write_nested` writes the loops of a block of lanes, which run together. A lane that has left a
`while_loop`, or takes the other branch of a `cond`, computes along with its block. Its values and its errors are
dropped, and a loop inside does not wait for it. A scan is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from popart_func.engines.native.expressions import Buffer, Load
from popart_func.engines.native.layouts import contiguous
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import Nested, Window

__all__ = ["LaneWriter", "NestWriter", "OneLaneWriter", "write_nested", "write_nested_of_one", "write_nests"]


@runtime_checkable
class NestWriter(Protocol):
    """What writes the loop nests within a loop's body.

    Attributes:
        between: a line that follows each nest, and the copies at the end of a round.
    """

    between: str

    def line(self, text: str) -> None:
        """Adds a line."""

    def block(self, head: str) -> AbstractContextManager[None]:
        """A block in braces after a head."""

    def nest(self, nest: LoopNest) -> None:
        """Writes a loop nest."""

    def copy(self, to: Buffer, source: Buffer) -> None:
        """Adds a line that copies a buffer to another one."""

    def window(self, window: Window, time: str) -> None:
        """Adds a line that declares a part of a stack: the one of a time, which is C++."""


@runtime_checkable
class OneLaneWriter(NestWriter, Protocol):
    """Writes the loop nests of one lane."""

    def flag(self, load: Load) -> str:
        """A single bool in memory as C++."""


@runtime_checkable
class LaneWriter(NestWriter, Protocol):
    """Writes the loop nests of a block of lanes.

    Attributes:
        lines: so far.
        memory: what stands before a buffer's name.
        mask: C++ that is true in the lanes ``l`` whose values count; None where all do.
    """

    lines: list[str]
    memory: str
    mask: str | None

    def lanes(self) -> AbstractContextManager[None]:
        """The loop over lanes."""

    def element(self, load: Load, indices: Sequence[str]) -> str:
        """An element of a buffer."""

    def memory_of(self, buffer: Buffer) -> str:
        """The name of the memory of a buffer."""


def write_nested(writer: LaneWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    """Writes a loop of a block of lanes: its statement, and the plans of its parts."""
    if statement.kind == "scan":
        _scan(writer, statement, *plans)
    elif statement.kind == "while":
        _while(writer, statement, plans)
    else:
        _choice(writer, statement, plans)


def write_nested_of_one(writer: OneLaneWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    """Writes a loop of one lane: its statement, and the plans of its parts."""
    if statement.kind == "scan":
        _scan(writer, statement, *plans)
    elif statement.kind == "while":
        _while_of_one(writer, statement, *plans)
    else:
        _choice_of_one(writer, statement, plans)


def write_nests(writer: NestWriter, nests: Sequence[LoopNest]) -> None:
    """Writes loop nests one after the other."""
    for nest in nests:
        writer.nest(nest)


def _scan(writer: NestWriter, statement: Nested, plan: KernelPlan) -> None:
    number = statement.target.buffer.name[1:]
    write_nests(writer, plan.once)
    with writer.block(f"for (int64_t r{number} = 0; r{number} < {statement.length}; ++r{number})"):
        time = f"({statement.length - 1} - r{number})" if statement.reverse else f"r{number}"
        for window in statement.windows:
            if window.part.numel:
                writer.window(window, time)
        write_nests(writer, plan.always)
        carry = zip(plan.program.inputs, plan.program.carry, strict=False)
        _copy(writer, [(old, new) for old, new in carry if new is not None and new not in plan.merged])


def _copy(writer: NestWriter, pairs: Sequence[tuple[Buffer, Buffer]]) -> None:
    """Copies the second buffer of each pair to the first one."""
    pairs = [(to, source) for to, source in pairs if to.numel]
    for to, source in pairs:
        writer.copy(to, source)
    if pairs:
        writer.line(writer.between)


def _while_of_one(writer: OneLaneWriter, statement: Nested, condition: KernelPlan, body: KernelPlan) -> None:
    first = f"first{statement.target.buffer.name[1:]}"
    write_nests(writer, condition.once)
    with writer.block(f"for (bool {first} = true;; {first} = false)" if body.once else "while (true)"):
        write_nests(writer, condition.always)
        (going,) = condition.program.ys
        writer.line(f"if (!{writer.flag(Load(going, contiguous(())))}) break;")
        if body.once:
            with writer.block(f"if ({first})"):
                write_nests(writer, body.once)
        write_nests(writer, body.always)
        carry = (load.buffer for load in statement.loads_of_results)
        _copy(writer, list(zip(carry, body.program.ys, strict=True)))


def _choice_of_one(writer: OneLaneWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    predicate, *results = statement.loads_of_results
    for head, plan in zip((f"if ({writer.flag(predicate)})", "else"), plans, strict=True):
        with writer.block(head):
            write_nests(writer, [*plan.once, *plan.always])
            _copy(writer, [(load.buffer, new) for load, new in zip(results, plan.program.ys, strict=True)])


def _while(writer: LaneWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    condition, body = plans
    going = f"{writer.memory_of(condition.program.ys[0])}[0][l]"
    around = writer.mask
    write_nests(writer, condition.once)
    with writer.block("for (bool first = true;; first = false)"):
        write_nests(writer, condition.always)
        writer.line("bool any = false;")
        counts = going if around is None else f"({going} && {around})"
        writer.line(f"for (int l = 0; l < L; ++l) any |= {counts} != 0;")
        writer.line("if (!any) break;")
        with _masked(writer, going):
            if body.once:
                with writer.block("if (first)"):
                    write_nests(writer, body.once)
            write_nests(writer, body.always)
        for load, new in zip(statement.loads_of_results, body.program.ys, strict=True):
            _select(writer, load.buffer, going, writer.memory_of(new), writer.memory_of(load.buffer))


def _choice(writer: LaneWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    predicate, *results = statement.loads_of_results
    number = statement.target.buffer.name[1:]
    with writer.block(""):
        writer.line(f"ALIGNED uint8_t p{number}[L];")
        with writer.lanes():
            writer.line(f"p{number}[l] = {writer.element(predicate, [])};")
        chosen = f"p{number}[l]"
        writer.line("bool any[2] = {false, false};")
        writer.line(f"for (int l = 0; l < L; ++l) any[{chosen} != 0] = true;")
        for position, (plan, mask) in enumerate(zip(plans, (chosen, f"!{chosen}"), strict=True)):
            with writer.block(f"if (any[{1 - position}])"), _masked(writer, mask):
                write_nests(writer, [*plan.once, *plan.always])
        true, false = (plan.program.ys for plan in plans)
        for load, one, other in zip(results, true, false, strict=True):
            _select(writer, load.buffer, chosen, writer.memory_of(one), writer.memory_of(other))


@contextmanager
def _masked(writer: LaneWriter, mask: str) -> Iterator[None]:
    """Within it only the lanes count where a mask is true: errors of others are forgotten."""
    before, start, around = f"{writer.memory}bad[l]", len(writer.lines), writer.mask
    writer.mask = mask if around is None else f"({mask} && {around})"
    yield
    writer.mask = around
    if any("bad" in line for line in writer.lines[start:]):
        written, writer.lines[start:] = writer.lines[start:], []
        writer.line("ALIGNED int32_t kept[L];")
        writer.line(f"LANES kept[l] = {before};")
        writer.lines += written
        writer.line(f"LANES {before} = {mask} ? {before} : kept[l];")


def _select(writer: LaneWriter, buffer: Buffer, mask: str, true: str, false: str) -> None:
    target = f"{writer.memory_of(buffer)}[i][l]"
    if buffer.numel:
        writer.line(f"for (int i = 0; i < {buffer.numel}; ++i) LANES {target} = {mask} ? {true}[i][l] : {false}[i][l];")
