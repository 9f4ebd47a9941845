"""Start-up: keeps the garbage collector out of tracing, and looks ops up before a fork can come in between."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator

import torch

__all__ = ["look_up_ops", "without_collector"]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Within it, Python does not look for cyclic garbage.

    Tracing makes little garbage, but so many objects that the collector would search all of PyTorch's again and again,
    which doubles the time. It collects what is left afterwards.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def look_up_ops() -> None:
    """Calls the ops that engines call around a kernel, so that a fork beside another thread's first call can't hang.

    PyTorch looks an op up at its first call, and holds a lock meanwhile. A fork in that moment inherits it held. A fork
    waits for traces, so that ops which are called within one are safe.
    """
    some = torch.zeros(2, 2, device="cpu")
    some.mT.resolve_neg().contiguous().to("cpu")
    torch.empty(2, 2, device="cpu").copy_(some)
