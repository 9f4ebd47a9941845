"""A lowered step as C++: a function that runs a block of lanes from start to end, time outside, lanes innermost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.loops import Body
from popart_func.engines.native.lower import Program
from popart_func.engines.native.ops import C_TYPES
from popart_func.engines.native.schedule import Group, in_place, invariant, schedule
from popart_func.engines.native.statements import reads, writes

__all__ = ["emit"]

SMALL = 32
"""Up to how many numbers of state per lane a block is two registers wide: with one, operations wait for each other.

A step of two numbers is twice as fast so; one of 491 (the network 16-10-10-10-10-1), which then leaves the first-level
cache, takes 1.5 times as long.
"""


def emit(program: Program, carries: int, xs: int) -> str:
    """The C++ source of a kernel.

    Args:
        program: a lowered step; its inputs are the carry, the xs, the hyper-parameters and the constants.
        carries: how many inputs are the carry.
        xs: how many are the xs.
    """
    inputs = program.inputs
    steady = invariant(program.statements, inputs[: carries + xs])
    once = schedule(statement for statement in program.statements if writes(statement) in steady)
    always = schedule(statement for statement in program.statements if writes(statement) not in steady)
    merged = in_place(always, inputs[:carries], program.carry)
    local = _stay_in_registers([*once, *always]) - {*merged, *program.carry, *program.ys}
    body = Body(merged, local)
    with body.block("static void run_block(const Run& run, Block& b, const int64_t first, const int valid)"):
        for index, buffer in enumerate(inputs):
            constant = not carries <= index < carries + xs
            name = f"u{index}" if buffer.uniform and constant else f"p{index}"
            body.line(f"const {_stored(buffer)}* const {name} = (const {_stored(buffer)}*)run.inputs[{index}];")
            if not buffer.uniform and constant:
                body.line(_load(index, buffer))
        for group in once:
            body.group(group)
        with body.block("for (int64_t time = 0; time < run.steps; ++time)"):
            for index in range(carries, carries + xs):
                advance = f"p{index} + time * run.time_strides[{index}]"
                if inputs[index].uniform:
                    body.line(f"const {_stored(inputs[index])}* const u{index} = {advance};")
                else:
                    body.line(_load(index, inputs[index], advance))
            for group in always:
                body.group(group)
            for old, new in zip(inputs[:carries], program.carry, strict=True):
                if new is not None and new not in merged:
                    body.line(f"copy_block<{max(old.numel, 1)}>(b.{old.name}, b.{new.name});")
            for index, y in enumerate(program.ys, start=carries):
                place = f"(({_stored(y)}*)run.outputs[{index}]) + (time * run.lanes + first) * {y.numel}"
                if y.numel:
                    body.line(f"store_lanes<{y.numel}>({place}, b.{merged.get(y, y).name}, valid);")
        for index, carry in enumerate(inputs[:carries]):
            place = f"(({_stored(carry)}*)run.outputs[{index}]) + first * {carry.numel}"
            if carry.numel:
                body.line(f"store_lanes<{carry.numel}>({place}, b.{carry.name}, valid);")
    return "\n".join([_header(program, {*merged, *local}), *body.lines, _ENTRY])


_ENTRY = """
extern "C" __attribute__((visibility("default"))) int32_t run(const Run* run, int threads) {
  return for_each_block<Block>(run->lanes, threads, [run](Block& b, int64_t first, int valid) {
    run_block(*run, b, first, valid);
  });
}
"""


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


def _header(program: Program, elsewhere: set[Buffer]) -> str:
    written = {writes(statement): None for statement in program.statements if writes(statement) not in elsewhere}
    buffers = [buffer for buffer in program.inputs if not buffer.uniform] + list(written)
    floats = [buffer.dtype for buffer in buffers if buffer.dtype.is_floating_point]
    widest = max((dtype.itemsize for dtype in floats), default=4)
    members = "\n".join(
        f"  alignas(64) {_stored(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];" for buffer in buffers
    )
    prelude = Path(__file__).with_name("prelude.hpp").read_text()
    state = sum(buffer.numel for buffer in program.inputs[: len(program.carry)])
    registers = 2 if state <= SMALL else 1
    constants = f"#define WIDEST {widest}\n#define REGISTERS {registers}\n"
    return f"{constants}{prelude}\nstruct Block {{\n{members}\n  alignas(64) int32_t bad[L];\n}};\n"


def _stored(buffer: Buffer) -> str:
    return "uint8_t" if buffer.dtype == torch.bool else C_TYPES[buffer.dtype]


def _load(index: int, buffer: Buffer, time: str | None = None) -> str:
    start = f"({time or f'p{index}'}) + first * run.lane_strides[{index}]"
    return (
        f"load_lanes<{buffer.numel}>(b.{buffer.name}, {start}, run.lane_strides[{index}], valid);"
        if buffer.numel
        else ""
    )
