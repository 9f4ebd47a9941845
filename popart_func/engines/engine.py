"""What an engine is, and the engines that there are: each is a module that is imported when it is first used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from popart_func.engines.tracing.start_up import without_collector
from popart_func.tree import PyTree

__all__ = ["ENGINES", "SCHEDULES", "Engine", "EngineLike", "Native", "load_engine", "name_and_options"]

ENGINES = ("native", "inductor", "eager")
"""The names of all engines, in the order in which ``engine="auto"`` prefers them."""

SCHEDULES = ("lanes", "elements")
"""What may fill the vector registers in a kernel of the engine `native` on a CPU."""


@dataclass(frozen=True)
class Native:
    """The engine `native` with options; ``"native"`` is the same without.

    Attributes:
        schedule: what fills the vector registers on a CPU. ``"lanes"``: a block of lanes, one element at a time; for
            many lanes of tiny networks. ``"elements"``: the elements of one lane; for few lanes, batches and wide
            layers. ``"auto"``: the one that the cost model predicts to be faster, by the shapes and the number of
            lanes. The two sum in different orders, so their results agree to rounding only. Within one schedule, a lane
            is equal to the bit for any number of lanes and threads: name one where lane i alone must equal lane i among
            others.

    Raises:
        ValueError: no such schedule.

    >>> str(Native(schedule="elements"))
    'native:elements'
    """

    schedule: str = "auto"

    def __post_init__(self) -> None:
        if self.schedule not in ("auto", *SCHEDULES):
            raise ValueError(f"Native: `schedule` must be 'auto' or one of {list(SCHEDULES)}, got {self.schedule!r}.")

    def __str__(self) -> str:
        return "native" if self.schedule == "auto" else f"native:{self.schedule}"


EngineLike = str | Native
"""An engine: its name, ``"auto"``, or an object with its options. As text, ``"native:elements"`` is such an object."""


def name_and_options(engine: EngineLike) -> tuple[str, dict[str, Any]]:
    """The name of an engine, and its options: keyword arguments of its ``run``.

    >>> name_and_options("native:lanes"), name_and_options("eager")
    (('native', {'schedule': 'lanes'}), ('eager', {}))
    """
    name, _, option = str(engine).partition(":")
    if name == "native" and option:
        return name, {"schedule": Native(option).schedule}
    return str(engine), {}


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

    @property
    def run(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """Runs a scan: the last carry, leaves ``[lanes, ...]``, and the ys, leaves ``[steps, lanes, ...]``.

        It is called as ``run(scan, **options)``, with the `LaneScan` and the options of the engine's own object, such
        as `Native`. It raises `UnsupportedError` for an op, dtype or shape that the engine lacks; the message begins
        with the engine's name.
        """


@functools.cache
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
