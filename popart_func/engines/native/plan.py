"""The plan of a kernel, which the CPU and CUDA share: a lowered step, scheduled, with memory for its buffers."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.partial_writes import read_before_writing
from popart_func.engines.native.schedule import LoopNest, in_place, invariant, schedule, stay_in_registers
from popart_func.engines.native.statements import Program, writes

__all__ = ["KernelPlan", "make_plan"]


class KernelPlan(NamedTuple):
    """A scheduled program. Printed, it shows its loops.

    Attributes:
        program: the lowered step.
        once: loop nests that run before the first time step.
        always: loop nests that run at each time step.
        merged: new carry buffer -> the old one whose memory it reuses.
        local: buffers that need no memory, since only the loop that computes them reads them.
        buffers: those that need memory in each lane.
    """

    program: Program
    once: list[LoopNest]
    always: list[LoopNest]
    merged: dict[Buffer, Buffer]
    local: set[Buffer]
    buffers: list[Buffer]

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


def make_plan(program: Program) -> KernelPlan:
    """Schedules a program."""
    program = read_before_writing(program)
    old = program.inputs[: len(program.carry)]
    steady = invariant(program.statements, program.moving)
    once = schedule(statement for statement in program.statements if writes(statement) in steady)
    always = schedule(statement for statement in program.statements if writes(statement) not in steady)
    merged = in_place(always, old, program.carry)
    local = stay_in_registers([*once, *always]) - {*merged, *program.carry, *program.ys}
    elsewhere = {*merged, *local}
    written = {writes(statement): None for statement in program.statements if writes(statement) not in elsewhere}
    buffers = [buffer for buffer in program.inputs if not buffer.uniform] + list(written)
    return KernelPlan(program, once, always, merged, local, buffers)
