"""Finds a loop that computes all that another loop computes, so that the other one can be removed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from popart_func.engines.tracing.loop_nodes import Body, LoopTarget, bodies_of

__all__ = ["covering"]

Scanned = tuple[Body, Sequence[Any], int, int]
"""A body, the operands of its loop, and how many of them are carry and xs."""


def covering(small: Scanned, large: Scanned) -> list[int] | None:
    """The places among a loop's results at which it has each result of another; None if it does not have them all.

    Two carries are equal in every round if they begin with the same value, and if a round makes equal carries of equal
    ones.
    """
    (body, operands, carries, xs), (large_body, large_operands, large_carries, large_xs) = small, large
    partners: list[int] = []
    for start in operands[:carries]:
        free = (n for n in range(large_carries) if large_operands[n] is start and n not in partners)
        partner = next(free, None)
        if partner is None:
            return None
        partners.append(partner)
    numbers: dict[Hashable, int] = {}
    given = [("carry", partner) for partner in partners] + _names(operands, carries, xs)
    large_given = [("carry", n) for n in range(large_carries)] + _names(large_operands, large_carries, large_xs)
    results = _numbered(body, given, numbers)
    large_results = _numbered(large_body, large_given, numbers)
    if any(results[n] != large_results[partner] for n, partner in enumerate(partners)):
        return None
    ys = {number: place for place, number in reversed(list(enumerate(large_results))) if place >= large_carries}
    if any(result not in ys for result in results[carries:]):
        return None
    return [*partners, *(ys[result] for result in results[carries:])]


def _names(operands: Sequence[Any], carries: int, xs: int) -> list[Hashable]:
    return [("x" if n < carries + xs else "constant", one) for n, one in enumerate(operands) if n >= carries]


def _numbered(body: Body, given: Sequence[Hashable], numbers: dict[Hashable, int]) -> list[int]:
    """A number for each result of a body, the same for the same operations on the same inputs."""
    left = iter(given)
    known: dict[fx.Node, int] = {}

    def key(argument: Any) -> Hashable:
        if isinstance(argument, fx.Node):
            return known[argument]
        if isinstance(argument, list | tuple):
            return ("list", *map(key, argument))
        return type(argument), repr(argument)

    for node in body.graph.nodes:
        if node.op == "placeholder":
            known[node] = numbers.setdefault(("input", next(left)), len(numbers))
        elif node.op == "call_function":
            target = _text(node) if isinstance(node.target, LoopTarget) else node.target
            whole = target, key(node.args), tuple((name, key(value)) for name, value in node.kwargs.items())
            known[node] = numbers.setdefault(whole, len(numbers))
    return [known[node] for node in body.results]


def _text(node: fx.Node) -> str:
    """A loop within the body as text that does not depend on the names of its nodes."""
    lines = []
    for title, body in bodies_of(node):
        names = {one: f"n{number}" for number, one in enumerate(body.graph.nodes)}
        lines.append(title)
        for one in body.graph.nodes:
            target = _text(one) if isinstance(one.target, LoopTarget) else one.target
            arguments = fx.node.map_arg((one.args, one.kwargs), names.__getitem__)
            lines.append(f"{target} {arguments!r}")
    return "\n".join(lines)
