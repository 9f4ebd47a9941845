"""A lowered step as C++: a function that runs a block of lanes from start to end, time outside, lanes innermost.

On a CPU a block is as many lanes as fill a SIMD register; on a CUDA device it is one lane, which a thread runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.loops import Body
from popart_func.engines.native.lower import Program
from popart_func.engines.native.ops import C_TYPES
from popart_func.engines.native.schedule import Group, in_place, invariant, schedule
from popart_func.engines.native.statements import reads, writes

__all__ = ["CudaSource", "emit", "emit_cuda"]

SMALL = 32
"""Up to how many numbers of state per lane a block is two registers wide: with one, operations wait for each other.

A step of two numbers is twice as fast so; one of 491 (the network 16-10-10-10-10-1), which then leaves the first-level
cache, takes 1.5 times as long.
"""


class _Plan(NamedTuple):
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
    plan = _plan(program, carries, xs)
    body = Body(plan.merged, plan.local, "b.")
    with body.block("static void run_block(const Run& run, Block& b, const int64_t first, const int valid)"):
        _run_block(body, plan, program, carries, xs)
    floats = [buffer.dtype for buffer in plan.buffers if buffer.dtype.is_floating_point]
    widest = max((dtype.itemsize for dtype in floats), default=4)
    registers = 2 if sum(buffer.numel for buffer in program.inputs[:carries]) <= SMALL else 1
    members = [f"  ALIGNED {_stored(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];" for buffer in plan.buffers]
    head = [f"#define WIDEST {widest}", f"#define REGISTERS {registers}", _text("cpu.hpp"), _text("arithmetic.hpp")]
    return "\n".join([*head, "struct Block {", *members, "  ALIGNED int32_t bad[L];", "};\n", *body.lines, _ENTRY])


_ENTRY = """
extern "C" __attribute__((visibility("default"))) int32_t run(const Run* run, int threads) {
  return for_each_block<Block>(run->lanes, threads, [run](Block& b, int64_t first, int valid) {
    run_block(*run, b, first, valid);
  });
}
"""


# How a kernel for a CUDA device uses it. These were chosen by what ptxas reports for sm_90; none has been tuned, and
# nothing has been timed, on hardware.

UNROLLED = 2048
"""Loops of at most so many operations are unrolled, so that small buffers can live in registers.

The paper's step is all unrolled so: 255 registers, no spill, about 5100 instructions. With all of Adam's step unrolled
NVRTC took 14 s for it; so it takes 2 s.
"""

UNROLLED_LOCAL = 512
"""The same, where large buffers are in local memory."""

IN_REGISTERS = 32
"""Buffers of at most so many numbers may live in a thread's registers: they are local arrays, that is."""

THREADS = 128
"""Threads of a block, at most, where no shared memory is needed."""

WARP = 32
"""Threads of a block, at most, where shared memory is needed: the less a block needs, the better blocks fill it.

The paper's step needs 58,880 bytes for a warp, so that three warps share a multiprocessor with 227 KiB.
"""

LARGEST = 32 * 1024
"""Bytes of a lane, at most: local memory is set aside for as many threads as the device can hold, not for the lanes."""


class CudaSource(NamedTuple):
    """A kernel for a CUDA device.

    Attributes:
        text: its source, for NVRTC. It defines ``run_lanes``, whose one argument is `Run`: eight bytes for each input's
            address, lane stride and time stride (in elements), each output's address, lanes, steps and the address of
            an ``int32_t`` that takes the errors' bits.
        threads: of a block, at most.
        shared: bytes of dynamic shared memory that a block needs.
        checked: whether it may find errors.
    """

    text: str
    threads: int
    shared: int
    checked: bool


def emit_cuda(program: Program, carries: int, xs: int, shared: int) -> CudaSource:
    """The source of a kernel for a CUDA device: a thread runs a lane.

    Small buffers are the thread's own arrays. The larger ones lie in shared memory if it holds all of them, else in
    local memory too, which the hardware interleaves over threads.

    Args:
        program: a lowered step; its inputs are the carry, the xs, the hyper-parameters and the constants.
        carries: how many inputs are the carry.
        xs: how many are the xs.
        shared: bytes of shared memory that a block may have.

    Raises:
        UnsupportedError: a lane needs too much memory.
    """
    plan = _plan(program, carries, xs)
    columns = sorted((b for b in plan.buffers if b.numel > IN_REGISTERS), key=lambda b: -_size(b))
    total = sum(_size(buffer) * buffer.numel for buffer in plan.buffers)
    if total > LARGEST:
        raise UnsupportedError(
            f"native: a lane must fit into {LARGEST} bytes on a CUDA device; this step needs {total}."
        )
    needed = WARP * sum(_size(buffer) * buffer.numel for buffer in columns)
    fits = needed <= shared
    threads = WARP if fits and columns else THREADS
    body = Body(plan.merged, plan.local, "", UNROLLED if fits else UNROLLED_LOCAL)
    with body.block(
        'extern "C" __global__ void __launch_bounds__(THREADS, 1) run_lanes(const __grid_constant__ Run run)'
    ):
        body.line("const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;")
        body.line("if (first >= run.lanes) return;")
        body.line("constexpr int valid = 1;")
        body.line("int32_t bad[L] = {0};")
        for buffer in plan.buffers:
            if buffer not in columns or not fits:
                large = "volatile " * (buffer in columns)
                body.line(f"{large}{_stored(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];")
        if fits and columns:
            body.line("extern __shared__ double shared_memory[];")
        offset = 0
        for buffer in columns if fits else []:
            place = f"({_stored(buffer)}*)((char*)shared_memory + {offset} * THREADS) + threadIdx.x"
            body.line(f"const Column<{_stored(buffer)}> {buffer.name} = {{{place}}};")
            offset += _size(buffer) * buffer.numel
        _run_block(body, plan, program, carries, xs, ahead=True)
        body.line("if (bad[0]) atomicOr(run.bad, bad[0]);")
    counts = len(program.inputs), carries + len(program.ys)
    head = [
        f"#define THREADS {threads}",
        _text("cuda.hpp"),
        _text("arithmetic.hpp"),
        _RUN % (*[counts[0]] * 3, counts[1]),
    ]
    checked = any("bad[l]" in line for line in body.lines)
    return CudaSource("\n".join([*head, *body.lines, ""]), threads, needed * fits, checked)


