"""Loops inside a step as C++: a loop over rounds, a loop until the last lane is done, or a choice.

A lane that has left a `while_loop`, or takes the other branch of a `cond`, computes along with its block. Its values
and its errors are dropped, and a loop inside does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from popart_func.engines.native.c_code import memory_type
from popart_func.engines.native.expressions import Buffer, Load
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import Nested

__all__ = ["NestWriter", "write_nested"]


@runtime_checkable
class NestWriter(Protocol):
    """What writes the loop nests within a loop's body.

    Attributes:
        lines: so far.
        memory: what stands before a buffer's name.
        mask: C++ that is true in the lanes ``l`` whose values count; None where all do.
    """

    lines: list[str]
    memory: str
    mask: str | None

    def line(self, text: str) -> None:
        """Adds a line."""

    def block(self, head: str) -> AbstractContextManager[None]:
        """A block in braces after a head."""

    def lanes(self) -> AbstractContextManager[None]:
        """The loop over lanes."""

    def nest(self, nest: LoopNest) -> None:
        """Writes a loop nest."""

    def element(self, load: Load, indices: Sequence[str]) -> str:
        """An element of a buffer."""

    def memory_of(self, buffer: Buffer) -> str:
        """The name of the memory of a buffer."""


def write_nested(writer: NestWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    """Writes a loop: its statement, and the plans of its parts."""
    {"scan": _scan, "while": _while, "if": _choice}[statement.kind](writer, statement, plans)


def _scan(writer: NestWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    (plan,) = plans
    number = statement.target.buffer.name[1:]
    _nests(writer, plan.once)
    with writer.block(f"for (int64_t r{number} = 0; r{number} < {statement.length}; ++r{number})"):
        time = f"({statement.length - 1} - r{number})" if statement.reverse else f"r{number}"
        for part, whole, is_written in statement.windows:
            if part.numel:
                kind = memory_type(part) if is_written else f"const {memory_type(part)}"
                name = f"* const {part.name}" if part.uniform else f" (* const {part.name})[L]"
                writer.line(f"{kind}{name} = {writer.memory_of(whole)} + {time} * {part.numel};")
        _nests(writer, plan.always)
        for old, new in zip(plan.program.inputs, plan.program.carry, strict=False):
            if new is not None and new not in plan.merged and old.numel:
                writer.line(f"copy_block<{old.numel}>({writer.memory_of(old)}, {writer.memory_of(new)});")


def _while(writer: NestWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
    condition, body = plans
    going = f"{writer.memory_of(condition.program.ys[0])}[0][l]"
    around = writer.mask
    _nests(writer, [*condition.once, *body.once])
    with writer.block("for (;;)"):
        _nests(writer, condition.always)
        writer.line("bool any = false;")
        counts = going if around is None else f"({going} && {around})"
        writer.line(f"for (int l = 0; l < L; ++l) any |= {counts} != 0;")
        writer.line("if (!any) break;")
        with _masked(writer, going):
            _nests(writer, body.always)
        for load, new in zip(statement.loads_of_results, body.program.ys, strict=True):
            _select(writer, load.buffer, going, writer.memory_of(new), writer.memory_of(load.buffer))


def _choice(writer: NestWriter, statement: Nested, plans: Sequence[KernelPlan]) -> None:
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
                _nests(writer, [*plan.once, *plan.always])
        true, false = (plan.program.ys for plan in plans)
        for load, one, other in zip(results, true, false, strict=True):
            _select(writer, load.buffer, chosen, writer.memory_of(one), writer.memory_of(other))


def _nests(writer: NestWriter, nests: Sequence[LoopNest]) -> None:
    for nest in nests:
        writer.nest(nest)


@contextmanager
def _masked(writer: NestWriter, mask: str) -> Iterator[None]:
    """Within it only the lanes count where a mask is true: errors of others are forgotten."""
    before, start, around = f"{writer.memory}bad[l]", len(writer.lines), writer.mask
    writer.mask = mask if around is None else f"({mask} && {around})"
    yield
    writer.mask = around
    if any("bad[l]" in line for line in writer.lines[start:]):
        written, writer.lines[start:] = writer.lines[start:], []
        writer.line("ALIGNED int32_t kept[L];")
        writer.line(f"LANES kept[l] = {before};")
        writer.lines += written
        writer.line(f"LANES {before} = {mask} ? {before} : kept[l];")


def _select(writer: NestWriter, buffer: Buffer, mask: str, true: str, false: str) -> None:
    target = f"{writer.memory_of(buffer)}[i][l]"
    if buffer.numel:
        writer.line(f"for (int i = 0; i < {buffer.numel}; ++i) LANES {target} = {mask} ? {true}[i][l] : {false}[i][l];")
