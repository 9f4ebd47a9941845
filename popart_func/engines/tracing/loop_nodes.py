"""Loop nodes: nodes of a graph that run bodies, which are graphs of their own, many times or by choice.

`Body` is such a graph, and `LoopTarget` what a node calls that runs one. `popart_func.engines.loops` has the loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["Body", "LoopTarget", "all_nodes", "bodies_of", "rounds_of"]


@dataclass(frozen=True, eq=False)
class Body:
    """The graph of a loop's body: flat tensors in, flat tensors out, and nothing that it closes over.

    Attributes:
        graph: of ATen ops and loops.
        inputs: specs of the inputs.
        outputs: specs of the outputs.
    """

    graph: fx.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The nodes of the inputs."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes of the outputs."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def dependencies(self) -> tuple[frozenset[int], ...]:
        """For each output the positions of the inputs that it is computed from."""
        # Kept without functools.cached_property, whose lock a fork may inherit held in Python 3.11.
        kept = vars(self)
        if "_dependencies" not in kept:
            kept["_dependencies"] = self._find_dependencies()
        found: tuple[frozenset[int], ...] = kept["_dependencies"]
        return found

    def _find_dependencies(self) -> tuple[frozenset[int], ...]:
        known: dict[fx.Node, frozenset[int]] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                known[node] = frozenset([len(known)])
            else:
                known[node] = frozenset[int]().union(*(known[source] for source in node.all_input_nodes))
        return tuple(known[node] for node in self.results)

    def reached_from(self, inputs: Sequence[bool], carries: int) -> tuple[list[bool], list[bool]]:
        """Which inputs and outputs are computed from some inputs, when outputs become the carry of the next round.

        Args:
            inputs: for each input whether it is one of them.
            carries: how many of the inputs, and of the outputs, are the carry; they come first.
        """
        reached = list(inputs)
        while True:
            outputs = [any(reached[position] for position in places) for places in self.dependencies]
            more = [before or after for before, after in zip(reached[:carries], outputs[:carries], strict=True)]
            if more == reached[:carries]:
                return reached, [*more, *outputs[carries:]]
            reached[:carries] = more


class LoopTarget:
    """What a node calls that runs bodies.

    Attributes:
        name: of the loop, as a printed graph shows it.
    """

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def bodies(self) -> tuple[tuple[str, Body], ...]:
        """The bodies, each with the words that introduce it in a printed graph."""
        raise NotImplementedError

    @property
    def rounds(self) -> int:
        """How often each body runs; 1 where that is not known."""
        raise NotImplementedError

    def simplify(self, node: fx.Node) -> None:
        """Removes from a loop what its graph does not use, by changing the node that calls it."""

    def covers(self, node: fx.Node, other: fx.Node) -> list[int] | None:
        """Where a node that calls this loop has the results of another node; None if it does not have them all."""
        return None


def bodies_of(node: fx.Node) -> tuple[tuple[str, Body], ...]:
    """The bodies that a node runs; none if it is no loop."""
    return node.target.bodies if isinstance(node.target, LoopTarget) else ()


def rounds_of(node: fx.Node) -> int:
    """How often a node runs each of its bodies; 1 where that is not known."""
    return node.target.rounds if isinstance(node.target, LoopTarget) else 1


def all_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph, each followed by those of the bodies that it runs."""
    for node in graph.nodes:
        yield node
        for _, body in bodies_of(node):
            yield from all_nodes(body.graph)
