"""The CPU as a `Target`."""

from __future__ import annotations

import sys

import torch

from popart_func.engines.compiler import why_no_compiler
from popart_func.engines.cost_model import faster_schedule
from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.native.cpu.compile import ask_compiler, build
from popart_func.engines.native.cpu.elements_in_registers import ElementsInRegisters
from popart_func.engines.native.cpu.lanes_in_registers import LanesInRegisters
from popart_func.engines.native.cpu.launch import launcher
from popart_func.engines.native.cpu.source import CpuSource, Schedule
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.target import Launch

__all__ = ["CPU", "CpuTarget"]


SCHEDULES: dict[str, Schedule] = {"lanes": LanesInRegisters(), "elements": ElementsInRegisters()}
"""The schedules by name: what fills the vector registers."""


class CpuTarget:
    """Kernels for CPUs; a step has one for each of `SCHEDULES`, for any number of lanes."""

    language = "C++"

    def why_not(self, device: torch.device) -> str | None:
        """Why no kernel can be built here, or None."""
        if sys.platform == "win32":
            return "it needs a C++ compiler with GCC's command line, which Windows lacks."
        return why_no_compiler()

    def prepare(self) -> None:
        """Begins to ask the compiler about this machine; see `ask_compiler`."""
        ask_compiler()

    def variant(self, scan: LaneScan, schedule: str) -> str:
        """The schedule; ``"auto"`` is the one that should be faster."""
        return faster_schedule(scan.graph(), scan.lanes) if schedule == "auto" else schedule

    def source(self, plan: KernelPlan, device: torch.device, variant: str) -> CpuSource:
        """The C++ of a kernel."""
        return SCHEDULES[variant].source(plan)

    def build(self, source: CpuSource, device: torch.device) -> Launch:
        """Compiles and loads a kernel, or loads it from the cache."""
        return launcher(build(source.text))


CPU = CpuTarget()
"""The target for devices of type ``"cpu"``."""
