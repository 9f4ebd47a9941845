"""The time loop as C++, which the CPU and CUDA share: reads inputs, runs the loop nests, writes outputs."""

from __future__ import annotations

from popart_func.engines.native.c_code import memory_type
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.loops import LoopWriter
from popart_func.engines.native.plan import KernelPlan

__all__ = ["write_time_loop"]


def write_time_loop(writer: LoopWriter, plan: KernelPlan, *, prefetch: bool = False) -> None:
    """Writes the lines that run a block of lanes from the first step to the last.

    Inputs that all lanes share are read where they lie, under the name ``u`` and their number. The others are copied
    into the lanes' buffers: what is not an x before the time loop, the xs at each step.

    Args:
        writer: takes the lines.
        plan: of the kernel.
        prefetch: whether each step fetches the xs of the next one.
    """
    program = plan.program
    inputs, memory = program.inputs, writer.memory
    carries = len(program.carry)
    xs = range(carries, carries + program.xs)
    for index, buffer in enumerate(inputs):
        constant = index not in xs
        name = f"u{index}" if buffer.uniform and constant else f"p{index}"
        ctype = memory_type(buffer)
        writer.line(f"const {ctype}* const {name} = (const {ctype}*)run.inputs[{index}];")
        if not buffer.uniform and constant:
            writer.line(_load(index, buffer, memory))
    writer.line(writer.between)
    for nest in plan.once:
        writer.nest(nest)
    with writer.block("for (int64_t time = 0; time < run.steps; ++time)"):
        for index in xs:
            advance = f"p{index} + time * run.time_strides[{index}]"
            if inputs[index].uniform:
                writer.line(f"const {memory_type(inputs[index])}* const u{index} = {advance};")
            else:
                writer.line(_load(index, inputs[index], memory, advance))
            if prefetch and inputs[index].numel:
                lane = "" if inputs[index].uniform else f" + first * run.lane_strides[{index}]"
                writer.line(f"prefetch(p{index} + (time + (time + 1 < run.steps)) * run.time_strides[{index}]{lane});")
        writer.line(writer.between if program.xs else "")
        for nest in plan.always:
            writer.nest(nest)
        for old, new in zip(inputs, program.carry, strict=False):
            if new is not None and new not in plan.merged and old.numel:
                writer.copy(old, new)
        for index, y in enumerate(program.ys, start=carries):
            place = f"(({memory_type(y)}*)run.outputs[{index}]) + (time * run.lanes + first) * {y.numel}"
            if y.numel:
                writer.line(f"store_lanes<{y.numel}>({place}, {memory}{plan.merged.get(y, y).name}, valid);")
        writer.line(writer.between)
    for index, carry in enumerate(inputs[:carries]):
        place = f"(({memory_type(carry)}*)run.outputs[{index}]) + first * {carry.numel}"
        if carry.numel:
            writer.line(f"store_lanes<{carry.numel}>({place}, {memory}{carry.name}, valid);")


def _load(index: int, buffer: Buffer, memory: str, time: str | None = None) -> str:
    """The line that copies an input into the lanes' buffer."""
    start = f"({time or f'p{index}'}) + first * run.lane_strides[{index}]"
    return (
        f"load_lanes<{buffer.numel}>({memory}{buffer.name}, {start}, run.lane_strides[{index}], valid);"
        if buffer.numel
        else ""
    )
