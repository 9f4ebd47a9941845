"""Known values: tensors whose values do not depend on the inputs of a step, computed while it is traced.

A tensor that a step closes over, or makes from Python numbers, is known, and so is whatever is computed of known ones
alone. Their values may be read, and may decide shapes. A graph holds as long as the tensors that the step closes over
have the values by which it was decided: those are noted in `KnownValues.read`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popart_func._torch import schema, storage_id
from popart_func.engines.tracing.shapes import map_tensors
from popart_func.engines.tracing.traced import stand_in_of

__all__ = ["KnownValues", "Sources", "has_mask", "mask_places", "written_by"]

_aten = torch.ops.aten
Sources = dict[int, Tensor]
"""Tensors that the step closes over, by their ids."""

# Ops that take no more than shape and dtype from a tensor, so that their results are known whatever its values are.
_OF_SHAPES = {
    *(_aten.empty_like, _aten.full_like, _aten.ones_like, _aten.zeros_like),
    *(_aten.new_empty, _aten.new_empty_strided, _aten.new_full, _aten.new_ones, _aten.new_zeros),
}


class KnownValues:
    """The values of traced tensors as far as they are known, in memory of their own, which in-place ops change, too.

    Attributes:
        read: the tensors whose values have decided something, by their ids, each with a copy of those values.
    """

    def __init__(self) -> None:
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self._sources: dict[Any, Sources] = {}  # by memory
        self._constants: set[Any] = set()  # memory that is not this trace's, so that nothing may be written to it
        self._stale: set[Any] = set()
        self._kept: list[Tensor] = []  # else memory would be used again, and taken for other memory

    def add_constant(self, tensor: Tensor, *, is_own: bool) -> None:
        """Notes a tensor that is not computed in the step; ``is_own`` if only the trace can change its values."""
        memory = storage_id(tensor)
        self._constants.add(memory)
        self._sources.setdefault(memory, {}).update({} if is_own else {id(tensor): tensor})
        self._kept.append(tensor)

    def arguments(self, func: Any, device: torch.device, value: Any) -> Any | None:
        """The arguments of an op by their values; None if one of them is not known.

        Args:
            func: the op.
            device: where its results lie.
            value: its arguments, with traced tensors.
        """
        is_custom = func.namespace not in ("aten", "prims", "popart_func")  # which may do more than compute
        if is_custom or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if func.overloadpacket in _OF_SHAPES:
            args, kwargs = map_tensors(stand_in_of, value)
            return args, {**kwargs, "device": device}
        try:
            return map_tensors(self.value, value)
        except LookupError:
            return None

    def value(self, traced: Any) -> Tensor:
        """The value of a traced tensor.

        Raises:
            LookupError: it is not known.
        """
        known: Tensor | None = traced.known
        if known is None or storage_id(traced.stand_in) in self._stale:
            raise LookupError
        return known

    def decide_by(self, arguments: Any) -> None:
        """Notes that the values of arguments have decided something."""
        for source in self._sources_of(arguments).values():
            self.read[id(source)] = (source, source.detach().clone())

    def compute(self, func: Any, arguments: Any) -> Any | None:
        """What an op returns for the values of its arguments; None where it can't be computed."""
        args, kwargs = arguments
        memory = {storage_id(tensor) for tensor in written_by(func, args, kwargs)}
        if not memory.isdisjoint(self._constants):
            return None
        try:
            results = func(*args, **kwargs)
        except (RuntimeError, IndexError):  # the step itself meets the error, where the graph runs
            return None
        sources = self._sources_of(arguments)
        map_tensors(lambda result: self._note(result, sources), results)
        for place in memory:
            self._sources[place] = self._sources.get(place, {}) | sources
        return results

    def spoil(self, stand_ins: list[Tensor]) -> None:
        """Notes that values which are not known have been written to memory."""
        self._stale |= set(map(storage_id, stand_ins))

    def _note(self, result: Tensor, sources: Sources) -> None:
        memory = storage_id(result)
        self._sources[memory] = self._sources.get(memory, {}) | sources
        self._kept.append(result)

    def _sources_of(self, arguments: Any) -> Sources:
        found: Sources = {}
        map_tensors(lambda tensor: found.update(self._sources.get(storage_id(tensor), {})), arguments)
        return found


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an op writes to."""
    written: list[Tensor] = []
    for position, argument in enumerate(schema(func).arguments):
        if argument.is_write:
            map_tensors(written.append, args[position] if position < len(args) else kwargs.get(argument.name))
    return written


def has_mask(indices: Any) -> bool:
    """Whether one of the indices of an op is a mask."""
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def mask_places(mask: Tensor) -> tuple[Tensor, ...]:
    """The positions where a mask is true, one tensor for each of its axes."""
    return mask.bool().nonzero().unbind(-1)
