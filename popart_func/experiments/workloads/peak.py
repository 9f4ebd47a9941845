"""The machine's peak: multiplications and additions a second of one core, measured by a loop of nothing else."""

from __future__ import annotations

import ctypes
import functools
import time

from popart_func.engines.native.cpu.compile import build

__all__ = ["peak_flops"]

CHAINS, WIDTH = 24, 16

SOURCE = f"""
#if defined(__clang__)
#pragma STDC FP_CONTRACT ON
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif
typedef float Vector __attribute__((vector_size({4 * WIDTH})));

// Independent chains of fused multiply-adds: enough of them hide the latency of one.
extern "C" __attribute__((visibility("default"))) float run(long rounds) {{
  Vector sums[{CHAINS}];
  for (int chain = 0; chain < {CHAINS}; ++chain) sums[chain] = Vector{{}} + float(chain);  // else all are one chain
  const Vector factor = Vector{{}} + 0.999f, term = Vector{{}} + 1e-4f;
  for (long round = 0; round < rounds; ++round) {{
#pragma GCC unroll {CHAINS}
    for (int chain = 0; chain < {CHAINS}; ++chain) sums[chain] = sums[chain] * factor + term;
  }}
  Vector total = {{}};
#pragma GCC unroll {CHAINS}
  for (int chain = 0; chain < {CHAINS}; ++chain) total += sums[chain];
  return total[0];
}}
"""


@functools.cache
def peak_flops() -> float:
    """Floating-point operations a second of one core, in float32; a fused multiply-add counts as two.

    Raises:
        BuildError: there is no C++ compiler.
    """
    run = build(SOURCE).run
    run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
    rounds = 2_000_000
    seconds = []
    for _ in range(5):
        started = time.process_time()
        run(rounds)
        seconds.append(time.process_time() - started)
    return 2 * CHAINS * WIDTH * rounds / min(seconds)
