"""Cleans a graph of repeated ops, of values that nothing reads, and of loops that another loop covers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from popart_func.engines.tracing.loop_nodes import Body, LoopTarget
from popart_func.engines.tracing.mutations import is_mutable
from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["drop_unused", "join_loops", "merge_equal", "part_of"]


def drop_unused(graph: fx.Graph) -> None:
    """Erases the nodes whose value nothing reads, and the parts of loops whose results nothing reads."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not is_mutable(node):
            graph.erase_node(node)
        elif isinstance(node.target, LoopTarget):
            node.target.simplify(node)


def merge_equal(graph: fx.Graph) -> None:
    """Erases the nodes that compute what another one has computed before."""
    seen: dict[Hashable, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        key = node.target, _key(node.args), _key(node.kwargs)
        same = node.args[0] if node.target is torch.ops.aten.alias.default else seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _key(argument: Any) -> Hashable:
    """Equal for equal arguments of an op; but 1, 1.0 and True differ, and so do 0.0 and -0.0, unlike in Python."""
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in argument.items())
    return type(argument), repr(argument)


def join_loops(graph: fx.Graph) -> None:
    """Erases the loops that another loop covers: the forward loop of a gradient computes what the loop itself does."""
    loops = [node for node in graph.nodes if isinstance(node.target, LoopTarget)]
    for position, node in enumerate(loops):
        for other in loops[position + 1 :]:
            found = other.target.covers(other, node)
            if found is not None and not _depends(other, node):
                _replace_results(node, other, found)
                _sort(graph)
                break


def _replace_results(node: fx.Node, other: fx.Node, places: list[int]) -> None:
    """Takes the results of a loop from another one, which has them at these places."""
    parts = {part.args[1]: part for part in other.users}
    for part in list(node.users):
        place = places[part.args[1]]  # type: ignore[index]
        if place not in parts:
            with node.graph.inserting_after(other):
                parts[place] = node.graph.create_node("call_function", part.target, (other, place))
            parts[place].meta = dict(part.meta)
        part.replace_all_uses_with(parts[place])
        node.graph.erase_node(part)
    node.graph.erase_node(node)


def _depends(node: fx.Node, source: fx.Node) -> bool:
    seen, left = {node}, [node]
    while left:
        one = left.pop()
        if one is source:
            return True
        left += [other for other in one.all_input_nodes if other not in seen]
        seen.update(left)
    return False


def _sort(graph: fx.Graph) -> None:
    """Puts each node behind all that it reads, and leaves the order as it is where it can."""
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        left = [node]
        while left:
            one = left[-1]
            missing = [source for source in one.all_input_nodes if source not in done]
            if missing:
                left += reversed(missing)
                continue
            left.pop()
            if one not in done:
                done.add(one)
                if one is not node:
                    node.prepend(one)


def part_of(body: Body, inputs: list[fx.Node], outputs: list[fx.Node]) -> Body:
    """The body that computes some values from others."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"arg{number}_1")
        copies[node].meta = dict(node.meta)
    needed, left = set(inputs), [node for node in outputs if node not in copies]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    for node in body.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    drop_unused(graph)
    return Body(graph, _specs(inputs), _specs(outputs))


def _specs(nodes: list[fx.Node]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.of(node.meta["val"]) for node in nodes)
