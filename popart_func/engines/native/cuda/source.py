"""The source of a kernel for a CUDA device, in either of two variants.

*A thread for each lane*: small buffers in registers, the large ones in shared memory. No thread is idle, so many lanes
have the highest throughput. *A team of threads for each lane*: all buffers in shared memory, each thread takes its
share of their elements, and the team synchronizes after each loop nest. A step takes a fraction of the time, so this is
faster while processors are left over; and it serves lanes so large that shared memory does not hold a warp of them. If
a lane alone is too large, some of its buffers lie in global memory. Both compute the same operations in the same order,
so their results are equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from popart_func.engines.native.c_code import header, memory_type, special_header
from popart_func.engines.native.cuda.writer import CudaWriter
from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.memory import share_memory
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.time_loop import write_time_loop

__all__ = ["CudaSource", "cuda_source"]

# These were tuned on an H100, for Pop-Art on the network 16-10-10-10-10-1 in float32.

UNROLLED = 2048
"""Loops of at most so many operations are unrolled in a thread's kernel.

Registers can't be indexed at run time, so small buffers can live in registers only if every index is known when the
kernel is compiled. The paper's step is wholly unrolled: 255 registers, about 5200 instructions. More would take long to
compile.
"""

UNROLLED_TEAM = 64
"""The same for a team's kernel, which keeps nothing in registers between loops: more would only make it longer."""

SMALL = 32
"""Buffers of at most so many numbers live in a thread's registers."""

STATE_IN_REGISTERS = 168
"""About how many four-byte numbers of the carry a thread keeps in registers.

The carry is read and written at each step, so it gains most from registers, of which a thread has 255. With one of the
network's matrices of 100 numbers among them, four warps instead of three share a multiprocessor: 2.5 instead of 2.1
lane-steps in a nanosecond. With the matrix of 160, registers are spilled.
"""

WARP = 32
"""Threads of a block, at most, where shared memory is needed: small blocks leave less of it unused."""

THREADS = 128
"""Threads of a block, at most, where none is needed."""


class CudaSource(NamedTuple):
    """A kernel for a CUDA device.

    Attributes:
        text: its source, for NVRTC. It defines ``run_lanes``, whose one argument is a `KernelArguments`: eight bytes
            for each input's address, lane stride and time stride (in elements), each output's address, lanes, steps,
            the address of an ``int32_t`` that takes the bits of errors, and that of the scratch of all blocks.
        threads: of a block: at most, where each runs a lane; exactly, where a block is a team.
        shared: bytes of dynamic shared memory that a block needs.
        scratch: bytes of global memory that a block needs for itself; each block then runs several lanes in turn.
        checked: whether it may find errors.
        team: whether a block is a team, which runs one lane.
    """

    text: str
    threads: int
    shared: int
    scratch: int
    checked: bool
    team: bool


def cuda_source(plan: KernelPlan, shared: int, *, team: bool) -> CudaSource:
    """Writes the source of a kernel for a CUDA device.

    Args:
        plan: of the kernel.
        shared: bytes of shared memory that a block may have.
        team: whether a team runs each lane. A team does so anyway where shared memory can't hold a warp of lanes.
    """
    whole, plan = plan, share_memory(plan, among=_columns(plan))
    columns = _columns(plan)
    warp = WARP * _starts(columns)[-1]
    if team or warp > shared:
        return _team_source(share_memory(whole), shared)
    threads = WARP if columns else THREADS
    writer = CudaWriter(plan, UNROLLED)
    with _kernel(writer):
        writer.line("const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;")
        writer.line("if (first >= run.lanes) return;")
        for buffer in plan.buffers:
            if buffer not in columns:
                writer.line(f"{memory_type(buffer)} {buffer.name}[{max(buffer.numel, 1)}][L];")
        for buffer, start in zip(columns, _starts(columns), strict=False):
            _place(writer, buffer, "Column", f"{start} * THREADS + 16 * threadIdx.x")
        _run(writer, plan)
    return _finish(writer, plan, threads, warp)


def _team_source(plan: KernelPlan, shared: int) -> CudaSource:
    within, outside = _fitting(plan, shared)
    *starts, needed = _starts(within, skewed=True)
    *places, scratch = _starts(outside)
    writer = CudaWriter(plan, UNROLLED_TEAM, team=True)
    # Where a block has memory of its own in global memory, there are fewer blocks than lanes.
    lanes = writer.block("for (int64_t first = blockIdx.x; first < run.lanes; first += gridDim.x)")
    with _kernel(writer), lanes if outside else nullcontext():
        if not outside:
            writer.line("const int64_t first = blockIdx.x;")
        for buffer, start in zip(within, starts, strict=False):
            _place(writer, buffer, "Skewed", f"{start}")
        for buffer, start in zip(outside, places, strict=False):
            ctype = memory_type(buffer)
            place = f"run.scratch + blockIdx.x * int64_t({scratch}) + {start}"
            writer.line(f"{ctype} (* const {buffer.name})[L] = ({ctype}(*)[L])({place});")
        _run(writer, plan)
        if outside:
            writer.line(writer.between)
    threads = _team_size(max((buffer.numel for buffer in plan.buffers), default=1))
    return _finish(writer, plan, threads, needed, scratch, team=True)


