"""Draws: ops that draw random numbers, which a graph refuses where it needs their results."""

from __future__ import annotations

import torch
from torch import fx

from popart_func.engines.tracing.source_lines import TraceError, describe_line

__all__ = ["draw_behind", "draws_numbers", "is_draw", "refuse_draws"]


def is_draw(node: fx.Node) -> bool:
    """Whether a node draws random numbers from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draw_behind(node: fx.Node) -> fx.Node | None:
    """A draw that a node's value depends on, the node itself included; None if there is none."""
    seen, left = {node}, [node]
    while left:
        one = left.pop()
        if is_draw(one):
            return one
        left += [source for source in one.all_input_nodes if source not in seen]
        seen.update(left)
    return None


def refuse_draws(caller: str, graph: fx.Graph) -> None:
    """Raises TraceError if a graph draws random numbers."""
    draw = next(filter(is_draw, graph.nodes), None)
    if draw is not None:
        raise draws_numbers(caller, draw)


def draws_numbers(caller: str, draw: fx.Node) -> TraceError:
    """The error for a draw."""
    name = draw.target.overloadpacket.__name__  # type: ignore[union-attr]
    return TraceError(
        f"{caller}: random numbers can't be drawn inside without a key, as {name!r} does in "
        f"{describe_line(draw.meta.get('line'))}: give a module one, stateless(module)(params, x, rngs=key), or enter "
        f"popart_func.random.keyed(key); draw with popart_func.random; or draw before, and pass numbers in."
    )
