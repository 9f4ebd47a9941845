"""Loops as JAX's own: `jax.lax.scan`, `while_loop` and `cond`, which JAX differentiates, maps and compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from popart_func.engines.loops.cond_loop import Cond
from popart_func.engines.loops.scan_loop import ScanLoop
from popart_func.engines.loops.while_loop import WhileLoop
from popart_func.engines.tracing.loop_nodes import Body, LoopTarget

__all__ = ["lower_loop"]


def lower_loop(loop: LoopTarget, operands: Sequence[Any], evaluate: Callable[[Body, Sequence[Any]], list[Any]]) -> Any:
    """The results of a loop on arrays.

    Args:
        loop: what a node of the graph calls.
        operands: its arguments.
        evaluate: computes a body.
    """
    if isinstance(loop, ScanLoop):
        carries = loop.carries
        xs, closed = tuple(operands[carries : carries + loop.xs]), operands[carries + loop.xs :]

        def step(carry: Any, x: Any) -> Any:
            results = evaluate(loop.body, [*carry, *x, *closed])
            return tuple(results[:carries]), tuple(results[carries:])

        carry, ys = jax.lax.scan(
            step, tuple(operands[:carries]), xs, length=loop.length, reverse=loop.reverse, unroll=loop.unroll
        )
        return [*carry, *ys]
    if isinstance(loop, WhileLoop):
        closed = operands[loop.carries :]
        return jax.lax.while_loop(
            lambda carry: evaluate(loop.condition, [*carry, *closed])[0],
            lambda carry: evaluate(loop.body, [*carry, *closed]),
            list(operands[: loop.carries]),
        )
    assert isinstance(loop, Cond), "there are three kinds of loops"
    true, false = (lambda *values, body=body: evaluate(body, values) for body in (loop.true, loop.false))
    return jax.lax.cond(operands[0], true, false, *operands[1:])
