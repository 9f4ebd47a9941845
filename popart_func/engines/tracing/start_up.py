"""What need not happen while a step is traced and compiled, so that a new process starts at once."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

__all__ = ["without_collector", "without_dynamo"]


class _NotImported(ModuleType):
    """Stands for a module: whatever it does not have is looked up in the real one, which is imported for that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """Within it, gradients don't import TorchDynamo, which takes a second; anything else that needs it still does.

    Where it has been imported, what it has compiled runs as it was written, so that it can be traced.
    PyTorch switches compiled autograd off around each gradient of `torch.func`, and imports TorchDynamo in order to.
    Where nothing has imported it yet, compiled autograd can't be on.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    dynamo, autograd = _NotImported("torch._dynamo"), _NotImported("torch._dynamo.compiled_autograd")
    autograd._disable = contextlib.nullcontext  # type: ignore[attr-defined]
    dynamo.compiled_autograd = autograd  # type: ignore[attr-defined]
    names = vars(torch)
    names["_dynamo"] = dynamo
    try:
        yield
    finally:
        if names.get("_dynamo") is dynamo:  # else it has been imported after all
            del names["_dynamo"]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Within it, cyclic garbage is left where it is.

    There is little of it, but so many new objects that Python would look through all of PyTorch's for more, which takes
    as long as all the rest. What is left is collected afterwards.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
