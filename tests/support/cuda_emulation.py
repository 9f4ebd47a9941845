"""Kernels for CUDA devices on a host: their very source, compiled as C++ with a few lines that stand for CUDA.

What is computed is checked lane by lane. The threads of a team run one after the other between two meetings, in an
order that changes: a number that two of them touch without a meeting between is wrong in some orders. All must meet at
the same line. Nothing is said of the launch, of the device's own functions, of what it keeps in registers, of when it
shows one thread's memory to another, or of speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from popart_func.engines.compiler import compiler
from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.native.cuda.launch import block_size, pack
from popart_func.engines.native.cuda.source import CudaSource, cuda_source
from popart_func.engines.native.cuda.target import CudaTarget
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.target import KernelArguments, Launch

__all__ = ["SHARED", "OnHost", "emulated"]

SHARED = 227 * 1024
"""Bytes of shared memory that a block of an H100 may have."""

TEAM = 3
"""Threads of a team here: few, since each computes what is not shared out, and no divisor of most sizes."""

GUARD = 4096
"""Bytes behind a kernel's memory that it must leave alone."""

SHIM = """
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define __syncwarp()
#define __syncthreads()
struct Index { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;
alignas(16) char shared_memory[1 << 22];
static double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, sizeof x); return x; }
static void atomicOr(int32_t* to, int32_t bits) { *to |= bits; }
static void meet_at(int line);
%s
enum Fault { OVERLAP = 1, BEYOND = 2, APART = 4 };  // one thread's memory is another's; is too large; no common meeting

// A thread with a stack of its own. It goes on from one meeting to the next.
struct Thread {
  ucontext_t begin;
  std::jmp_buf go_on;
  char* stack = new char[1 << 20];
  int line;  // where it waits: 0 before the beginning, -1 after the end
};
static Thread team[%d];
static std::jmp_buf scheduler;
static ucontext_t unused;
static const KernelArguments* arguments;

static void meet_at(int line) {
  Thread& thread = team[threadIdx.x];
  thread.line = line;
  if (!_setjmp(thread.go_on)) _longjmp(scheduler, 1);
}
static void run_thread() {
  run_lanes(*arguments);
  team[threadIdx.x].line = -1;
  _longjmp(scheduler, 1);
}
static void switch_to(unsigned number) {
  threadIdx.x = number;
  if (_setjmp(scheduler)) return;
  Thread& thread = team[number];
  if (thread.line) _longjmp(thread.go_on, 1);
  getcontext(&thread.begin);
  thread.begin.uc_stack.ss_sp = thread.stack;
  thread.begin.uc_stack.ss_size = 1 << 20;
  makecontext(&thread.begin, run_thread, 0);
  setcontext(&thread.begin);
}
static int run_team(unsigned threads) {
  static unsigned order = 1;
  for (unsigned i = 0; i < threads; ++i) team[i].line = 0;
  do {
    order = order * 1664525 + 1013904223;
    const unsigned start = (order >> 8) %% threads, step = order >> 31 ? 1 : threads - 1;
    for (unsigned i = 0; i < threads; ++i) switch_to((start + i * step) %% threads);
    for (unsigned i = 1; i < threads; ++i)
      if (team[i].line != team[0].line) return APART;
  } while (team[0].line != -1);
  return 0;
}

// `size`: bytes of a block's shared memory. Returns the faults.
enum { GUARD = %d };
extern "C" int emulate(const KernelArguments* run, unsigned blocks, unsigned threads, unsigned size, int is_team) {
  static char owner[sizeof shared_memory];
  const auto* bytes = (const unsigned char*)shared_memory;
  const unsigned watched = size + GUARD;
  int faults = 0;
  arguments = run;
  blockDim.x = threads;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(owner, 0, watched);
    for (unsigned number = 0; number < (is_team ? 1 : threads); ++number) {
      std::memset(shared_memory, 0xA5, watched);
      if (is_team) faults |= run_team(threads);
      else {
        threadIdx.x = number;
        run_lanes(*run);
      }
      for (unsigned i = 0; i < watched; ++i) {
        if (bytes[i] == 0xA5) continue;
        faults |= (owner[i] ? OVERLAP : 0) | (i >= size ? BEYOND : 0);
        owner[i] = 1;
      }
    }
  }
  return faults;
}
"""


class OnHost(CudaTarget):
    """The CUDA target in the CPU's place.

    Args:
        build: what is built of a source.
        team: whether a team runs a lane.
        shared: bytes of shared memory that a block may have.
    """

    def __init__(self, build: Callable[[CudaSource], Launch], team: bool, shared: int = SHARED) -> None:
        self._build, self._team, self._shared = build, team, shared

    def why_not(self, device: torch.device) -> str | None:
        return None

    def variant(self, scan: LaneScan, schedule: str) -> str:
        return f"{'team' if self._team else 'thread'} on the host, {self._shared} bytes"

    def source(self, plan: KernelPlan, device: torch.device, variant: str) -> CudaSource:
        return cuda_source(plan, self._shared, team=self._team)

    def build(self, source: CudaSource, device: torch.device) -> Launch:
        return self._build(source)


def emulated(source: CudaSource, directory: Path) -> Launch:
    """Builds a kernel for the host; each run of it asserts that threads use their own memory, and meet."""
    text = source.text.replace(f"#define THREADS {source.threads}\n", f"#define THREADS {TEAM}\n", source.team)
    text = text.replace("#define MEET meet()", "#define MEET meet_at(__LINE__)")
    stem = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(SHIM % (text, TEAM, GUARD))
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC", "-w"]
    command = [*(compiler() or ()), *flags, "-o", str(stem.with_suffix(".so")), str(stem.with_suffix(".cpp"))]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(stem.with_suffix(".so")))

    def launch(arguments: KernelArguments) -> int:
        bad = torch.zeros(1, dtype=torch.int32)
        threads = TEAM if source.team else block_size(arguments.lanes, source.threads, multiprocessors=2)
        blocks = arguments.lanes if source.team else -(-arguments.lanes // threads)
        blocks = min(blocks, 2) if source.scratch else blocks
        scratch = torch.full((blocks * source.scratch + GUARD,), 0xA5, dtype=torch.uint8)
        packed = pack(arguments, bad, scratch)
        assert library.emulate(ctypes.byref(packed), blocks, threads, source.shared, source.team) == 0
        assert (scratch[-GUARD:] == 0xA5).all()
        assert source.checked or not bad
        return int(bad)

    return launch
