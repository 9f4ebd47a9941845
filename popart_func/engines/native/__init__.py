"""The fastest engine: the step as one kernel with the time loop inside.

On a CPU there are two schedules. "Lanes in registers" runs a block of lanes, a register or two wide; "elements in
registers" runs one lane, with vectors along the axes of its arrays. Either runs from the first step to the last before
the next block begins, so that parameters stay in cache; blocks are spread over ``torch.get_num_threads()`` threads. On
a CUDA device a thread runs each lane or, where there are few lanes or large ones, a team of threads. Within one
schedule results are bit-equal for any number of lanes and threads. Floating-point arithmetic is IEEE's; sums of
products are fused where the hardware can.

A step graph goes through these stages, each of which can be printed: `lower` makes a `Program` of statements over
buffers, `make_plan` schedules it, a `Target` writes its source, builds and launches it. `listing` shows them all, and
`register_op` adds an op.
"""

from popart_func.engines.lane_scan import NotLoweredError, UnsupportedError
from popart_func.engines.native.engine import run, why_not
from popart_func.engines.native.kernel import Kernel
from popart_func.engines.native.listing import Listing, listing
from popart_func.engines.native.registration import register_op
from popart_func.engines.native.target import BuildError

__all__ = [
    "BuildError",
    "Kernel",
    "Listing",
    "NotLoweredError",
    "UnsupportedError",
    "compiles_once",
    "listing",
    "pays_off_after",
    "register_op",
    "run",
    "why_not",
]

pays_off_after = 500
"""Steps from which on the engine is worth its compile time, 1 s: `eager` takes 300 of 1000 lanes, 600 of 50 lanes."""

compiles_once = True
"""A kernel serves any number of lanes and steps."""
