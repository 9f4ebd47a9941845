"""Calls of a module with other parameters and buffers than its own, which it has back afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from popart_func._torch import is_batched

__all__ = ["aliases_of", "call_module", "copied"]

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""One for each module, since two threads that call a module at once would mix their parameters."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # what another thread held would stay held


def call_module(
    module: nn.Module, given: Mapping[str, Tensor], buffers: frozenset[str], args: Any, kwargs: Any
) -> tuple[Any, dict[str, Tensor]]:
    """A module's results with parameters and buffers in the place of its own, and its buffers afterwards.

    `torch.func.functional_call` takes half as long again, and does not tell what a module puts in place of a buffer.

    Args:
        module: the module.
        given: name to parameter or buffer, tied ones under each of their names.
        buffers: the names of the buffers.
        args: the module's arguments.
        kwargs: the module's arguments by name.
    """
    with nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(module, threading.RLock()):
        # A module may register a buffer in its first call, such as a table: that one stays its own.
        places = [place for place in _places(module) if place[-1] in given]
        own = [held[key] for held, key, _ in places]
        try:
            for held, key, name in places:
                held[key] = given[name]
            result = module(*args, **kwargs)
            after = {name: held[key].detach() for held, key, name in places if name in buffers} if buffers else {}
        finally:
            for (held, key, _), leaf in zip(places, own, strict=True):
                held[key] = leaf
        return result, after


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Where a module and those in it keep each parameter and buffer: a dict, the key in it, and the full name."""
    places: list[tuple[dict[str, Any], str, str]] = []
    modules: list[tuple[nn.Module, str]] = [(module, "")]
    for owner, below in modules:  # which grows
        for held in (owner._parameters, owner._buffers):
            places += [(held, key, below + key) for key, leaf in held.items() if leaf is not None]
        modules += [(child, f"{below}{key}.") for key, child in owner._modules.items() if child is not None]
    return places


def copied(buffer: Tensor, true: Tensor | None) -> Tensor:
    """A copy; for each lane of ``true``, since `torch.vmap` writes nothing of a lane to what all lanes share.

    Integers stay shared: a module may read its counters.
    """
    if true is None or is_batched(buffer) or not buffer.is_floating_point():
        return buffer.clone()
    return torch.where(true, buffer, buffer)


def aliases_of(module: nn.Module) -> dict[str, str]:
    """Every further name of a tied parameter or buffer, and the first one."""
    found: dict[str, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        first: dict[int, str] = {}
        for name, one in named(remove_duplicate=False):
            if first.setdefault(id(one), name) != name:
                found[name] = first[id(one)]
    return found
