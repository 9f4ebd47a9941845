"""Walks a step graph: computes its outputs node by node, whatever a value is.

The native engine's values are expressions, JAX's are arrays, and a replay's are tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx

from popart_func._torch import schema

__all__ = ["Values", "bind_arguments", "op_name", "substitute", "walk"]

Values = Mapping[fx.Node, Any]
"""The value of each node so far."""


def walk(
    graph: fx.Graph,
    inputs: Iterable[Any],
    call: Callable[[fx.Node, Values], Any],
    keep: Callable[[fx.Node, Any], Any] = lambda node, value: value,
) -> list[Any]:
    """Computes the outputs of a graph.

    Args:
        graph: of calls; the parts of an op with several results are taken with `operator.getitem`.
        inputs: the values of the graph's inputs and constants, in order. They are taken one at a time.
        call: gives the value of a node that calls an op, from the values of the nodes before it; several as a sequence.
        keep: is given the value of each op and of each part of several, and returns the value that later nodes read.

    Returns:
        The values of the graph's outputs.
    """
    left = iter(inputs)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.target is operator.getitem:
            source, index = node.args
            values[node] = keep(node, values[source][index])
        elif node.op == "call_function":
            values[node] = keep(node, call(node, values))
    outputs: Any = graph.output_node().args[0]
    return [values[node] for node in outputs]


def substitute(argument: Any, values: Values) -> Any:
    """An argument, or a nest of them, with each node in it replaced by its value."""
    return fx.node.map_arg(argument, values.__getitem__)


def bind_arguments(node: fx.Node, values: Values) -> dict[str, Any]:
    """The arguments of the op that a node calls, by name, in the order of its schema; defaults where none is given."""
    bound = {}
    for position, argument in enumerate(schema(node.target).arguments):
        is_given = position < len(node.args) and not argument.kwarg_only
        given = node.args[position] if is_given else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = substitute(given, values)
    return bound


def op_name(node: fx.Node) -> str:
    """The name of the op that a node calls, without its overload: ``add`` for ATen's, else ``namespace::name``."""
    found = schema(node.target)
    return (
        found.name.removeprefix("aten::") if found is not None else getattr(node.target, "__name__", str(node.target))
    )
