"""The engines that run on this machine."""

from __future__ import annotations

import pytest

from popart_func.engines import ENGINES, available_engines

RUNNABLE = [name for name in ENGINES if available_engines()[name] is None]
COMPILED = [name for name in RUNNABLE if name != "eager"]


def inductor_slow(names):
    """Engines for a test of the trace that they share: inductor, which compiles for seconds, only with ``-m slow``."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "inductor" else name for name in names]
