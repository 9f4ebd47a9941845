"""Evaluates a step graph with `jax.numpy`, op by op: by its lowering, or by the simpler ops that compose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch
from torch import fx

from popart_func.engines.composed import COMPOSED, compose
from popart_func.engines.lane_scan import NotLoweredError, UnsupportedError, summary
from popart_func.engines.stop_gradients import STOP_GRADIENT
from popart_func.engines.tracing.loop_nodes import Body, LoopTarget
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, TensorSpec, describe, op_name
from popart_func.engines.tracing.walk import Values, bind_arguments, substitute, walk
from popart_func.interop.lowerings.loops import lower_loop
from popart_func.interop.lowerings.table import find_lowering, is_registered
from popart_func.interop.trees import has_64_bits, jax_dtype, tensor_to_array, torch_dtype

__all__ = ["evaluate"]

_STORAGE = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")
"""Arguments that say how a result is stored, which no lowering is given."""

_WIDE = (torch.float64, torch.complex128)
# Raised as they are: a failed check that the user has asked of JAX, too little memory, and a refusal of our own.
_NOT_OURS = (FloatingPointError, MemoryError, UnsupportedError, jax.errors.JaxRuntimeError)


def evaluate(graph: StepGraph, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a graph, as arrays.

    Args:
        graph: traced from a PyTorch function.
        inputs: an array for each input; the values of constants are read now.

    Raises:
        UnsupportedError: there is no lowering of an op, or JAX refuses its arguments.
        TypeError: the graph is not pure, or needs float64 with JAX's 64-bit types off.
    """
    folded = {} if has_64_bits() else graph.cached(_FoldedKey(), lambda: _folded(graph.graph))

    def call(node: fx.Node, values: Values) -> Any:
        if node not in folded:
            return _evaluate_node(node, values)
        return tensor_to_array(folded[node].to(torch_dtype(jax_dtype(folded[node].dtype))), copy=True)

    return walk(graph.graph, [*inputs, *map(_constant, graph.constants)], call)


@dataclass(frozen=True)
class _FoldedKey(CacheKey[dict[fx.Node, torch.Tensor]]):
    pass


def _folded(graph: fx.Graph) -> dict[fx.Node, torch.Tensor]:
    """The values of 64-bit nodes that depend on no input: PyTorch computes them, since JAX has 32 bits only.

    A 64-bit node that the function returns is left out, and so refused.
    """
    values: dict[fx.Node, torch.Tensor] = {}
    returned: Any = graph.output_node().args[0]
    for node in graph.nodes:
        is_wide = getattr(node.meta.get("val"), "dtype", None) in _WIDE
        reads_wide = any(source in values for source in node.all_input_nodes)
        if node.op == "call_function" and (is_wide or reads_wide) and values.keys() >= set(node.all_input_nodes):
            args, kwargs = substitute((node.args, node.kwargs), values)
            values[node] = node.target(*args, **kwargs)
    return {node: value for node, value in values.items() if node not in returned or value.dtype not in _WIDE}


def _constant(tensor: torch.Tensor) -> Any:
    dtype = jax_dtype(tensor.dtype)
    narrowed = tensor.to(torch_dtype(dtype))
    if narrowed.dtype != tensor.dtype and (
        tensor.is_floating_point() or not (narrowed.to(tensor.dtype) == tensor).all()
    ):
        raise TypeError(
            f"to_jax_function: the function closes over a tensor of {tensor.dtype} that JAX would narrow to {dtype}: "
            f"cast it, or enable jax_enable_x64."
        )
    return tensor_to_array(narrowed.cpu(), copy=True)


def _evaluate_body(body: Body, inputs: Sequence[Any]) -> list[Any]:
    return walk(body.graph, inputs, _evaluate_node)


def _evaluate_node(node: fx.Node, values: Values) -> Any:
    if isinstance(node.target, LoopTarget):
        return lower_loop(node.target, substitute(node.args, values), _evaluate_body)
    name = op_name(node)
    if name == "copy_":
        raise TypeError(
            f"to_jax_function: the function changes an argument in place in {describe(node)}; it must be pure: clone "
            f"it first."
        )
    if name == STOP_GRADIENT:
        return jax.lax.stop_gradient(*substitute(node.args, values))
    value = node.meta.get("val", ())  # an op that only checks returns nothing
    many = isinstance(value, list | tuple)
    outs = [None if part is None else TensorSpec.of(part) for part in (value if many else [value])]
    for out in outs:
        if out is not None and out.dtype == torch.float64 and not has_64_bits():
            raise TypeError(
                f"to_jax_function: float64 in {describe(node)}: JAX has it only with jax_enable_x64; use float32."
            )
    result = _lowered(node, values, outs if many else outs[0])
    results = result if many else [result]
    finished = [None if out is None else _finished(node, part, out) for part, out in zip(results, outs, strict=False)]
    return finished if many else finished[0]


def _lowered(node: fx.Node, values: Values, out: Any) -> Any:
    """What an op returns: by its lowering or, if there is none or it refuses the arguments, by simpler ops."""
    name = op_name(node)
    lowering = find_lowering(name)
    if lowering is None and name not in COMPOSED:
        hint = "" if node.target.namespace == "aten" else "; add one with register_lowering"  # type: ignore[union-attr]
        raise _unsupported(node, "there is no lowering of", hint)
    if lowering is not None:
        arguments = [value for name, value in bind_arguments(node, values).items() if name not in _STORAGE]
        try:
            return lowering(out, *arguments)
        except NotImplementedError as error:
            if name not in COMPOSED or not isinstance(error, NotLoweredError):
                raise _unsupported(node, f"with {error} there is no lowering of") from None
        except Exception as error:
            if is_registered(name) or isinstance(error, _NOT_OURS):
                error.add_note(f"to_jax_function: in the lowering of {name!r}, in {describe(node)}.")
                raise
            raise _unsupported(node, f"JAX refuses the arguments ({summary(error)}) of") from error
    return compose(node, values, lambda graph, inputs: walk(graph, inputs, _evaluate_node))


def _finished(node: fx.Node, value: Any, out: TensorSpec) -> Any:
    """A lowering's result in the dtype that PyTorch gives it."""
    if tuple(value.shape) != out.shape:
        raise TypeError(
            f"to_jax_function: the lowering of {op_name(node)!r} must return the shape {out.shape}, got "
            f"{tuple(value.shape)}, in {describe(node)}."
        )
    return value.astype(jax_dtype(out.dtype))


def _unsupported(node: fx.Node, what: str, hint: str = "") -> UnsupportedError:
    specs = ", ".join(
        str(TensorSpec.of(source.meta["val"])) if isinstance(source.meta["val"], torch.Tensor) else "several"
        for source in node.all_input_nodes
    )
    return UnsupportedError(f"to_jax_function: {what} {op_name(node)!r} on {specs}, in {describe(node)}{hint}.")
