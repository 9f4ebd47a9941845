"""A pure function on pytrees of tensors as a graph of core ATen ops on static shapes: the front end of the engines.

A step is run once, in `recorder`, which notes the ops that arrive below autograd and the transforms of `torch.func`.
It is a light form of `make_fx`, which imports TorchDynamo and sympy: this way a small step is traced in 25 ms, also in
a new process.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, fx
from torch.func import functionalize

from popart_func.engines.tracing import source_lines as lines
from popart_func.engines.tracing.mutations import is_mutable, origin, without_mutations
from popart_func.engines.tracing.one_hot import OneHot
from popart_func.engines.tracing.recorder import Recorder, TensorSpec
from popart_func.engines.tracing.source_lines import TraceError
from popart_func.engines.tracing.start_up import without_collector, without_dynamo
from popart_func.engines.tracing.zero_d_indices import ZeroDIndices

__all__ = ["StepGraph", "TensorSpec", "TraceError", "describe", "op_name", "trace"]


class StepGraph(NamedTuple):
    """A traced function: flat tensors in, flat tensors out. Printed, it can be read.

    Attributes:
        graph: core ATen ops, no two of them the same, from inputs and constants to the outputs.
        inputs: what goes in, in the order of optree's leaves of the arguments.
        outputs: what comes out.
        out_structure: the result's structure.
        constants: tensors that the function closed over. What is changed in them in place is seen, what is put in
            their stead is not.
        read: numbers that Python code read from some of them; the graph holds while they are the same.
        wants_gradient: whether one of them requires a gradient, which no engine but eager carries.
        compiled: what engines have made of the graph, so that it lives as long as the function does.
    """

    graph: fx.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    out_structure: optree.PyTreeSpec
    constants: tuple[Tensor, ...]
    read: tuple[tuple[Tensor, bool | int | float | complex], ...]
    wants_gradient: bool
    compiled: dict[Any, Any]

    @property
    def module(self) -> fx.GraphModule:
        """The graph as a function, ``module(*inputs, *constants) -> list of outputs``."""
        if "module" not in self.compiled:
            self.compiled["module"] = fx.GraphModule({}, self.graph)
        module: fx.GraphModule = self.compiled["module"]
        return module

    @property
    def operations(self) -> Counter[str]:
        """How many there are of each op."""
        return Counter(op_name(node) for node in self.graph.nodes if node.op == "call_function")

    @property
    def change(self) -> fx.Node | None:
        """What changes an input or a constant in place; None in a graph of a pure function."""
        if "change" not in self.compiled:
            self.compiled["change"] = next(filter(is_mutable, self.graph.nodes), None)
        change: fx.Node | None = self.compiled["change"]
        return change

    def holds(self) -> bool:
        """Whether what was read from the constants is what they hold."""
        return all(tensor.item() == value for tensor, value in self.read)

    def __str__(self) -> str:
        lines = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                lines.append(f"{node.name}: {_specs(node)}")
            elif node.op == "call_function":
                arguments = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
                lines.append(f"  {node.name}: {_specs(node)} = {op_name(node)}({', '.join(arguments)})")
            else:
                lines.append(f"return {', '.join(map(str, node.args[0]))}")
        kinds = ", ".join(f"{count} {name}" for name, count in self.operations.most_common())
        return "\n".join([*lines, f"{self.operations.total()} operations: {kinds}"])


_graphs: dict[int, tuple[weakref.ref[Any], dict[Any, StepGraph]]] = {}
_lock = threading.RLock()  # torch.fx traces in one thread at a time


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
        TraceError: the function branches on values, reads them, has shapes that depend on them, or draws at random.
        TypeError: the function returns something that is not a tensor.
    """
    # What a function means also depends on the default dtype, on autocast, and a module's on its mode.
    modes = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), getattr(function, "training", None)
    key = (structure, tuple(inputs), *modes)
    with _lock:
        graphs = _graphs_of(function)
        if key not in graphs or not graphs[key].holds():
            with without_collector():
                graphs[key] = _trace(function, structure, tuple(inputs), check or (lambda result: None))
        return graphs[key]


def _graphs_of(function: Callable[..., Any]) -> dict[Any, StepGraph]:
    """The graphs of this very function, as long as it lives; not of one that is equal to it."""
    number = id(function)
    reference, graphs = _graphs.get(number, (None, {}))
    if reference is None or reference() is not function:
        graphs = {}
        with contextlib.suppress(TypeError):  # where it can't be referred to weakly, it is traced anew each time
            _graphs[number] = weakref.ref(function, functools.partial(_forget, _graphs, number)), graphs
    return graphs


