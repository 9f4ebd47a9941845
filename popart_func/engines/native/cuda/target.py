"""CUDA devices as a `Target`."""

from __future__ import annotations

import sys

import torch

from popart_func.engines.lane_scan import LaneScan, UnsupportedError
from popart_func.engines.native.cuda.launch import cuda_kernel, lanes_in_teams, shared_memory
from popart_func.engines.native.cuda.nvrtc import why_no_nvrtc
from popart_func.engines.native.cuda.source import CudaSource, cuda_source
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.target import Launch

__all__ = ["CUDA", "CudaTarget"]


class CudaTarget:
    """Kernels for CUDA devices; a step has two, ``"thread"`` and ``"team"``, named for what runs a lane."""

    language = "CUDA C++"

    def why_not(self, device: torch.device) -> str | None:
        """Why the engine can't run on a CUDA device, or None."""
        if sys.platform != "linux":
            return "on CUDA devices it runs under Linux only."
        if torch.version.cuda is None:
            return "this build of PyTorch has no CUDA."
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device."
        if device.index is not None and device.index >= torch.cuda.device_count():
            return f"there is no {device}."
        return why_no_nvrtc()

    def prepare(self) -> None:
        """Nothing can be begun before the source is there."""

    def variant(self, scan: LaneScan, schedule: str) -> str:
        """Teams for few lanes, threads for many."""
        if schedule != "auto":
            raise UnsupportedError(f"native: on CUDA devices there are no schedules, got schedule={schedule!r}.")
        return "team" if scan.lanes <= lanes_in_teams(scan.device) else "thread"

    def source(self, plan: KernelPlan, device: torch.device, variant: str) -> CudaSource:
        """The CUDA C++ of a kernel."""
        return cuda_source(plan, shared_memory(device), team=variant == "team")

    def build(self, source: CudaSource, device: torch.device) -> Launch:
        """Compiles and loads a kernel, or loads it from the cache."""
        return cuda_kernel(source, device)


CUDA = CudaTarget()
"""The target for devices of type ``"cuda"``."""
