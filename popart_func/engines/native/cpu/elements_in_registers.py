"""The schedule "elements in registers": one lane runs from start to end, its elements fill the vector registers.

It suits wide layers, batches and few lanes. What a lane's step stores lies together and stays in cache; inputs that do
not change are read where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.native.c_code import header, memory_type, special_header
from popart_func.engines.native.cpu.element_loops import SPARE, nest_function
from popart_func.engines.native.cpu.source import ENTRY, CpuSource
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.memory import share_memory
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.schedule import LoopNest

__all__ = ["ElementsInRegisters"]


class ElementsInRegisters:
    """One lane in a block; vectors along the axes of a lane's arrays."""

    def source(self, plan: KernelPlan) -> CpuSource:
        """The source of a kernel.

        Raises:
            UnsupportedError: the step has loops inside.
        """
        if plan.nested:
            raise UnsupportedError(
                "native: the schedule 'elements' has no loops inside a step yet (scan, while_loop, cond): leave the "
                "schedule out, or name 'lanes'."
            )
        plan = share_memory(plan)
        functions: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
        lines, room = _time_loop(plan, functions)
        carry = plan.program.inputs[: len(plan.program.carry)]
        constant = set(plan.program.inputs) - set(carry)
        members = [_member(buffer) for buffer in plan.buffers if buffer not in constant]
        head = [
            "#define BLOCK 1",
            header("cpu/kernel.hpp"),
            header("arithmetic.hpp"),
            special_header(line for _, body in functions for line in body),
            header("cpu/elements.hpp"),
        ]
        block = ["struct Block {", *members, f"  ALIGNED char room[{max(room, 1)}];", "  int32_t bad[L];", "};\n"]
        nests = [
            line
            for (parameters, body), name in functions.items()
            for line in (
                f"static void {name}({', '.join([*parameters, 'int32_t& bad', 'char* room'])}) {{",
                *(f"  {line}" for line in body),
                "}",
            )
        ]
        return CpuSource("\n".join([*head, *block, *nests, *lines, ENTRY]))


def _member(buffer: Buffer) -> str:
    """The room behind a buffer also keeps arrays from lying a multiple of 4096 bytes apart, in one set of the cache."""
    return f"  ALIGNED {memory_type(buffer)} {buffer.name}[{buffer.numel + SPARE}];"


def _time_loop(
    plan: KernelPlan, functions: dict[tuple[tuple[str, ...], tuple[str, ...]], str]
) -> tuple[list[str], int]:
    """The lines that run one lane from the first step to the last, and the bytes that products need for packing.

    ``functions`` takes the functions of the nests.
    """
    program, room = plan.program, 0
    inputs, carries = program.inputs, len(program.carry)
    xs = range(carries, carries + program.xs)
    constant = set(inputs[carries:])

    def calls(nests: Sequence[LoopNest], indent: str) -> list[str]:
        nonlocal room
        called = []
        for nest in nests:
            parameters, body, arguments, needed = nest_function(plan, nest)
            if body:
                name = functions.setdefault((parameters, body), f"nest{len(functions)}")
                room = max(room, needed)
                at = [
                    f"{'' if buffer in constant else 'b.'}{buffer.name}{f' + {offset}' * (offset != 0)}"
                    for buffer, offset in arguments
                ]
                called.append(f"{indent}{name}({', '.join([*at, 'bad', 'b.room'])});")
        return called

    lines = ["static void run_block(const KernelArguments& run, Block& b, const int64_t first, const int) {"]
    lines.append("  int32_t bad = 0;")
    for index, buffer in enumerate(inputs):
        ctype = memory_type(buffer)
        start = f"(const {ctype}*)run.inputs[{index}] + first * run.lane_strides[{index}]"
        if index < carries:
            lines.append(f"  copy<{buffer.numel}>(b.{buffer.name}, {start});" if buffer.numel else "")
        else:
            name = f"begin{index}" if index in xs else buffer.name
            lines.append(f"  const {ctype}* const {name} = {start};")
    lines += calls(plan.once, "  ")
    lines.append("  for (int64_t time = 0; time < run.steps; ++time) {")
    for index in xs:
        ctype = memory_type(inputs[index])
        at = f"begin{index} + time * run.time_strides[{index}]"
        lines.append(f"    const {ctype}* const {inputs[index].name} = {at};")
    lines += calls(plan.always, "    ")
    for old, new in zip(inputs, program.carry, strict=False):
        if new is not None and new not in plan.merged and old.numel:
            lines.append(f"    copy<{old.numel}>(b.{old.name}, b.{new.name});")
    for index, y in enumerate(program.ys, start=carries):
        place = f"(({memory_type(y)}*)run.outputs[{index}]) + (time * run.lanes + first) * {y.numel}"
        if y.numel:
            lines.append(f"    copy<{y.numel}>({place}, b.{plan.merged.get(y, y).name});")
    lines.append("  }")
    for index, buffer in enumerate(inputs[:carries]):
        place = f"(({memory_type(buffer)}*)run.outputs[{index}]) + first * {buffer.numel}"
        if buffer.numel:
            lines.append(f"  copy<{buffer.numel}>({place}, b.{buffer.name});")
    lines += ["  b.bad[0] |= bad;", "}"]
    return [line for line in lines if line], room
