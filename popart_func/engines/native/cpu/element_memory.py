"""Memory of the schedule "elements in registers": which buffers lie in an input, and the room behind all others."""

from __future__ import annotations

from typing import NamedTuple

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.plan import KernelPlan, Storage

__all__ = ["SPARE", "Memory"]

SPARE = 16
"""How many elements fit behind each buffer; a loop may go on to a multiple of it."""


class Memory(NamedTuple):
    """Where the buffers of a kernel lie.

    Attributes:
        storage: which of them share memory.
        constant: those that lie in an input of the kernel, are only read, and have no room behind them.
    """

    storage: Storage
    constant: set[Buffer]

    @classmethod
    def of(cls, plan: KernelPlan) -> Memory:
        """The memory of a kernel's plan."""
        storage, constant = plan.storage(), set(plan.program.inputs[len(plan.program.carry) :])
        for part, window in storage.windows.items():  # those of outer loops come first
            if storage.place_of(window.whole) in constant:
                constant.add(part)
        return cls(storage, constant)