def _forget(graphs: dict[int, Any], number: int, reference: object) -> None:
    graphs.pop(number, None)


def describe(node: fx.Node) -> str:
    """The line of the user's code that a node comes from: ``file:line: `source` ``."""
    return lines.described(node.meta.get("line"))


def _trace(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: tuple[TensorSpec, ...],
    check: Callable[[Any], Any],
) -> StepGraph:
    out_structure: list[optree.PyTreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        with ZeroDIndices(), OneHot():
            result = function(*optree.tree_unflatten(structure, leaves))
        check(result)
        out_leaves, spec = optree.tree_flatten(result)
        out_structure.append(spec)
        for path, leaf in zip(optree.tree_paths(result), out_leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"step: every leaf it returns must be a tensor, got {type(leaf).__name__} at {path}.")
        return list(out_leaves)

    recording = Recorder()
    arguments = [recording.input(spec) for spec in inputs]
    try:
        with without_dynamo(), recording:
            outputs = flat(*arguments)
    except RuntimeError as error:
        explanation = _explained(error)
        if explanation is None:
            raise
        raise explanation from error
    recording.graph.output([recording.traced(output).node for output in outputs])
    read = tuple((tensor.detach(), value) for tensor, value in recording.read)
    if not without_mutations(recording.graph):
        recording = _functionalized(recording, inputs)
    graph, constants = recording.graph, recording.constants
    _merge_equal(graph)
    _drop_unused(graph)
    recording.forget()
    return StepGraph(
        graph=graph,
        inputs=inputs,
        outputs=tuple(TensorSpec.of(output) for output in outputs),
        out_structure=out_structure[0],
        constants=tuple(constant.detach() for constant in constants),
        read=read,
        wants_gradient=any(constant.requires_grad for constant in constants),
        compiled={},
    )


def _functionalized(recording: Recorder, inputs: Sequence[TensorSpec]) -> Recorder:
    """The same without mutations, in a pass of its own: in one with `torch.func`, an autograd.Function breaks."""
    again = Recorder()
    arguments = [again.input(spec) for spec in inputs] + [again.constant(tensor) for tensor in recording.constants]
    with again:
        replay = functools.partial(_replay, again, recording.graph)
        outputs = functionalize(replay, remove="mutations")(*arguments)
    again.graph.output([again.traced(output).node for output in outputs])
    lines = {origin(node).name: node.meta.get("line") for node in recording.graph.nodes if is_mutable(node)}
    for node in again.graph.nodes:
        if is_mutable(node):  # what is left: writes to inputs and constants
            node.meta["line"] = lines.get(origin(node).name, node.meta.get("line"))
    return again


def _replay(recording: Recorder, graph: fx.Graph, *inputs: Tensor) -> list[Tensor]:
    """Calls the ops of a graph."""
    left = iter(inputs)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(left)
        elif node.op == "call_function":
            recording.line = node.meta.get("line")
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    (output,) = (node for node in graph.nodes if node.op == "output")
    return [values[node] for node in output.args[0]]


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not is_mutable(node):
            graph.erase_node(node)


def _merge_equal(graph: fx.Graph) -> None:
    """Computes what is the same only once."""
    seen: dict[Hashable, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        key = node.target, _key(node.args), _key(node.kwargs)
        same = node.args[0] if node.target is torch.ops.aten.alias.default else seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _key(argument: Any) -> Hashable:
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in argument.items())
    return type(argument), repr(argument)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0


_READS = ("data-dependent", ".item()", ".numpy()", ".tolist()", "its data is not allocated")
"""What PyTorch says when it is asked for values that it does not have."""


def _explained(error: RuntimeError) -> TraceError | None:
    """What PyTorch's error means for a step, at the user's line; None where it is the user's own."""
    text = str(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = (lines.user_line(frame) for frame in reversed(frames))
    line = next((line for line in found if line is not None), None)
    if "dynamic shape" in text:
        return lines.depends_on_values(line)
    if any(sign in text for sign in _READS):
        return lines.reads_values(line)
    return None


def op_name(node: fx.Node) -> str:
    """The ATen name of the op that a node calls, without its overload."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema.name.removeprefix("aten::") if schema is not None else getattr(node.target, "__name__", str(node.target))
    )


def _specs(node: fx.Node) -> str:
    value = node.meta["val"]
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(str(TensorSpec.of(part)) for part in values)
