"""Unrolls the loops of a graph: scans become a straight line, choices become selections."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.loops.cond_loop import Cond
from popart_func.engines.loops.scan_loop import ScanLoop
from popart_func.engines.tracing.loop_nodes import LoopTarget
from popart_func.engines.tracing.step_graph import StepGraph, describe

__all__ = ["unrolled"]

_aten = torch.ops.aten


def unrolled(engine: str, graph: StepGraph, most: int) -> fx.GraphModule:
    """The graph as a function without loops, ``module(*inputs, *constants) -> list of outputs``.

    Args:
        engine: that asks for it, for errors.
        graph: of a step.
        most: how many operations the graph may then have.

    Raises:
        UnsupportedError: it has a `while_loop`, whose rounds are not known, or too many operations.
    """
    if not any(isinstance(node.target, LoopTarget) for node in graph.graph.nodes):
        return graph.module
    total = graph.operations.total()
    if total > most:
        raise UnsupportedError(
            f"{engine}: it unrolls the loops inside a step, which has {total} operations then, more than {most}: use "
            f"the engine 'native' or 'eager'."
        )
    flat = fx.Graph()
    inputs = [flat.placeholder(node.name) for node in graph.graph.nodes if node.op == "placeholder"]
    flat.output(_Unrolling(engine, flat).inline(graph.graph, inputs))
    return fx.GraphModule({}, flat)


class _Unrolling:
    """Copies graphs into one without loops."""

    def __init__(self, engine: str, flat: fx.Graph) -> None:
        self._engine, self._flat = engine, flat

    def inline(self, graph: fx.Graph, inputs: Sequence[Any]) -> list[Any]:
        """Copies the nodes of a graph, and returns the copies of its outputs."""
        left = iter(inputs)
        copies: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(left)
            elif isinstance(node.target, LoopTarget):
                copies[node] = self._loop(node, [copies[source] for source in node.args])
            elif node.target is operator.getitem and isinstance(copies[node.args[0]], list):
                copies[node] = copies[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                copies[node] = self._flat.node_copy(node, copies.__getitem__)
        outputs: Any = graph.output_node().args[0]
        return [copies[node] for node in outputs]

    def _loop(self, node: fx.Node, operands: list[Any]) -> list[Any]:
        loop, call = node.target, self._flat.call_function
        if isinstance(loop, Cond):
            branches = (self.inline(body.graph, operands[1:]) for body in (loop.true, loop.false))
            return [call(_aten.where.self, (operands[0], *pair)) for pair in zip(*branches, strict=True)]
        if not isinstance(loop, ScanLoop):
            raise UnsupportedError(
                f"{self._engine}: no `while_loop` inside a step, as in {describe(node)}: use the engine 'native' or "
                f"'eager'."
            )
        carry, end = operands[: loop.carries], loop.carries + loop.xs
        rounds = []
        order = range(loop.length)
        for time in reversed(order) if loop.reverse else order:
            x = [call(_aten.select.int, (one, 0, time)) for one in operands[loop.carries : end]]
            results = self.inline(loop.body.graph, [*carry, *x, *operands[end:]])
            carry = results[: loop.carries]
            rounds.append(results[loop.carries :])
        if loop.reverse:
            rounds.reverse()
        return [*carry, *(call(_aten.stack.default, (list(ys),)) for ys in zip(*rounds, strict=True))]
