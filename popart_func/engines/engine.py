"""What an engine is, and the engines that there are: each is a module that is imported when it is first used."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.tracing.start_up import without_collector
from popart_func.tree import PyTree

__all__ = ["ENGINES", "Engine", "load_engine"]

ENGINES = ("native", "inductor", "eager")
"""The names of all engines, in the order in which ``engine="auto"`` prefers them."""


@runtime_checkable
class Engine(Protocol):
    """Runs scans. A module with these names is an engine."""

    @property
    def pays_off_after(self) -> int:
        """From how many steps on the engine's compile time is earned back against `eager`."""

    @property
    def compiles_once(self) -> bool:
        """Whether one compilation serves any number of lanes and steps, so that the steps of several calls add up."""

    def why_not(self, device: torch.device) -> str | None:
        """Why the engine can't run on a device, a sentence; None where it can."""

    def run(self, scan: LaneScan) -> tuple[PyTree, PyTree]:
        """Runs a scan: the last carry, leaves ``[lanes, ...]``, and the ys, leaves ``[steps, lanes, ...]``.

        Raises:
            UnsupportedError: an op, dtype or shape that the engine lacks; the message begins with the engine's name.
        """


def load_engine(name: str) -> Engine:
    """The engine of a name in `ENGINES`. It is imported here, so that importing the package stays fast."""
    with without_collector():
        if name == "native":
            import popart_func.engines.native as native

            return native
        if name == "inductor":
            import popart_func.engines.inductor as inductor

            return inductor
        import popart_func.engines.eager as eager

        return eager
