"""Splits the graph of a body and its gradient into the body of a forward loop and the body of a backward loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx

from popart_func.engines.tracing.loop_nodes import Body
from popart_func.engines.tracing.tidy import part_of

__all__ = ["Backward", "Forward", "split_backward"]


class Forward(NamedTuple):
    """The forward loop's body, with the values to store as further ys.

    Attributes:
        body: (carry, x, constants) -> (carry, y, stored).
        stored: how many values it stores.
    """

    body: Body
    stored: int


class Backward(NamedTuple):
    """The backward loop's body.

    Attributes:
        body: (stored, xs, constants, cotangents) -> gradients.
        xs: which of the xs it reads.
        constants: which of the constants it reads.
    """

    body: Body
    xs: list[int]
    constants: list[int]


def split_backward(
    joint: Body, results: int, carries: int, xs: int, cotangents: range, *, recomputes: bool
) -> tuple[Forward, Backward]:
    """Splits a body that computes results and gradients.

    The backward loop computes again what depends on constants alone, and views that are no smaller than the tensor
    they show. The forward loop stores all other values that the backward loop reads.

    Args:
        joint: (carry, x, constants, cotangents, more constants) -> (results, gradients).
        results: how many of its outputs are results.
        carries: how many of its inputs are the carry.
        xs: how many are xs.
        cotangents: the places of the cotangents among its inputs.
        recomputes: whether all is computed again, so that only the carry is stored.
    """
    inputs = joint.placeholders
    carry, moving_xs, given = inputs[:carries], inputs[carries : carries + xs], [inputs[n] for n in cotangents]
    constants = [*inputs[carries + xs : cotangents.start], *inputs[cotangents.stop :]]
    late, moving = _reached(joint, given), _reached(joint, [*carry, *moving_xs])

    def is_computed_again(node: fx.Node) -> bool:
        return node in late or node not in moving or recomputes or _is_wide_view(node)

    again: set[fx.Node] = set()
    stored: dict[fx.Node, None] = {}
    left = list(reversed(joint.results[results:]))
    while left:
        node = left.pop()
        if node in again or node in stored:
            continue
        if node in carry or (node.op != "placeholder" and not is_computed_again(node)):
            stored[node] = None
        else:
            again.add(node)
            left += reversed(node.all_input_nodes)
    read_xs = [node for node in moving_xs if node in again]
    read_constants = [node for node in constants if node in again]
    early = [*carry, *moving_xs, *constants]
    forward = part_of(joint, early, [*joint.results[:results], *stored])
    backward = part_of(joint, [*stored, *read_xs, *read_constants, *given], joint.results[results:])
    return (
        Forward(forward, len(stored)),
        Backward(backward, [moving_xs.index(node) for node in read_xs], [constants.index(n) for n in read_constants]),
    )


def _reached(body: Body, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on some inputs, these included."""
    reached = set(sources)
    for node in body.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _is_wide_view(node: fx.Node) -> bool:
    """Whether a node is a view with as many elements as the tensor that it shows."""
    if not getattr(node.target, "is_view", False):
        return False
    value, source = node.meta["val"], node.all_input_nodes[0].meta["val"]
    return isinstance(value, torch.Tensor) and isinstance(source, torch.Tensor) and value.numel() >= source.numel()
