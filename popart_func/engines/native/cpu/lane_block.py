"""The function that runs a block of lanes: it calls the functions of the loop nests."""

from __future__ import annotations

from collections.abc import Sequence

from popart_func.engines.native.c_code import memory_type
from popart_func.engines.native.cpu.functions import Functions
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.layouts import StridedLayout, address
from popart_func.engines.native.loops import LoopWriter
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest
from popart_func.engines.native.statements import Nested

__all__ = ["LaneBlockWriter"]


class LaneBlockWriter(LoopWriter):
    """Writes calls of functions in place of loop nests.

    Attributes:
        functions: that it calls.
    """

    def __init__(self, plan: KernelPlan, tile: int) -> None:
        super().__init__(plan, memory="b.", tile=tile)
        self.functions = Functions()
        self._plan = plan

    def nest(self, nest: LoopNest) -> None:
        """Calls the function of a loop nest, or writes a loop inside the step."""
        if isinstance(nest.statements[0], Nested):
            super().nest(nest)
            return
        writer = _NestWriter(self._plan, self._tile)
        writer.nest(nest)
        if writer.lines:
            parameters = [self._parameter(buffer, name) for (buffer, _), name in writer.pointers.items()]
            starts = [f"{self.memory_of(buffer)}{f' + {offset}' * (offset != 0)}" for buffer, offset in writer.pointers]
            if any(writer.bad in line for line in writer.lines):
                parameters.append("int32_t (&bad)[L]")
                starts.append(f"{self.memory}bad")
            self.line(f"{self.functions.name(parameters, writer.lines)}({', '.join(starts)});")

    def _parameter(self, buffer: Buffer, name: str) -> str:
        window = self.storage.windows.get(buffer)
        is_read = buffer.uniform or (window is not None and not window.is_written)
        kind = f"{'const ' * is_read}{memory_type(buffer)}"
        return f"{kind}* {name}" if buffer.uniform else f"{kind} (*{name})[L]"


class _NestWriter(LoopWriter):
    """The lines of one nest's function; ``pointers`` are its parameters: a buffer and an offset -> name."""

    def __init__(self, plan: KernelPlan, tile: int) -> None:
        super().__init__(plan, memory="", tile=tile)
        self.pointers: dict[tuple[Buffer, int], str] = {}

    def place(self, buffer: Buffer, layout: StridedLayout, indices: Sequence[str], moved: str) -> str:
        """An element of a buffer, behind a pointer to the first element of its layout."""
        pointer = self.pointers.setdefault((buffer, layout.offset), f"a{len(self.pointers)}")
        lane = "" if buffer.uniform else "[l]"
        return f"{pointer}[{address(layout._replace(offset=0), indices)}{moved}]{lane}"
