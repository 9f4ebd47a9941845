"""The schedule "elements in registers": one lane runs from start to end, its elements fill the vector registers.

It suits wide layers, batches and few lanes. What a lane's step stores lies together and stays in cache; inputs that do
not change are read where they lie.
"""

from __future__ import annotations

from popart_func.engines.native.c_code import header, memory_type, special_header
from popart_func.engines.native.cpu.element_block import ElementBlockWriter
from popart_func.engines.native.cpu.element_memory import SPARE
from popart_func.engines.native.cpu.source import ENTRY, CpuSource
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.memory import share_memory
from popart_func.engines.native.plan import KernelPlan

__all__ = ["ElementsInRegisters"]


class ElementsInRegisters:
    """One lane in a block; vectors along the axes of a lane's arrays."""

    def source(self, plan: KernelPlan) -> CpuSource:
        """The source of a kernel."""
        plan = share_memory(plan)
        writer = ElementBlockWriter(plan)
        writer.run_block()
        nests = writer.functions.lines()
        constant = set(plan.program.inputs[len(plan.program.carry) :])
        members = [_member(buffer) for buffer in plan.buffers if buffer not in constant]
        head = [
            "#define BLOCK 1",
            header("cpu/kernel.hpp"),
            header("arithmetic.hpp"),
            special_header(nests),
            header("cpu/elements.hpp"),
        ]
        block = ["struct Block {", *members, f"  ALIGNED char room[{writer.room}];", "  int32_t bad[L];", "};\n"]
        return CpuSource("\n".join([*head, *block, *nests, *writer.lines, ENTRY]))


def _member(buffer: Buffer) -> str:
    """The room behind a buffer also keeps arrays from lying a multiple of 4096 bytes apart, in one set of the cache."""
    return f"  ALIGNED {memory_type(buffer)} {buffer.name}[{buffer.numel + SPARE}];"
