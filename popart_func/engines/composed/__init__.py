"""Ops that are composed of simpler ones: for each a function in PyTorch, which is traced and lowered in its place.

The native engine and the JAX evaluator use it for an op of which they have no lowering, or whose lowering refuses the
arguments. A function is called with the op's arguments in its schema's order, and returns what the op returns. It
closes over no tensor, and reads no values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor, fx

from popart_func.engines.composed.convolution import CONVOLUTIONS
from popart_func.engines.composed.gradients import GRADIENTS
from popart_func.engines.composed.indexing import SCATTERS
from popart_func.engines.composed.linalg import LINEAR_ALGEBRA
from popart_func.engines.composed.order import ORDER
from popart_func.engines.composed.pooling import POOLS
from popart_func.engines.composed.products import PRODUCTS
from popart_func.engines.composed.resampling import RESAMPLING
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec
from popart_func.engines.tracing.tracer import trace_step
from popart_func.engines.tracing.walk import Values, bind_arguments, op_name

__all__ = ["COMPOSED", "compose"]

COMPOSED: dict[str, Callable[..., Any]] = {
    **CONVOLUTIONS,
    **POOLS,
    **SCATTERS,
    **ORDER,
    **PRODUCTS,
    **LINEAR_ALGEBRA,
    **GRADIENTS,
    **RESAMPLING,
}
"""Every op that is composed of simpler ones here, by its name in ATen."""


def compose(node: fx.Node, values: Values, lower: Callable[[fx.Graph, Sequence[Any]], list[Any]]) -> Any:
    """What the op of a node returns, computed by the simpler ops that compose it.

    Args:
        node: calls an op of `COMPOSED`.
        values: the values of the node's arguments.
        lower: computes the outputs of a graph of simpler ops from the values of its inputs.

    Raises:
        NotLoweredError: the function that composes the op refuses its arguments.
    """
    graph = node.meta.get("composed") or _traced(node)
    node.meta["composed"] = graph  # kept, since a function in JAX is evaluated at each call
    outputs = lower(graph.graph, [values[source] for source in node.all_input_nodes])
    return optree.tree_unflatten(graph.out_structure, outputs)


def _traced(node: fx.Node) -> StepGraph:
    """The graph of the simpler ops, as a function of the nodes that the op reads."""
    sources, function = node.all_input_nodes, COMPOSED[op_name(node)]

    def step(*tensors: Tensor) -> Any:
        return function(*bind_arguments(node, dict(zip(sources, tensors, strict=True))).values())

    structure = optree.tree_structure(tuple(0 for _ in sources))  # type: ignore[arg-type]
    specs = [TensorSpec.of(source.meta["val"]) for source in sources]
    graph = trace_step(step, structure, specs, caller=str(node.target))
    assert not graph.constants, f"the composition of {node.target} closes over a tensor"
    for part in graph.graph.nodes:
        part.meta["line"] = node.meta.get("line")  # the user's, for refusals
    return graph
