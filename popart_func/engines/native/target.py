"""What the engine needs of a kind of device; `cpu` and `cuda` each give one object of this shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from popart_func.engines.lane_scan import LaneScan, UnsupportedError
from popart_func.engines.native.plan import KernelPlan

__all__ = ["BuildError", "KernelArguments", "Launch", "Target"]


class BuildError(UnsupportedError):
    """A kernel could not be built: a compiler that refuses it, or a cache that can't be written to."""


class KernelArguments(NamedTuple):
    """What a kernel is called with. Whatever one lane reads in one step is contiguous.

    Attributes:
        inputs: carry, xs, hyper-parameters, constants.
        lane_strides: of each input, in elements; 0 where all lanes share it.
        time_strides: of each input, in elements; 0 where it is the same at each step.
        outputs: carry ``[lanes, ...]`` and ys ``[steps, lanes, ...]``, contiguous.
        lanes: how many lanes.
        steps: how many time steps.
        carries: how many inputs, and as many outputs, are the carry.
    """

    inputs: Sequence[Tensor]
    lane_strides: Sequence[int]
    time_strides: Sequence[int]
    outputs: Sequence[Tensor]
    lanes: int
    steps: int
    carries: int


Launch = Callable[[KernelArguments], int]
"""Runs a kernel; returns the bits of errors: `BAD_INDEX` and `BAD_DIVISOR` of `arithmetic.hpp`, of any lane, and
`NO_MEMORY` of `cpu/kernel.hpp`."""

Source = TypeVar("Source")


@runtime_checkable
class Target(Protocol[Source]):
    """A kind of device; ``Source`` is a kernel's source for it, with the code in an attribute ``text``.

    Attributes:
        language: of the source.
    """

    language: str

    def why_not(self, device: torch.device) -> str | None:
        """Why the engine can't run on a device, or None."""

    def prepare(self) -> None:
        """Begins what building a kernel needs and can be done while the step is traced."""

    def variant(self, scan: LaneScan, schedule: str) -> str:
        """Which of the target's kernels for a step suits the scan's number of lanes.

        Args:
            scan: what is run.
            schedule: the option of `popart_func.engines.Native`.

        Raises:
            UnsupportedError: the target does not have this schedule.
        """

    def source(self, plan: KernelPlan, device: torch.device, variant: str) -> Source:
        """The source of a kernel. It needs no compiler."""

    def build(self, source: Source, device: torch.device) -> Launch:
        """Compiles and loads a kernel, or loads it from the cache.

        Raises:
            BuildError: the compiler refused it, or the cache can't be written to.
        """
