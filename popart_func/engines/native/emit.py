"""A lowered step as C++ for a CPU: it runs a block of lanes from start to end, time outside, lanes innermost.

A block is as many lanes as fill a SIMD register. `emit_cuda` does the same for CUDA devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.loops import Body
from popart_func.engines.native.lower import Program
from popart_func.engines.native.ops import C_TYPES
from popart_func.engines.native.schedule import Group, in_place, invariant, schedule
from popart_func.engines.native.statements import reads, writes

__all__ = ["Plan", "emit", "make_plan", "run_block", "source", "stored"]

SMALL = 32
"""Up to how many numbers of state per lane a block is two registers wide: with one, operations wait for each other.

A step of two numbers is twice as fast so; one of 491 (the network 16-10-10-10-10-1), which then leaves the first-level
cache, takes 1.5 times as long.
"""


class Plan(NamedTuple):
    """A program, scheduled.

    Attributes:
        once: groups to run before the first time step.
        always: groups to run at each.
        merged: from buffers to those that are written in their place.
        buffers: those that need memory.
    """

    once: list[Group]
    always: list[Group]
    merged: dict[Buffer, Buffer]
    local: set[Buffer]
    buffers: list[Buffer]


def emit(program: Program, carries: int, xs: int) -> str:
    """The C++ source of a kernel for a CPU.

    Args:
        program: a lowered step; its inputs are the carry, the xs, the hyper-parameters and the constants.
        carries: how many inputs are the carry.
        xs: how many are the xs.
    """
    plan = make_plan(program, carries, xs)
    body = Body(plan.merged, plan.local, "b.")
    with body.block("static void run_block(const Run& run, Block& b, const int64_t first, const int valid)"):
        run_block(body, plan, program, carries, xs)
    floats = [buffer.dtype for buffer in plan.buffers if buffer.dtype.is_floating_point]
    widest = max((dtype.itemsize for dtype in floats), default=4)
    registers = 2 if sum(buffer.numel for buffer in program.inputs[:carries]) <= SMALL else 1
    members = [f"  ALIGNED {stored(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];" for buffer in plan.buffers]
    head = [f"#define WIDEST {widest}", f"#define REGISTERS {registers}", source("cpu.hpp"), source("arithmetic.hpp")]
    return "\n".join([*head, "struct Block {", *members, "  ALIGNED int32_t bad[L];", "};\n", *body.lines, _ENTRY])


_ENTRY = """
extern "C" __attribute__((visibility("default"))) int32_t run(const Run* run, int threads) {
  return for_each_block<Block>(run->lanes, threads, [run](Block& b, int64_t first, int valid) {
    run_block(*run, b, first, valid);
  });
}
"""


def run_block(body: Body, plan: Plan, program: Program, carries: int, xs: int, *, ahead: bool = False) -> None:
    """The lines that run a block of lanes; ``ahead``: each step fetches what the next one reads."""
    inputs, memory = program.inputs, body.memory
    for index, buffer in enumerate(inputs):
        constant = not carries <= index < carries + xs
        name = f"u{index}" if buffer.uniform and constant else f"p{index}"
        body.line(f"const {stored(buffer)}* const {name} = (const {stored(buffer)}*)run.inputs[{index}];")
        if not buffer.uniform and constant:
            body.line(_load(index, buffer, memory))
    body.line(body.between)
    for group in plan.once:
        body.group(group)
    with body.block("for (int64_t time = 0; time < run.steps; ++time)"):
        for index in range(carries, carries + xs):
            advance = f"p{index} + time * run.time_strides[{index}]"
            if inputs[index].uniform:
                body.line(f"const {stored(inputs[index])}* const u{index} = {advance};")
            else:
                body.line(_load(index, inputs[index], memory, advance))
            if ahead and inputs[index].numel:
                lane = "" if inputs[index].uniform else f" + first * run.lane_strides[{index}]"
                body.line(f"prefetch(p{index} + (time + (time + 1 < run.steps)) * run.time_strides[{index}]{lane});")
        body.line(body.between if xs else "")
        for group in plan.always:
            body.group(group)
        for old, new in zip(inputs[:carries], program.carry, strict=True):
            if new is not None and new not in plan.merged and old.numel:
                body.line(f"copy_block<{old.numel}>({memory}{old.name}, {memory}{new.name});")
        for index, y in enumerate(program.ys, start=carries):
            place = f"(({stored(y)}*)run.outputs[{index}]) + (time * run.lanes + first) * {y.numel}"
            if y.numel:
                body.line(f"store_lanes<{y.numel}>({place}, {memory}{plan.merged.get(y, y).name}, valid);")
        body.line(body.between)
    for index, carry in enumerate(inputs[:carries]):
        place = f"(({stored(carry)}*)run.outputs[{index}]) + first * {carry.numel}"
        if carry.numel:
            body.line(f"store_lanes<{carry.numel}>({place}, {memory}{carry.name}, valid);")


def make_plan(program: Program, carries: int, xs: int) -> Plan:
    """Schedules a program, of whose inputs the first are the carry, and the next the xs."""
    inputs = program.inputs
    steady = invariant(program.statements, inputs[: carries + xs])
    once = schedule(statement for statement in program.statements if writes(statement) in steady)
    always = schedule(statement for statement in program.statements if writes(statement) not in steady)
    merged = in_place(always, inputs[:carries], program.carry)
    local = _stay_in_registers([*once, *always]) - {*merged, *program.carry, *program.ys}
    elsewhere = {*merged, *local}
    written = {writes(statement): None for statement in program.statements if writes(statement) not in elsewhere}
    buffers = [buffer for buffer in inputs if not buffer.uniform] + list(written)
    return Plan(once, always, merged, local, buffers)


def _stay_in_registers(groups: Sequence[Group]) -> set[Buffer]:
    """The buffers that only the group reads which computes them."""
    where = {writes(statement): group for group in groups if group.shape is not None for statement in group.statements}
    elsewhere = {
        load.buffer
        for group in groups
        for statement in group.statements
        for load in reads(statement)
        if where.get(load.buffer) is not group
    }
    return where.keys() - elsewhere


def source(name: str) -> str:
    """What a file beside this one holds."""
    return Path(__file__).with_name(name).read_text()


def stored(buffer: Buffer) -> str:
    """The C++ type of a buffer's elements in memory."""
    return "uint8_t" if buffer.dtype == torch.bool else C_TYPES[buffer.dtype]


def _load(index: int, buffer: Buffer, memory: str, time: str | None = None) -> str:
    start = f"({time or f'p{index}'}) + first * run.lane_strides[{index}]"
    return (
        f"load_lanes<{buffer.numel}>({memory}{buffer.name}, {start}, run.lane_strides[{index}], valid);"
        if buffer.numel
        else ""
    )