_RUN = """
struct Run {
  const void* inputs[%d];      // carry, xs, hparams, constants
  int64_t lane_strides[%d];    // of each input, in elements
  int64_t time_strides[%d];
  void* outputs[%d];           // carry [lanes, ...], ys [steps, lanes, ...]
  int64_t lanes, steps;
  int32_t* bad;
};
"""


def _size(buffer: Buffer) -> int:
    return 1 if buffer.dtype == torch.bool else buffer.dtype.itemsize


def _run_block(body: Body, plan: _Plan, program: Program, carries: int, xs: int, *, ahead: bool = False) -> None:
    """The lines that run a block of lanes; ``ahead``: each step fetches what the next one reads."""
    inputs, memory = program.inputs, body.memory
    for index, buffer in enumerate(inputs):
        constant = not carries <= index < carries + xs
        name = f"u{index}" if buffer.uniform and constant else f"p{index}"
        body.line(f"const {_stored(buffer)}* const {name} = (const {_stored(buffer)}*)run.inputs[{index}];")
        if not buffer.uniform and constant:
            body.line(_load(index, buffer, memory))
    for group in plan.once:
        body.group(group)
    with body.block("for (int64_t time = 0; time < run.steps; ++time)"):
        for index in range(carries, carries + xs):
            advance = f"p{index} + time * run.time_strides[{index}]"
            if inputs[index].uniform:
                body.line(f"const {_stored(inputs[index])}* const u{index} = {advance};")
            else:
                body.line(_load(index, inputs[index], memory, advance))
            if ahead and inputs[index].numel:
                lane = "" if inputs[index].uniform else f" + first * run.lane_strides[{index}]"
                body.line(f"prefetch(p{index} + (time + (time + 1 < run.steps)) * run.time_strides[{index}]{lane});")
        for group in plan.always:
            body.group(group)
        for old, new in zip(inputs[:carries], program.carry, strict=True):
            if new is not None and new not in plan.merged:
                body.line(f"copy_block<{max(old.numel, 1)}>({memory}{old.name}, {memory}{new.name});")
        for index, y in enumerate(program.ys, start=carries):
            place = f"(({_stored(y)}*)run.outputs[{index}]) + (time * run.lanes + first) * {y.numel}"
            if y.numel:
                body.line(f"store_lanes<{y.numel}>({place}, {memory}{plan.merged.get(y, y).name}, valid);")
    for index, carry in enumerate(inputs[:carries]):
        place = f"(({_stored(carry)}*)run.outputs[{index}]) + first * {carry.numel}"
        if carry.numel:
            body.line(f"store_lanes<{carry.numel}>({place}, {memory}{carry.name}, valid);")


def _plan(program: Program, carries: int, xs: int) -> _Plan:
    inputs = program.inputs
    steady = invariant(program.statements, inputs[: carries + xs])
    once = schedule(statement for statement in program.statements if writes(statement) in steady)
    always = schedule(statement for statement in program.statements if writes(statement) not in steady)
    merged = in_place(always, inputs[:carries], program.carry)
    local = _stay_in_registers([*once, *always]) - {*merged, *program.carry, *program.ys}
    elsewhere = {*merged, *local}
    written = {writes(statement): None for statement in program.statements if writes(statement) not in elsewhere}
    buffers = [buffer for buffer in inputs if not buffer.uniform] + list(written)
    return _Plan(once, always, merged, local, buffers)


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


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _stored(buffer: Buffer) -> str:
    return "uint8_t" if buffer.dtype == torch.bool else C_TYPES[buffer.dtype]


def _load(index: int, buffer: Buffer, memory: str, time: str | None = None) -> str:
    start = f"({time or f'p{index}'}) + first * run.lane_strides[{index}]"
    return (
        f"load_lanes<{buffer.numel}>({memory}{buffer.name}, {start}, run.lane_strides[{index}], valid);"
        if buffer.numel
        else ""
    )
