"""Loop nests as CUDA C++: those of one lane, which a thread runs or a team of threads."""

from __future__ import annotations

from collections.abc import Sequence

from popart_func.engines.native.expressions import Load
from popart_func.engines.native.layouts import address
from popart_func.engines.native.loops import LoopWriter
from popart_func.engines.native.nested_writer import write_nested_of_one
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.statements import Nested, Window

__all__ = ["CudaWriter"]


class CudaWriter(LoopWriter):
    """Writes the loop nests of a plan for CUDA; a `OneLaneWriter`.

    Args:
        plan: whose nests are written.
        unrolled: loops of at most so many operations in all are unrolled.
        team: whether a team of threads shares a lane, and meets after each nest.
    """

    def __init__(self, plan: KernelPlan, unrolled: int, *, team: bool = False) -> None:
        super().__init__(plan, memory="", unrolled=unrolled, team=team, between="MEET;" if team else "FENCE;")

    def nested(self, statement: Nested, plans: Sequence[KernelPlan]) -> None:
        """Writes a loop inside the step. A team reads one flag in one memory, so all its threads go the same way."""
        write_nested_of_one(self, statement, plans)

    def flag(self, load: Load) -> str:
        """A single bool in memory."""
        lane = "" if load.buffer.uniform else "[0]"
        return f"{self.memory_of(load.buffer)}[{address(load.layout, [])}]{lane}"

    def window(self, window: Window, time: str) -> None:
        """Adds a line that declares a part of a stack."""
        part, whole, _ = window
        self.line(f"const auto {part.name} = part({self.memory_of(whole)}, {time} * {part.numel});")
