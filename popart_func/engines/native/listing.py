"""What the engine makes of a step, as text: its loops, its source, its memory."""

from __future__ import annotations

from typing import NamedTuple

from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.native.c_code import HEADERS, header
from popart_func.engines.native.engine import planned, target_of

__all__ = ["Listing", "listing"]


class Listing(NamedTuple):
    """A step on the native engine.

    Attributes:
        loops: the scheduled loop nests as text: buffers, what runs before the time loop, what runs at each step, and
            what becomes of the carry.
        source: the code of the kernel.
        own_source: the same without the headers that every kernel has.
        language: of the source, ``"C++"`` or ``"CUDA C++"``.
        variant: which of the target's kernels this is: on a CPU the schedule, ``"lanes"`` or ``"elements"``, by what
            fills the vector registers; on a CUDA device ``"thread"`` or ``"team"``, by what runs a lane.
        state_bytes: bytes of the carry in a lane.
        memory_bytes: bytes of all buffers of a lane: its carry, its inputs at a step, and what is stored on the way.
            Values that stay in registers are not counted.
    """

    loops: str
    source: str
    own_source: str
    language: str
    variant: str
    state_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.loops}\n{self.state_bytes} bytes of state and {self.memory_bytes} bytes of buffers a lane; "
            f"{self.language}, variant {self.variant!r}, {self.source.count(chr(10))} lines"
        )


def listing(scan: LaneScan, *, schedule: str = "auto") -> Listing:
    """Lists what the engine makes of a step. It works where no compiler is installed, and runs nothing.

    Args:
        scan: what would be run.
        schedule: what fills the vector registers of a CPU; see `popart_func.engines.Native`.

    Raises:
        UnsupportedError: an op, dtype, shape or device that the engine lacks.

    >>> import torch
    >>> from popart_func.engines.lane_scan import make_lane_scan
    >>> step = lambda total, x: (total + x.square().sum(), total)
    >>> scan = make_lane_scan("scan", step, torch.zeros(3), torch.ones(5, 3, 4))
    >>> print(listing(scan).loops)
    carry in0: float32[1]
    x in1: float32[4]
    at each time step:
      t1 = reduce(so_far + value, from 0; i0 < 4; (in1 * in1))
      t2 = (in0 + t1)
      t3 = in0
    carry in0 <- t2, in place
    output t3
    """
    target = target_of(scan.device)
    plan = planned(scan, scan.graph())
    variant = target.variant(scan, schedule)
    carry = plan.program.inputs[: len(plan.program.carry)]
    source = own_source = target.source(plan, scan.device, variant).text
    for name in HEADERS:
        text = header(name)
        own_source = own_source.replace(text, f"// {name}: {text.count(chr(10))} lines\n")
    return Listing(
        loops=str(plan),
        source=source,
        own_source=own_source,
        language=target.language,
        variant=variant,
        state_bytes=sum(buffer.nbytes for buffer in carry),
        memory_bytes=sum(buffer.nbytes for buffer in plan.buffers),
    )
