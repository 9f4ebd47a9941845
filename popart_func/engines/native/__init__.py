"""The fastest engine: the step as one kernel, the time loop inside, the lanes in SIMD registers or in a GPU's threads.

On a CPU, a block of lanes, a register or two wide, runs from the first step to the last before the next block begins,
so that its parameters stay in cache; blocks are spread over ``torch.get_num_threads()`` threads. On a CUDA device a
thread runs each lane or, where there are few lanes or large ones, a team of threads. Results are bit-equal for any
number of lanes and threads. Floating-point arithmetic is IEEE's; sums of products are fused where the hardware can.

A step graph goes through these stages, each of which can be printed: `lower` makes a `Program` of statements over
buffers, `make_plan` schedules it, a `Target` writes its source, builds and launches it. `listing` shows them all, and
`register_op` adds an op.
"""

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.native.engine import run, why_not
from popart_func.engines.native.kernel import Kernel, NotLoweredError
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
"""Steps from which on the engine is worth its compile time, 1 s: `eager` takes 200 of 1000 lanes, 700 of 50 lanes."""

compiles_once = True
"""A kernel serves any number of lanes and steps."""
