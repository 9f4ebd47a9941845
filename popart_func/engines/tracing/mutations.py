"""In-place ops replaced by ops that return a new tensor, where nothing reads the old values afterwards.

The batching rules of `torch.vmap` change tensors in place that they have just computed: this is for those.
`torch.func.functionalize` replaces every in-place op, but it needs a second pass and imports sympy.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from popart_func._torch import schema

__all__ = ["functional_variant", "is_mutable", "origin", "without_mutations"]


def is_mutable(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    found = schema(node.target)
    return found is not None and bool(found.is_mutable)


def origin(node: fx.Node) -> fx.Node:
    """The node that made the tensor which a node changes or is a view of."""
    while node.all_input_nodes and (is_mutable(node) or _is_alias(node)):
        node = node.all_input_nodes[0]
    return node


@functools.cache
def functional_variant(op: Any) -> Any:
    """The op that returns what an in-place op writes, with the same arguments: ``add`` for ``add_``; None without."""
    name = schema(op).name
    is_in_place = schema(op).is_mutable and name.endswith("_") and not name.endswith("__")
    packet = getattr(torch.ops.aten, name[len("aten::") : -1], None) if is_in_place else None
    if packet is None or not name.startswith("aten::"):
        return None
    # Mostly the overload of the same name, but `transpose_.default` is `transpose.int`.
    overloads = (schema(op).overload_name or "default", *packet.overloads())
    variants = (getattr(packet, overload, None) for overload in overloads)
    return next((found for found in variants if found is not None and _fits(found, op)), None)


def _fits(variant: Any, op: Any) -> bool:
    return not schema(variant).is_mutable and _arguments(variant) == _arguments(op)


def _arguments(op: Any) -> list[tuple[str, str]]:
    """Names and types: those of `pow_.Scalar` and `pow.Scalar` differ in their types alone."""
    return [(argument.name, str(argument.type)) for argument in schema(op).arguments]


def without_mutations(graph: fx.Graph) -> bool:
    """Replaces the in-place ops of a graph, in the graph itself; returns whether all of them could be replaced.

    ``node.meta["functional"]`` holds the op that replaces a node's, if that returns the same shape and dtype.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}  # the node that last wrote the memory of a node's tensor
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        variant = node.meta.get("functional")
        if is_mutable(node):
            if variant is None:
                return False
            first = owner[node.args[0]]
            others = (user for other in sharing[first] for user in other.users)
            if first.op == "placeholder" or any(order[user] > order[node] for user in others):
                return False
            node.target, first = variant, node
        else:
            first = owner[node.all_input_nodes[0]] if _is_alias(node) and node.all_input_nodes else node
        owner[node] = first
        sharing.setdefault(first, []).append(node)
    return True


def _is_alias(node: fx.Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))
