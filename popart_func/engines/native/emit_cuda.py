"""A lowered step as CUDA C++, in either of two ways.

*A thread for each lane*: small buffers in registers, the large ones in shared memory. Nothing is idle, and many lanes
go through at the highest rate. *A team of threads for each lane*: all buffers in shared memory, each thread takes its
share of their elements, and the team meets after each group of statements. A step takes a fraction of the time, so that
this is faster as long as there are processors left over; and it is for lanes so large that shared memory does not hold
a warp of them. Both compute the same operations in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.native.emit import Plan, make_plan, run_block, source, stored
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.loops import Body
from popart_func.engines.native.lower import Program

__all__ = ["CudaSource", "emit_cuda"]

# These were tuned on an H100, for Pop-Art on the network 16-10-10-10-10-1 in float32.

UNROLLED = 2048
"""Loops of at most so many operations are unrolled in a thread's kernel, so that small buffers can live in registers.

The paper's step is all unrolled so: 255 registers, about 5200 instructions. More would take long to compile.
"""

UNROLLED_TEAM = 64
"""The same, where a team runs the lane."""

SMALL = 32
"""Buffers of at most so many numbers live in a thread's registers."""

STATE_IN_REGISTERS = 168
"""Of the carry, a thread keeps about so many four-byte numbers in registers.

With one of the network's matrices of 100 numbers among them, four warps instead of three share a multiprocessor: 2.5
instead of 2.1 lane-steps in a nanosecond. With the one of 160, registers are spilled.
"""

WARP = 32
"""Threads of a block, at most, where shared memory is needed: the less a block needs, the better blocks fill it."""

THREADS = 128
"""Threads of a block, at most, where none is needed."""


class CudaSource(NamedTuple):
    """A kernel for a CUDA device.

    Attributes:
        text: its source, for NVRTC. It defines ``run_lanes``, whose one argument is `Run`: eight bytes for each input's
            address, lane stride and time stride (in elements), each output's address, lanes, steps and the address of
            an ``int32_t`` that takes the errors' bits.
        threads: of a block: at most, where each runs a lane; exactly, where a block is a team.
        shared: bytes of dynamic shared memory that a block needs.
        checked: whether it may find errors.
        team: whether a block is a team, which runs one lane.
    """

    text: str
    threads: int
    shared: int
    checked: bool
    team: bool


def emit_cuda(program: Program, carries: int, xs: int, shared: int, *, team: bool) -> CudaSource:
    """The source of a kernel for a CUDA device.

    Args:
        program: a lowered step; its inputs are the carry, the xs, the hyper-parameters and the constants.
        carries: how many inputs are the carry.
        xs: how many are the xs.
        shared: bytes of shared memory that a block may have.
        team: whether a team shall run each lane. It does anyway where a warp of lanes does not fit.

    Raises:
        UnsupportedError: a lane needs too much memory.
    """
    plan = make_plan(program, carries, xs)
    columns = _columns(plan, program.inputs[:carries])
    warp = WARP * _starts(columns)[-1]
    if team or warp > shared:
        return _team_source(plan, program, carries, xs, shared)
    threads = WARP if columns else THREADS
    body = Body(plan.merged, plan.local, "", UNROLLED, between="FENCE;")
    with _kernel(body):
        body.line("const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;")
        body.line("if (first >= run.lanes) return;")
        for buffer in plan.buffers:
            if buffer not in columns:
                body.line(f"{stored(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];")
        for buffer, start in zip(columns, _starts(columns), strict=False):
            _place(body, buffer, "Column", f"{start} * THREADS + 16 * threadIdx.x")
        _run(body, plan, program, carries, xs)
    return _finish(body, program, carries, threads, warp, team=False)


def _team_source(plan: Plan, program: Program, carries: int, xs: int, shared: int) -> CudaSource:
    *starts, needed = _starts(plan.buffers, skewed=True)
    if needed > shared:
        raise UnsupportedError(
            f"native: a lane must fit into {shared} bytes of shared memory on this device; this step needs {needed}."
        )
    body = Body(plan.merged, plan.local, "", UNROLLED_TEAM, team=True, between="MEET;")
    with _kernel(body):
        body.line("const int64_t first = blockIdx.x;")
        for buffer, start in zip(plan.buffers, starts, strict=False):
            _place(body, buffer, "Skewed", f"{start}")
        _run(body, plan, program, carries, xs)
    threads = _team_size(max((buffer.numel for buffer in plan.buffers), default=1))
    return _finish(body, program, carries, threads, needed, team=True)


def _team_size(largest: int) -> int:
    """Threads for a lane: one for every 32 elements of the largest buffer, but a whole number of warps.

    With 1000 lanes of networks with layers of 32, 64 and 96, teams of 32, of 64 or 128, and of 128 (256 was not tried)
    were best on an H100.

    >>> _team_size(32 * 32), _team_size(64 * 64)
    (32, 128)
    """
    size = WARP
    while size < 256 and size * 32 < largest:
        size *= 2
    return size


def _kernel(body: Body) -> AbstractContextManager[None]:
    head = 'extern "C" __global__ void __launch_bounds__(THREADS, 1) run_lanes(const __grid_constant__ Run run)'
    return body.block(head)


def _place(body: Body, buffer: Buffer, kind: str, offset: str) -> None:
    """Declares a buffer in shared memory, at an offset in bytes."""
    ctype = stored(buffer)
    body.line(f"const {kind}<{ctype}> {buffer.name} = {{({ctype}*)(shared_memory + {offset})}};")


def _run(body: Body, plan: Plan, program: Program, carries: int, xs: int) -> None:
    body.line("constexpr int valid = 1;")
    body.line("int32_t bad[L] = {0};")
    run_block(body, plan, program, carries, xs, ahead=True)
    body.line("if (bad[0]) atomicOr(run.bad, bad[0]);")


def _finish(body: Body, program: Program, carries: int, threads: int, shared: int, *, team: bool) -> CudaSource:
    counts = len(program.inputs), carries + len(program.ys)
    head = [
        f"#define THREADS {threads}",
        "#define TEAM THREADS" if team else "",
        source("cuda.hpp"),
        source("arithmetic.hpp"),
        _RUN % (*[counts[0]] * 3, counts[1]),
    ]
    checked = any("bad[l]" in line for line in body.lines)
    return CudaSource("\n".join([*head, *body.lines, ""]), threads, shared, checked, team)


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


def _columns(plan: Plan, carry: Sequence[Buffer]) -> list[Buffer]:
    """The buffers that registers do not hold."""
    large = sorted((b for b in plan.buffers if b.numel > SMALL), key=lambda b: (-_size(b), -b.numel))
    free = 4 * STATE_IN_REGISTERS - sum(_size(b) * b.numel for b in carry if b.numel <= SMALL)
    columns = []
    for buffer in large:
        if buffer in carry and _size(buffer) * buffer.numel <= free:
            free -= _size(buffer) * buffer.numel
        else:
            columns.append(buffer)
    return columns


def _starts(buffers: Sequence[Buffer], *, skewed: bool = False) -> list[int]:
    """Where buffers start, in bytes, and where the last one ends. Each takes whole vectors of 16 bytes.

    ``skewed``: every 33rd element of memory is left free, as in `Skewed`.
    """
    starts = [0]
    for buffer in buffers:
        length = buffer.numel + skewed * (buffer.numel // 32)
        starts.append(starts[-1] + math.ceil(length * _size(buffer) / 16) * 16)
    return starts


def _size(buffer: Buffer) -> int:
    return 1 if buffer.dtype == torch.bool else buffer.dtype.itemsize
