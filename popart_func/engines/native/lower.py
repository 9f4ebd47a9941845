"""Lowers a step graph: its ops become expressions and statements; see `kernel` for what is stored, and `ops`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from popart_func.engines.composed import COMPOSED, compose
from popart_func.engines.lane_scan import NotLoweredError, UnsupportedError
from popart_func.engines.native import ops
from popart_func.engines.native.c_code import C_TYPES
from popart_func.engines.native.expressions import Buffer, Expr, Load, Operation
from popart_func.engines.native.kernel import MAX_DEPTH, Kernel, is_cheap
from popart_func.engines.native.layouts import contiguous
from popart_func.engines.native.nested import lower_loop
from popart_func.engines.native.statements import Program, needed
from popart_func.engines.tracing.loop_nodes import LoopTarget
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec, describe, op_name
from popart_func.engines.tracing.walk import Values, bind_arguments, substitute, walk

__all__ = ["lower"]


def lower(graph: StepGraph, carries: int, xs: int, uniform: Sequence[bool]) -> Program:
    """Lowers a step graph.

    Args:
        graph: of a step.
        carries: how many of its inputs, and of its outputs, are the carry; they come first.
        xs: how many of its inputs are xs; they follow.
        uniform: for each input and constant whether all lanes share it.

    Raises:
        UnsupportedError: an op, dtype or shape that the engine lacks.
        TypeError: a registered op returns something else than its result.
    """
    kernel = Kernel()
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    loads = [_input(node, number, uniform[number]) for number, node in enumerate(placeholders)]
    inputs = [load.buffer for load in loads]
    outputs = _lower_graph(kernel, graph.graph, loads)
    carry: list[Buffer | None] = []
    for value, buffer in zip(outputs[:carries], inputs, strict=False):
        stays = isinstance(value, Load) and value.buffer is buffer and value.is_whole
        carry.append(None if stays else _output(kernel, value, taken=[*inputs, *carry]))
    ys = tuple(_output(kernel, value, taken=inputs) for value in outputs[carries:])
    return Program(tuple(inputs), xs, needed(kernel.statements, {*carry, *ys}), tuple(carry), ys)


def _output(kernel: Kernel, value: Expr, taken: Sequence[Buffer | None]) -> Buffer:
    """A buffer that holds exactly this value and is not among those taken.

    Each leaf of the carry gets a buffer of its own: at the end of a step it is copied over the old one, or has already
    been written there.
    """
    own = isinstance(value, Load) and value.is_whole and value.buffer not in taken
    return value.buffer if own else kernel.copied(value).buffer  # type: ignore[union-attr]


def _input(node: fx.Node, number: int, uniform: bool) -> Load:
    spec = TensorSpec.of(node.meta["val"])
    _check_dtype(node, spec.dtype)
    return Load(Buffer(f"in{number}", spec.dtype, math.prod(spec.shape), uniform), contiguous(spec.shape))


def _kept(kernel: Kernel, node: fx.Node, value: Any) -> Any:
    """A value that several ops read is stored. A single reader computes it in its own loop, at no cost."""
    several = isinstance(value, Operation) and (_fanout(node) != 1 or value.depth >= MAX_DEPTH)
    return kernel.stored(value) if several and not is_cheap(value) else value


def _lower_graph(kernel: Kernel, graph: fx.Graph, inputs: Sequence[Expr]) -> list[Expr]:
    return walk(graph, inputs, functools.partial(_lower_node, kernel), functools.partial(_kept, kernel))


def _lower_node(kernel: Kernel, node: fx.Node, values: Values) -> Any:
    name, outs = op_name(node), node.meta["val"]
    specs = _specs(outs)
    for spec in specs:
        _check_dtype(node, spec.dtype)
    if isinstance(node.target, LoopTarget):
        return lower_loop(kernel, node.target, substitute(node.args, values), _lower_graph)
    if name not in ops.OPS and name not in COMPOSED:
        raise UnsupportedError(f"native: no op {name!r}, which gives {_shapes(specs)}; {describe(node)}.")
    arguments = list(bind_arguments(node, values).values())
    _check_strides(node, name)
    try:
        value = _value(kernel, node, specs if isinstance(outs, list | tuple) else specs[0], arguments, values)
    except NotLoweredError as error:
        raise UnsupportedError(f"native: {name!r}, which gives {_shapes(specs)}: {error}; {describe(node)}.") from None
    _check_result(node, value)
    return value


def _specs(outs: Any) -> list[TensorSpec]:
    """The specs of an op's results; a result that is None, since it was not asked for, has none."""
    return [TensorSpec.of(out) for out in filter(_is_given, outs if isinstance(outs, list | tuple) else [outs])]


def _value(kernel: Kernel, node: fx.Node, out: Any, arguments: list[Any], values: Values) -> Any:
    """What an op returns: by its lowering or, if there is none or it refuses the arguments, by simpler ops."""
    name = op_name(node)
    if name not in COMPOSED:
        return ops.OPS[name](kernel, out, *arguments)
    if name in ops.OPS:
        with contextlib.suppress(NotLoweredError):
            return ops.OPS[name](kernel, out, *arguments)
    return compose(node, values, functools.partial(_lower_graph, kernel))


def _is_given(value: Any) -> bool:
    return value is not None


def _check_strides(node: fx.Node, name: str) -> None:
    """Refuses an op that depends on the strides of its argument, unless that lies in its memory as in a buffer here."""
    if not name.startswith("as_strided"):
        return
    (source, *_) = node.all_input_nodes
    while op_name(source) in ("view", "_unsafe_view", "unsqueeze", "squeeze", "alias", "detach"):
        (source,) = source.all_input_nodes  # which lies in the same memory in the same order, if it is contiguous
    is_part = ops.is_view(source) and op_name(source) != "clone"
    if not source.meta["val"].is_contiguous() or is_part:
        raise UnsupportedError(
            f"native: {name!r} of a view, whose strides the engine does not keep: clone it before; {describe(node)}."
        )


def _check_result(node: fx.Node, value: Any) -> None:
    """Raises unless a lowering returned what its op returns; only a registered op can fail here."""
    outs, values = node.meta["val"], value
    if not isinstance(outs, list | tuple):
        outs, values = [outs], [value]
    if isinstance(values, list | tuple) and len(values) == len(outs):
        values = [part for part, out in zip(values, outs, strict=True) if out is not None]
    specs = _specs(outs)
    if (
        not isinstance(values, list | tuple)
        or len(values) != len(specs)
        or any(
            not isinstance(part, Expr) or (tuple(part.shape), part.dtype) != (spec.shape, spec.dtype)
            for part, spec in zip(values, specs, strict=True)
        )
    ):
        got = value if not isinstance(value, Expr) else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        raise TypeError(
            f"register_op: `lower` of {op_name(node)!r} must return expressions of what the op returns, "
            f"{_shapes(specs)}, got {got}; {describe(node)}."
        )


def _shapes(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}" for spec in specs)


def _check_dtype(node: fx.Node, dtype: torch.dtype) -> None:
    if dtype not in C_TYPES:
        raise UnsupportedError(f"native: no dtype {dtype}; {describe(node)}.")


def _fanout(node: fx.Node) -> int:
    """How many ops read a value, directly or through views."""
    return sum(_fanout(user) if ops.is_view(user) else 1 for user in node.users)