def _fitting(plan: KernelPlan, shared: int) -> tuple[list[Buffer], list[Buffer]]:
    """The buffers that shared memory holds, and those that lie in global memory.

    The stacks of scans are the first to leave, since a round needs a part of a stack only; then the largest buffers.
    """
    stacks = _stacks(plan)
    within, outside = sorted(plan.buffers, key=lambda buffer: (buffer in stacks, buffer.nbytes)), []
    while _starts(within, skewed=True)[-1] > shared:
        outside.append(within.pop())
    return within, outside


def _stacks(plan: KernelPlan) -> set[Buffer]:
    """The buffers of which a round of a scan inside the step has a part, at a place that the compiler does not know."""
    storage = plan.storage()
    return {storage.place_of(window.whole) for window in storage.windows.values()}


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


def _kernel(writer: CudaWriter) -> AbstractContextManager[None]:
    arguments = "const __grid_constant__ KernelArguments run"
    return writer.block(f'extern "C" __global__ void __launch_bounds__(THREADS, 1) run_lanes({arguments})')


def _place(writer: CudaWriter, buffer: Buffer, kind: str, offset: str) -> None:
    """Declares a buffer in shared memory, at an offset in bytes."""
    ctype = memory_type(buffer)
    writer.line(f"const {kind}<{ctype}> {buffer.name} = {{({ctype}*)(shared_memory + {offset})}};")


def _run(writer: CudaWriter, plan: KernelPlan) -> None:
    writer.line("constexpr int valid = 1;")
    writer.line("int32_t bad[L] = {0};")
    write_time_loop(writer, plan, prefetch=True)
    writer.line("if (bad[0]) atomicOr(run.bad, bad[0]);")


def _finish(
    writer: CudaWriter, plan: KernelPlan, threads: int, shared: int, scratch: int = 0, *, team: bool = False
) -> CudaSource:
    program = plan.program
    inputs, outputs = len(program.inputs), len(program.carry) + len(program.ys)
    head = [
        f"#define THREADS {threads}",
        "#define TEAM THREADS" if team else "",
        header("cuda/kernel.hpp"),
        header("arithmetic.hpp"),
        special_header(writer.lines),
        _RUN % (inputs, inputs, inputs, outputs),
    ]
    checked = any("bad[l]" in line for line in writer.lines)
    return CudaSource("\n".join([*head, *writer.lines, ""]), threads, shared, scratch, checked, team)


_RUN = """
struct KernelArguments {
  const void* inputs[%d];      // carry, xs, hparams, constants
  int64_t lane_strides[%d];    // of each input, in elements
  int64_t time_strides[%d];
  void* outputs[%d];           // carry [lanes, ...], ys [steps, lanes, ...]
  int64_t lanes, steps;
  int32_t* bad;
  char* scratch;
};
"""


def _columns(plan: KernelPlan) -> list[Buffer]:
    """The buffers that lie in shared memory, since a thread's registers do not hold them.

    Of the large buffers, those of the carry may still have registers, while the budget lasts. The largest that fits
    comes first: it frees most shared memory, which decides how many warps share a multiprocessor.
    """
    stacks = _stacks(plan)
    carry = [buffer for buffer in plan.program.inputs[: len(plan.program.carry)] if buffer not in stacks]
    large = sorted((b for b in plan.buffers if b.numel > SMALL), key=lambda b: (-b.dtype.itemsize, -b.numel))
    free = 4 * STATE_IN_REGISTERS - sum(b.nbytes for b in carry if b.numel <= SMALL)
    columns = []
    for buffer in large:
        if buffer in carry and buffer.nbytes <= free:
            free -= buffer.nbytes
        else:
            columns.append(buffer)
    return columns


def _starts(buffers: Sequence[Buffer], *, skewed: bool = False) -> list[int]:
    """Where buffers start, in bytes, and where the last one ends. Each takes whole vectors of 16 bytes.

    ``skewed``: every 33rd element of memory is left free, as in `Skewed` of kernel.hpp.
    """
    starts = [0]
    for buffer in buffers:
        length = buffer.numel + skewed * (buffer.numel // 32)
        starts.append(starts[-1] + math.ceil(length * buffer.dtype.itemsize / 16) * 16)
    return starts
