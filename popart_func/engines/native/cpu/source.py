"""The source of a kernel for a CPU, and what a schedule is."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from popart_func.engines.native.c_code import header
from popart_func.engines.native.plan import KernelPlan

__all__ = ["ENTRY", "CpuSource", "Schedule"]


class CpuSource(NamedTuple):
    """A kernel's C++; it exports ``run(const KernelArguments*, int threads)``, which returns the bits of errors."""

    text: str


@runtime_checkable
class Schedule(Protocol):
    """How a kernel fills the vector registers; it writes the source that does so."""

    def source(self, plan: KernelPlan) -> CpuSource:
        """The source of a kernel. It needs no compiler."""


ENTRY = f"""{header("cpu/threads.hpp")}
extern "C" __attribute__((visibility("default"))) int32_t run(const KernelArguments* run, int threads) {{
  return for_each_block<Block>(run->lanes, threads, [run](Block& b, int64_t first, int valid) {{
    run_block(*run, b, first, valid);
  }});
}}
"""
"""The function of a kernel that is called; the source before it has a struct ``Block`` and ``run_block``."""
