"""Ops that change a tensor in place, made into ops that don't, where no one looks at the old values any more.

`torch.func.functionalize` does it for all of them, but it needs a second pass and imports sympy. The batching rules of
`torch.vmap` change what they have just computed: this is for those.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

__all__ = ["functional_variant", "is_mutable", "origin", "without_mutations"]


def is_mutable(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def origin(node: fx.Node) -> fx.Node:
    """The node that made the tensor which a node changes or shows."""
    while node.all_input_nodes and (is_mutable(node) or _is_alias(node)):
        node = node.all_input_nodes[0]
    return node


@functools.cache
def functional_variant(function: Any) -> Any:
    """``add`` for ``add_``, with the same arguments; None where there is none."""
    name = function._schema.name
    if (
        not function._schema.is_mutable
        or not name.startswith("aten::")
        or not name.endswith("_")
        or name.endswith("__")
    ):
        return None
    packet = getattr(torch.ops.aten, name[len("aten::") : -1], None)
    if packet is None:
        return None
    # Mostly under the same name, but `transpose_.default` is `transpose.int`.
    names = (function._overloadname or "default", *packet.overloads())
    variants = (getattr(packet, overload, None) for overload in names)
    fitting = (op for op in variants if op is not None and not op._schema.is_mutable and _asks(op) == _asks(function))
    return next(fitting, None)


def _asks(function: Any) -> list[str]:
    """The names of an op's arguments."""
    return [argument.name for argument in function._schema.arguments]


def without_mutations(graph: fx.Graph) -> bool:
    """Replaces mutations, in place; says whether all of them could be.

    A node that mutates has its variant, if that gives the same shape and dtype, in ``meta["functional"]``.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    storage: dict[fx.Node, fx.Node] = {}  # the first node that lies where a node does
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        variant = node.meta.get("functional")
        if is_mutable(node):
            if variant is None:
                return False
            first = storage[node.args[0]]
            others = (user for other in sharing[first] for user in other.users)
            if first.op == "placeholder" or any(order[user] > order[node] for user in others):
                return False
            node.target, first = variant, node
        else:
            first = storage[node.all_input_nodes[0]] if _is_alias(node) and node.all_input_nodes else node
        storage[node] = first
        sharing.setdefault(first, []).append(node)
    return True


def _is_alias(node: fx.Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))
