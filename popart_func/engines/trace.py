"""A pure function on pytrees of tensors as a graph of core ATen ops on static shapes: the front end of the engines.

This is the one place that touches PyTorch's tracer (`make_fx`, `functionalize`, the core decompositions), which is
semi-private: a test fails loudly when it moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["StepGraph", "TensorSpec", "describe", "trace"]


class TensorSpec(NamedTuple):
    """The shape, dtype and device of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)


class StepGraph(NamedTuple):
    """A traced function: flat tensors in, flat tensors out.

    Attributes:
        module: the graph, ``module(*inputs, *constants) -> list of outputs``; its ops are core ATen.
        inputs: what goes in, in the order of optree's leaves of the arguments.
        outputs: what comes out.
        out_structure: the result's structure.
        constants: tensors that the function closed over, with the values they had.
        compiled: what engines have made of the graph, so that it lives as long as the function does.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    out_structure: optree.PyTreeSpec
    constants: tuple[Tensor, ...]
    compiled: dict[Any, Any]


_graphs: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, StepGraph]] = weakref.WeakKeyDictionary()


def trace(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: Sequence[TensorSpec],
    *,
    check: Callable[[Any], Any] | None = None,
) -> StepGraph:
    """Traces ``function(*arguments)`` once for each structure, shapes and dtypes of its arguments.

    Args:
        function: pure, from pytrees of tensors to a pytree of tensors. Tensors it closes over become constants.
        structure: of the tuple of arguments.
        inputs: their leaves.
        check: is shown the result, and may refuse it by raising.

    Raises:
        TypeError: the function returns something that is not a tensor.
    """
    graphs = _graphs.setdefault(function, {})
    key = (structure, tuple(inputs))
    if key not in graphs:
        graphs[key] = _trace(function, structure, tuple(inputs), check or (lambda result: None))
    return graphs[key]


def _trace(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: tuple[TensorSpec, ...],
    check: Callable[[Any], Any],
) -> StepGraph:
    out_structure: list[optree.PyTreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        result = function(*optree.tree_unflatten(structure, leaves))
        check(result)
        out_leaves, spec = optree.tree_flatten(result)
        out_structure.append(spec)
        for path, leaf in zip(optree.tree_paths(result), out_leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"step: every leaf it returns must be a tensor, got {type(leaf).__name__} at {path}.")
        return list(out_leaves)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in inputs]
    # Two passes: in one, an autograd.Function breaks. The first removes torch.func's transforms, the second mutations.
    first = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    module = make_fx(
        functionalize(first, remove="mutations"),
        decomposition_table=dict(core_aten_decompositions()),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(*fakes)
    constants = _lift_constants(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return StepGraph(
        module=module,
        inputs=inputs,
        outputs=tuple(TensorSpec.of(node.meta["val"]) for node in output.args[0]),
        out_structure=out_structure[0],
        constants=constants,
        compiled={},
    )


def _lift_constants(module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Turns the tensors that the graph holds into further inputs."""
    constants: list[Tensor] = []
    last_input = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        value = getattr(module, node.target)
        with module.graph.inserting_after(*last_input) if last_input else module.graph.inserting_before():
            placeholder = module.graph.placeholder(f"constant_{len(constants)}")
        placeholder.meta["val"] = value
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        last_input = [placeholder]
        constants.append(value.detach())
    return tuple(constants)


def describe(node: fx.Node) -> str:
    """Where in the user's code a node comes from."""
    return "in the step"
