"""The plan of a kernel, which the CPU and CUDA share: a lowered step, scheduled, with memory for its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.partial_writes import read_before_writing
from popart_func.engines.native.schedule import LoopNest, in_place, invariant, schedule, stay_in_registers
from popart_func.engines.native.statements import Nested, Program, Window, writes

__all__ = ["KernelPlan", "Storage", "make_plan"]


class Storage(NamedTuple):
    """Where the buffers of a plan lie, those of the loops inside the step included.

    Attributes:
        merged: buffer -> the one in whose memory it lies, which may itself lie in that of another one.
        local: buffers that need no memory.
        windows: the xs and ys of scans, buffer -> its window: a part of a stack, which moves from round to round.
    """

    merged: dict[Buffer, Buffer]
    local: set[Buffer]
    windows: dict[Buffer, Window]

    def place_of(self, buffer: Buffer) -> Buffer:
        """The buffer in whose memory one lies: perhaps itself."""
        while buffer in self.merged:  # the carry of a loop may lie where the carry around it does
            buffer = self.merged[buffer]
        return buffer


class KernelPlan(NamedTuple):
    """A scheduled program. Printed, it shows its loops.

    Attributes:
        program: the lowered step.
        once: loop nests that run before the first time step.
        always: loop nests that run at each time step.
        merged: new carry buffer -> the old one whose memory it reuses.
        local: buffers that need no memory, since only the loop that computes them reads them.
        buffers: those that need memory in each lane, in the bodies of loops, too.
        nested: for each loop inside the step the plans of its parts.
    """

    program: Program
    once: list[LoopNest]
    always: list[LoopNest]
    merged: dict[Buffer, Buffer]
    local: set[Buffer]
    buffers: list[Buffer]
    nested: dict[Nested, list[KernelPlan]]

    def inner(self) -> Iterator[KernelPlan]:
        """This plan and those of the loops in it, the loops in those included."""
        yield self
        for plans in self.nested.values():
            for plan in plans:
                yield from plan.inner()

    def storage(self) -> Storage:
        """Where all buffers lie."""
        plans = list(self.inner())
        return Storage(
            {new: old for plan in plans for new, old in plan.merged.items()},
            {buffer for plan in plans for buffer in plan.local},
            {window.part: window for plan in plans for loop in plan.nested for window in loop.windows},
        )

    def loops(self) -> dict[Nested, list[KernelPlan]]:
        """For each loop inside the step, those within loops included, the plans of its parts."""
        return {loop: plans for plan in self.inner() for loop, plans in plan.nested.items()}

    def __str__(self) -> str:
        kinds = ["carry"] * len(self.program.carry) + ["x"] * self.program.xs
        lines = [f"{kind} {buffer}" for kind, buffer in zip_longest(kinds, self.program.inputs, fillvalue="input")]
        for head, nests in (("before the time loop:", self.once), ("at each time step:", self.always)):
            if nests:
                lines += [head, *(f"  {line}" for nest in nests for line in str(nest).split("\n"))]
        for old, new in zip(self.program.inputs, self.program.carry, strict=False):
            if new is not None:
                lines.append(f"carry {old.name} <- {new.name}{', in place' if new in self.merged else ''}")
        return "\n".join([*lines, *(f"output {buffer.name}" for buffer in self.program.ys)])


def make_plan(program: Program, windows: Sequence[Window] = ()) -> KernelPlan:
    """Schedules a program; ``windows``: its xs and ys if it is the body of a scan."""
    program = read_before_writing(program)
    old = program.inputs[: len(program.carry)]
    apart = {window.part for window in windows}  # they move from round to round, and have no memory of their own
    steady = invariant(program.statements, {*program.moving, *apart})
    once = schedule(statement for statement in program.statements if writes(statement) in steady)
    always = schedule(statement for statement in program.statements if writes(statement) not in steady)
    merged = in_place(always, old, program.carry)
    local = stay_in_registers([*once, *always]) - {*merged, *program.carry, *program.ys}
    elsewhere = {*merged, *local, *apart}
    written = {writes(statement): None for statement in program.statements if writes(statement) not in elsewhere}
    nested = {
        statement: [make_plan(part, statement.windows) for part in statement.parts]
        for statement in program.statements
        if isinstance(statement, Nested)
    }
    for statement, plans in nested.items():
        for plan in plans:
            inside = (buffer for buffer in plan.buffers if buffer not in plan.program.inputs)
            filled = (*statement.stacks, *statement.chosen, *inside)
            written |= dict.fromkeys(buffer for buffer in filled if buffer not in elsewhere)
    buffers = [buffer for buffer in program.inputs if not buffer.uniform and buffer not in apart] + list(written)
    return KernelPlan(program, once, always, merged, local, buffers, nested)
