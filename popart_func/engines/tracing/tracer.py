"""Traces a step: runs it once on tensors without values, and keeps the graph of the ops it calls.

`recorder` notes the ops that arrive below autograd and the transforms of `torch.func`. It is a light form of `make_fx`,
which imports TorchDynamo and sympy: this way a small step is traced in 25 ms, also in a new process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor, fx
from torch.func import functionalize

from popart_func._torch import (
    DynamoNeeded,
    dispatch_modes,
    function_modes,
    import_dynamo,
    outside_functionalize,
    schema,
    without_dynamo,
)
from popart_func.engines.tracing.ambient import ambient_settings, module_modes, without_autocast
from popart_func.engines.tracing.draws import refuse_draws
from popart_func.engines.tracing.mutations import is_mutable, origin, without_mutations
from popart_func.engines.tracing.plain_paths import plain_paths
from popart_func.engines.tracing.recorder import Recorder
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.engines.tracing.source_lines import (
    TraceError,
    depends_on_values,
    describe_line,
    error_line,
    reads_values,
)
from popart_func.engines.tracing.start_up import look_up_ops, without_collector
from popart_func.engines.tracing.step_graph import StepGraph
from popart_func.engines.tracing.tidy import drop_unused, join_loops, merge_equal
from popart_func.engines.tracing.walk import Values, substitute, walk

__all__ = ["record", "trace_step"]

MANY_OPERATIONS = 10_000
"""From how many operations on a warning says that a step takes long to compile."""

_graphs: dict[int, tuple[weakref.ref[Any], dict[Any, StepGraph]]] = {}
_lock = threading.RLock()  # torch.fx traces in one thread at a time
if hasattr(os, "register_at_fork"):  # a fork waits for the trace of another thread: no one would end it in the child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def trace_step(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: Sequence[TensorSpec],
    *,
    caller: str = "scan",
    check: Callable[[Any], object] = lambda result: None,
) -> StepGraph:
    """Traces ``function(*arguments)`` once for each structure, shapes and dtypes of its arguments.

    Args:
        function: pure, from pytrees of tensors to a pytree of tensors. Tensors it closes over become constants.
        structure: the structure of the tuple of arguments.
        inputs: the specs of its leaves.
        caller: the function that the user has called, for errors.
        check: is called with the result, and may refuse it by raising.

    Raises:
        TraceError: the function branches on values, reads them, has shapes that depend on them, or draws at random.
        TypeError: the function returns something that is not a tensor.
    """
    key = structure, tuple(inputs), ambient_settings(), module_modes(function)
    trace = functools.partial(_trace, function, structure, tuple(inputs), caller, check)
    with _lock:
        look_up_ops()
        # A mode that sees every function may change what they do, as `random.keyed` does: its graph is for once.
        graphs = {} if function_modes() or dispatch_modes() else _graphs_of(function)
        graph = graphs.get(key)
        if graph is None or not graph.holds():
            with without_collector():
                try:
                    graph = trace()
                except DynamoNeeded:
                    import_dynamo()
                    graph = trace()
            graphs[key] = graph
        return graph


def _graphs_of(function: Callable[..., Any]) -> dict[Any, StepGraph]:
    """The graphs of this very function, as long as it lives; not of a function that is equal to it."""
    number = id(function)
    reference, graphs = _graphs.get(number, (None, {}))
    if reference is None or reference() is not function:
        graphs = {}
        with contextlib.suppress(TypeError):  # a callable without weak references is traced anew each time
            _graphs[number] = weakref.ref(function, functools.partial(_forget, _graphs, number)), graphs
    return graphs


def _forget(graphs: dict[int, Any], number: int, reference: object) -> None:
    graphs.pop(number, None)


def _trace(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: tuple[TensorSpec, ...],
    caller: str,
    check: Callable[[Any], object],
) -> StepGraph:
    structures: list[optree.PyTreeSpec] = []

    def flat(*leaves: Tensor) -> list[Any]:
        with plain_paths():
            result = function(*optree.tree_unflatten(structure, leaves))
        check(result)
        outputs, out_structure = optree.tree_flatten(result)
        for path, leaf in zip(optree.tree_paths(result), outputs, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{caller}: every leaf that `step` returns must be a tensor, got {type(leaf).__name__} at {path}."
                )
        structures.append(out_structure)
        return outputs

    with without_dynamo():
        recording, outputs = record(flat, inputs, Recorder(caller))
    refuse_draws(caller, recording.graph)
    if len(recording.graph.nodes) > MANY_OPERATIONS:
        warnings.warn(
            f"{caller}: the step has {len(recording.graph.nodes)} operations, which take long to compile. A Python "
            f"loop is unrolled: write popart_func.scan or fori_loop inside the step, whose body is compiled once.",
            stacklevel=2,
        )
    return StepGraph(
        graph=recording.graph,
        inputs=inputs,
        outputs=outputs,
        out_structure=structures[0],
        constants=tuple(constant.detach() for constant in recording.constants),
        read=tuple((tensor.detach(), value) for tensor, value in recording.known.read.values()),
        wants_gradient=any(constant.requires_grad for constant in recording.constants),
    )


def record(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[TensorSpec], recording: Recorder
) -> tuple[Recorder, tuple[TensorSpec, ...]]:
    """Records a function of flat tensors, and cleans its graph: no op works in place, none is there twice or unused.

    Returns:
        A recorder that has the graph, its constants, and what was read; and the specs of the results.

    Raises:
        TraceError: as `trace_step`.
    """
    caller = recording.caller
    arguments = [recording.input(spec) for spec in inputs]
    try:
        with recording:
            outputs = function(*arguments)
    except RuntimeError as error:
        explanation = _explained(caller, error)
        if explanation is None:
            raise
        raise explanation from error
    recording.graph.output([recording.traced(output).node for output in outputs])
    specs = tuple(TensorSpec.of(output) for output in outputs)
    if not without_mutations(recording.graph):
        recording = _functionalized(recording, inputs)
    merge_equal(recording.graph)
    join_loops(recording.graph)
    merge_equal(recording.graph)
    drop_unused(recording.graph)
    recording.forget()
    return recording, specs


def _functionalized(recording: Recorder, inputs: Sequence[TensorSpec]) -> Recorder:
    """The same graph without in-place ops, recorded again under `functionalize`.

    In one pass together with the transforms of `torch.func`, a custom autograd.Function would break.
    """
    again = Recorder(recording.caller, keeps_ops=recording.keeps_ops, outer=recording.outer)
    again.known.read = recording.known.read
    arguments = [again.input(spec) for spec in inputs] + [again.constant(tensor) for tensor in recording.constants]
    with again:
        replay = functools.partial(_replay, again, recording.graph)
        outputs = functionalize(replay, remove="mutations")(*arguments)
    again.graph.output([again.traced(output).node for output in outputs])
    lines = {origin(node).name: node.meta.get("line") for node in recording.graph.nodes if is_mutable(node)}
    for node in again.graph.nodes:
        if is_mutable(node):  # it writes to an input or a constant
            node.meta["line"] = lines.get(origin(node).name, node.meta.get("line"))
    return again


def _replay(recording: Recorder, graph: fx.Graph, *inputs: Tensor) -> list[Tensor]:
    """Calls the ops of a graph, each under the line that it was recorded with."""

    def call(node: fx.Node, values: Values) -> Any:
        recording.line = node.meta.get("line")
        args, kwargs = substitute((node.args, node.kwargs), values)
        if schema(node.target) is None:
            target: Any = node.target
            return outside_functionalize(lambda *inner: recording.call(target, inner, _specs(node)), args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with without_autocast():
        return walk(graph, inputs, call)


def _specs(node: fx.Node) -> list[TensorSpec]:
    return [TensorSpec.of(part) for part in node.meta["val"]]


_READS = ("data-dependent", ".item()", ".numpy()", ".tolist()", "its data is not allocated")
"""Parts of PyTorch's messages when it is asked for values that it does not have."""


def _explained(caller: str, error: RuntimeError) -> TraceError | None:
    """The error that says what PyTorch's means for a step, with the user's line; None for one of the user's own."""
    line = error_line(error)
    if "'lengths' argument should be" in str(error):
        return TraceError(
            f"{caller}: packed sequences can't be traced, in {describe_line(line)}: their layout depends on the "
            f"lengths. Run the layer on padded sequences, and mask what lies behind their ends."
        )
    if "dynamic shape" in str(error):
        return depends_on_values(caller, line)
    if any(sign in str(error) for sign in _READS):
        return reads_values(caller, line)
    return None
