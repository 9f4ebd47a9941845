"""What changes PyTorch during a trace: libraries hear that they are traced, and TorchDynamo is imported late or never.

Importing this module imports no TorchDynamo, which takes a second.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.distributions import Distribution

__all__ = ["DynamoNeeded", "import_dynamo", "postpone_dynamo", "tells_libraries_of_a_trace", "without_dynamo"]


class _InOneThread:
    """A flag with a value of its own in one thread, until it is switched off; elsewhere it is what it was before.

    It can't be a bool, but takes part in what libraries do with one.
    """

    def __init__(self, value: bool, before: Any) -> None:
        self.value, self.before, self.thread, self.is_on = value, before, threading.get_ident(), True

    def __bool__(self) -> bool:
        return self.value if self.is_on and threading.get_ident() == self.thread else bool(self.before)

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __xor__(self, other: Any) -> Any:
        return bool(self) ^ other

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__

    def __index__(self) -> int:
        return int(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))


@contextlib.contextmanager
def tells_libraries_of_a_trace() -> Iterator[None]:
    """Within it, and in this thread only, code that asks whether it is traced hears that it is.

    `torch.compiler.is_compiling` is true, on which libraries avoid what reads values. `torch.distributions` does not
    check its arguments, whose values it would read. The transformer layers don't take their fast path, whose ops and
    nested tensors exist for speed alone. `torch.jit.is_tracing` stays false: `torch.func.functional_call` refuses every
    module while it is true.
    """
    settings: tuple[tuple[Any, str, bool], ...] = (
        (torch.compiler, "_is_compiling_flag", True),
        (Distribution, "_validate_args", False),
        (torch.backends.mha, "_is_fastpath_enabled", False),
    )
    flags = [_InOneThread(value, getattr(owner, name)) for owner, name, value in settings]
    for (owner, name, _), flag in zip(settings, flags, strict=True):
        setattr(owner, name, flag)
    try:
        yield
    finally:
        for (owner, name, _), flag in zip(settings, flags, strict=True):
            flag.is_on = False  # another thread may put the flag back later, if it has read it meanwhile
            if getattr(owner, name) is flag:
                setattr(owner, name, flag.before)


class DynamoNeeded(BaseException):  # no error: a step that catches exceptions must not catch it
    """Something needs TorchDynamo, which must not be imported here."""


class _NotImported(ModuleType):
    """Stands for a module: a name that it does not have is looked up in the real one, which is imported for that."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _RefusesDynamo:
    """An importer, asked before all others, that refuses TorchDynamo in one thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Leaves the import to other importers, or raises."""
        if name == "torch._dynamo" and threading.get_ident() == self.thread:
            raise DynamoNeeded


def import_dynamo() -> None:
    """Imports TorchDynamo."""
    importlib.import_module("torch._dynamo")


@contextlib.contextmanager
def postpone_dynamo() -> Iterator[None]:
    """Within it, gradients of `torch.func` don't import TorchDynamo; anything else that needs it does.

    PyTorch switches compiled autograd off around each gradient of `torch.func`, and imports TorchDynamo for that, which
    takes a second. Where nothing has imported it yet, compiled autograd can't be on.
    """
    if "torch._dynamo" in sys.modules:
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
        if names.get("_dynamo") is dynamo:  # else another thread has imported it
            del names["_dynamo"]


@contextlib.contextmanager
def without_dynamo() -> Iterator[None]:
    """`postpone_dynamo` in a trace, where what really needs TorchDynamo raises DynamoNeeded instead of importing it.

    Imported within a trace, TorchDynamo would keep what it finds there, and fail in this process ever after. Where it
    has been imported before, a function that it has compiled runs as it was written, so that it can be traced.
    """
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    importer = _RefusesDynamo()
    with postpone_dynamo():
        sys.meta_path.insert(0, importer)
        try:
            yield
        finally:
            sys.meta_path.remove(importer)
