"""The step graph: a pure function on pytrees of tensors as core ATen ops on static shapes, which the engines read."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import optree
import torch
from torch import Tensor, fx

from popart_func.engines.tracing.loop_nodes import bodies_of, rounds_of
from popart_func.engines.tracing.mutations import is_mutable
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.engines.tracing.source_lines import TraceError, describe_line
from popart_func.engines.tracing.walk import op_name

__all__ = ["CacheKey", "StepGraph", "TensorSpec", "TraceError", "describe", "op_name"]

T = TypeVar("T")


class CacheKey(Generic[T]):
    """A key of `StepGraph.cached`, for a value of type T.

    Whoever makes something of a graph has a frozen dataclass of its own, ``class _Key(CacheKey[Kernel])``, with fields
    for all that the value depends on beside the graph.
    """


@dataclass(frozen=True)
class _ModuleKey(CacheKey[fx.GraphModule]):
    pass


@dataclass(frozen=True)
class _ChangeKey(CacheKey["fx.Node | None"]):
    pass


@dataclass(frozen=True, eq=False)
class StepGraph:
    """A traced function: flat tensors in, flat tensors out. Its `str` is for people to read.

    Attributes:
        graph: core ATen ops, no two of them the same, from inputs and constants to the outputs.
        inputs: specs of the inputs, in the order of optree's leaves of the arguments.
        outputs: specs of the outputs.
        out_structure: the result's structure.
        constants: tensors that the function closes over. An in-place change of one is seen by the next call; another
            tensor in its place is not.
        read: tensors that the function closes over whose values have decided what the graph is, each with a copy of
            those values: the graph holds while they are the same.
        wants_gradient: whether a constant requires a gradient, which no engine but eager carries.
    """

    graph: fx.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    out_structure: optree.PyTreeSpec
    constants: tuple[Tensor, ...]
    read: tuple[tuple[Tensor, Tensor], ...]
    wants_gradient: bool
    _cache: dict[CacheKey[Any], Any] = field(default_factory=dict, init=False, repr=False)
    _locks: dict[Any, threading.Lock] = field(default_factory=dict, init=False, repr=False)

    def cached(self, key: CacheKey[T], make: Callable[[], T]) -> T:
        """What ``make()`` returned when it was first asked for with this key; it lives as long as the graph does.

        One thread makes it, and others wait. A process that was forked meanwhile has locks of its own: in it, nobody
        would open those of its parent. (`functools.cached_property` of Python 3.11 has a lock that outlives a fork.)
        """
        if key not in self._cache:
            with self._locks.setdefault((os.getpid(), key), threading.Lock()):
                if key not in self._cache:
                    self._cache[key] = make()
        value: T = self._cache[key]
        return value

    @property
    def module(self) -> fx.GraphModule:
        """The graph as a function, ``module(*inputs, *constants) -> list of outputs``."""
        return self.cached(_ModuleKey(), lambda: fx.GraphModule({}, self.graph))

    @property
    def change(self) -> fx.Node | None:
        """The first node that changes an input or a constant in place; None in the graph of a pure function."""
        return self.cached(_ChangeKey(), lambda: next(filter(is_mutable, self.graph.nodes), None))

    @property
    def calls(self) -> list[fx.Node]:
        """The nodes that call an op, or take a part of its result."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    @property
    def operations(self) -> Counter[str]:
        """How often each op is called; those of a loop's body count as often as the loop runs it, if that is known."""
        return _operations(self.graph)

    def holds(self) -> bool:
        """Whether the tensors whose values were read still have the values that were read."""
        return all(torch.equal(tensor, value) for tensor, value in self.read)

    def __str__(self) -> str:
        return "\n".join(self._lines(with_source=False))

    def with_source(self) -> str:
        """The graph as `str` shows it, with the user's line above the ops that come from it."""
        return "\n".join(self._lines(with_source=True))

    def _lines(self, with_source: bool) -> Iterator[str]:
        yield from _lines(self.graph, with_source)
        kinds = ", ".join(f"{count} {name}" for name, count in self.operations.most_common())
        yield f"{self.operations.total()} operations: {kinds}"


def _operations(graph: fx.Graph) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            counts[op_name(node)] += 1
        for _, body in bodies_of(node):
            for name, count in _operations(body.graph).items():
                counts[name] += count * rounds_of(node)
    return counts


def _lines(graph: fx.Graph, with_source: bool) -> Iterator[str]:
    previous = None
    for node in graph.nodes:
        if node.op == "placeholder":
            yield f"{node.name}: {_specs(node)}"
        elif node.op == "call_function":
            if with_source and describe(node) != previous:
                previous = describe(node)
                yield f"  # {previous}"
            arguments = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
            yield f"  {node.name}: {_specs(node)} = {op_name(node)}({', '.join(arguments)})"
            for title, body in bodies_of(node):
                yield f"    {title}:"
                yield from (f"      {line}" for line in _lines(body.graph, with_source))
        else:
            yield f"return {', '.join(map(str, node.args[0]))}"


def describe(node: fx.Node) -> str:
    """The line of the user's code that a node comes from: ``file:line: `source` ``."""
    return describe_line(node.meta.get("line"))


def _specs(node: fx.Node) -> str:
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(str(TensorSpec.of(part)) for part in values)
