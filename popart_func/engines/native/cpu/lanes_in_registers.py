"""The schedule "lanes in registers": a block of lanes runs from start to end, and fills a vector register, or two.

It suits many lanes of tiny networks, and steps that are made of scalars.
"""

from __future__ import annotations

import torch

from popart_func.engines.native.c_code import header, memory_type, special_header
from popart_func.engines.native.cpu.lane_block import LaneBlockWriter
from popart_func.engines.native.cpu.source import ENTRY, CpuSource
from popart_func.engines.native.loops import TILE
from popart_func.engines.native.memory import share_memory
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.time_loop import write_time_loop

__all__ = ["LanesInRegisters"]

SMALL = 32
"""Up to how many numbers of state per lane a block is two registers wide.

With one register, operations wait for each other: a step of two numbers and a `tanh` takes 1.4 times as long as with
two. A step of 491 numbers (the network 16-10-10-10-10-1) takes 1.6 times as long with two, since it then leaves the
first-level cache.
"""

TILES = {"AVX512": 24}
"""How many sums of a matrix product are kept in registers at once, by the kind of processor; `TILE` on others."""


class LanesInRegisters:
    """As many lanes in a block as fill a vector register, or two."""

    def source(self, plan: KernelPlan) -> CpuSource:
        """The source of a kernel."""
        plan = share_memory(plan)
        capability = torch.backends.cpu.get_cpu_capability()
        writer = LaneBlockWriter(plan, TILES.get(capability, TILE))
        with writer.block(
            "static void run_block(const KernelArguments& run, Block& b, const int64_t first, const int valid)"
        ):
            write_time_loop(writer, plan)
        nests = writer.functions.lines()
        floats = [buffer.dtype for buffer in plan.buffers if buffer.dtype.is_floating_point]
        widest = max((dtype.itemsize for dtype in floats), default=4)
        carry = plan.program.inputs[: len(plan.program.carry)]
        registers = 2 if sum(buffer.numel for buffer in carry) <= SMALL else 1
        members = [
            f"  ALIGNED {memory_type(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];" for buffer in plan.buffers
        ]
        head = [
            f"#define BLOCK ({registers} * REGISTER / {widest})",
            header("cpu/kernel.hpp"),
            header("arithmetic.hpp"),
            special_header(nests),
        ]
        block = ["struct Block {", *members, "  ALIGNED int32_t bad[L];", "};\n"]
        return CpuSource("\n".join([*head, *block, *nests, *writer.lines, ENTRY]))
