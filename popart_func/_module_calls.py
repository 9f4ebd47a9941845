"""Calls of a module with other parameters and buffers than its own, which it has back afterwards."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from popart_func._torch import is_batched, mutation_count

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
    A module may register a buffer in its first call, such as a table: that one stays its own, and must not change.

    Args:
        module: the module.
        given: name to parameter or buffer, tied ones under each of their names.
        buffers: the names of the buffers.
        args: the module's arguments.
        kwargs: the module's arguments by name.

    Raises:
        ValueError: the module changes a buffer that it has registered in a call, or registers one while it is traced.
    """
    with nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(module, threading.RLock()):
        all_places = _places(module)
        places = [place for place in all_places if place[-1] in given]
        own = [held[key] for held, key, _ in places]
        others = [] if len(places) == len(all_places) else [place for place in all_places if place[-1] not in given]
        kept = [(held[key], _changes(held[key])) for held, key, _ in others]
        # TorchDynamo itself sees what a call changes.
        is_traced = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        before = _BeforeTrace(module) if is_traced else None
        try:
            for held, key, name in places:
                held[key] = given[name]
            result = module(*args, **kwargs)
            after = {name: held[key].detach() for held, key, name in places if name in buffers} if buffers else {}
        finally:
            for (held, key, _), leaf in zip(places, own, strict=True):
                held[key] = leaf
        for (held, key, name), (leaf, count) in zip(others, kept, strict=True):
            if held.get(key) is not leaf or _changes(leaf) != count:
                held[key] = leaf
                raise ValueError(f"stateless: {_described(module, name)} changes in a call. {_REGISTER}")
        if before is not None:
            before.check()
        return result, after


_REGISTER = (
    "Register it in `__init__`, or by calling the module on an example in `make_module`: then popart_func.init_params "
    "gives it, and it is carried from step to step."
)


def _changes(tensor: Any) -> int:
    return 0 if tensor.is_inference() else mutation_count(tensor)


def _described(module: nn.Module, name: str) -> str:
    return f"the buffer {name!r} that {type(module).__name__} has registered in a call"


class _BeforeTrace:
    """What a module holds before a call that is traced, beside what `call_module` gives it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = [(part._buffers, dict(part._buffers)) for part in module.modules()]
        self._numbers = self._read_numbers()

    def _read_numbers(self) -> dict[str, int | float]:
        return {
            f"{below}.{key}".lstrip("."): value
            for below, part in self._module.named_modules()
            for key, value in vars(part).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def check(self) -> None:
        """Refuses a buffer, and warns of a number, that a call would change each time, and a graph of it does not."""
        for held, before in self._buffers:
            new = [name for name, leaf in held.items() if leaf is not None and before.get(name) is None]
            if new:
                held.clear()
                held.update(before)
                raise ValueError(f"stateless: {_described(self._module, new[0])} would be new in each. {_REGISTER}")
        for name, value in self._read_numbers().items():
            if self._numbers.get(name, value) != value:
                warnings.warn(
                    f"stateless: {type(self._module).__name__} changes its attribute {name!r} from "
                    f"{self._numbers[name]} to {value} while it is traced: the graph keeps the number. Make it a "
                    f"buffer if outputs depend on it.",
                    stacklevel=2,
                )


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
