"""Start-up time: keeps the garbage collector out of tracing. `_torch.without_dynamo` keeps TorchDynamo's import out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["without_collector"]


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
