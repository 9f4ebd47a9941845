"""Engines: one step, written for one lane, scanned over time in thousands of lanes.

`scans` has what users call; `engine` says what an engine is, `selection` which one runs, `explain` what it makes of a
step. `eager` defines what is right; every other engine is tested to agree with it.
"""

from popart_func.engines.engine import ENGINES, Engine, EngineLike, Native, load_engine
from popart_func.engines.explain import Explanation, explain
from popart_func.engines.lane_scan import EngineUnavailableError, UnsupportedError
from popart_func.engines.loops.api import cond, fori_loop, while_loop
from popart_func.engines.scans import scan, scan_lanes
from popart_func.engines.selection import available_engines, resolve_engine

__all__ = [
    "ENGINES",
    "Engine",
    "EngineLike",
    "EngineUnavailableError",
    "Explanation",
    "Native",
    "UnsupportedError",
    "available_engines",
    "cond",
    "explain",
    "fori_loop",
    "load_engine",
    "resolve_engine",
    "scan",
    "scan_lanes",
    "while_loop",
]
