"""The source of a kernel for a CPU: it runs a block of lanes from start to end, time outside, lanes innermost.

A block has as many lanes as fill a vector register, or two.
"""

from __future__ import annotations

from typing import NamedTuple

from popart_func.engines.native.c_code import header, memory_type, special_header
from popart_func.engines.native.loops import LoopWriter
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.time_loop import write_time_loop

__all__ = ["CpuSource", "cpu_source"]

SMALL = 32
"""Up to how many numbers of state per lane a block is two registers wide.

With one register, operations wait for each other: a step of two numbers is twice as fast with two registers. A step of
491 numbers (the network 16-10-10-10-10-1) takes 1.5 times as long with two, since it then leaves the first-level cache.
"""


class CpuSource(NamedTuple):
    """A kernel's C++; it exports ``run(const KernelArguments*, int threads)``, which returns the bits of errors."""

    text: str


def cpu_source(plan: KernelPlan) -> CpuSource:
    """Writes the source of a kernel."""
    writer = LoopWriter(plan, memory="b.")
    with writer.block(
        "static void run_block(const KernelArguments& run, Block& b, const int64_t first, const int valid)"
    ):
        write_time_loop(writer, plan)
    floats = [buffer.dtype for buffer in plan.buffers if buffer.dtype.is_floating_point]
    widest = max((dtype.itemsize for dtype in floats), default=4)
    carry = plan.program.inputs[: len(plan.program.carry)]
    registers = 2 if sum(buffer.numel for buffer in carry) <= SMALL else 1
    members = [f"  ALIGNED {memory_type(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];" for buffer in plan.buffers]
    head = [
        f"#define WIDEST {widest}",
        f"#define REGISTERS {registers}",
        header("cpu/kernel.hpp"),
        header("arithmetic.hpp"),
        special_header(writer.lines),
    ]
    block = ["struct Block {", *members, "  ALIGNED int32_t bad[L];", "};\n"]
    return CpuSource("\n".join([*head, *block, *writer.lines, _ENTRY]))


_ENTRY = """
extern "C" __attribute__((visibility("default"))) int32_t run(const KernelArguments* run, int threads) {
  return for_each_block<Block>(run->lanes, threads, [run](Block& b, int64_t first, int valid) {
    run_block(*run, b, first, valid);
  });
}
"""
