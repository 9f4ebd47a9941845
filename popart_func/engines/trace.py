"""A pure function on pytrees of tensors as a graph of core ATen ops on static shapes: the front end of the engines.

This is the one place that touches PyTorch's tracer (`make_fx`, `functionalize`, the core decompositions), which is
semi-private: a test fails loudly when it moves.
"""

from __future__ import annotations

import contextlib
import linecache
import sysconfig
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import optree
import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from popart_func.engines.zero_d_indices import ZeroDIndices

__all__ = ["StepGraph", "TensorSpec", "TraceError", "describe", "op_name", "trace"]

UNKNOWN = "a line that is not known"
_LIBRARIES = (sysconfig.get_paths()["stdlib"], str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class TraceError(TypeError):
    """A function can't be a graph: what it does depends on values. The message says where, and what to do instead."""


class TensorSpec(NamedTuple):
    """The shape, dtype and device of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


class StepGraph(NamedTuple):
    """A traced function: flat tensors in, flat tensors out. Printed, it can be read.

    Attributes:
        module: the graph, ``module(*inputs, *constants) -> list of outputs``; core ATen ops, no two of them the same.
        inputs: what goes in, in the order of optree's leaves of the arguments.
        outputs: what comes out.
        out_structure: the result's structure.
        constants: tensors that the function closed over. What is changed in them in place is seen, what is put in
            their stead is not.
        wants_gradient: whether one of them requires a gradient, which no engine but eager carries.
        compiled: what engines have made of the graph, so that it lives as long as the function does.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    out_structure: optree.PyTreeSpec
    constants: tuple[Tensor, ...]
    wants_gradient: bool
    compiled: dict[Any, Any]

    @property
    def operations(self) -> Counter[str]:
        """How many there are of each op."""
        return Counter(op_name(node) for node in self.module.graph.nodes if node.op == "call_function")

    def __str__(self) -> str:
        lines = []
        for node in self.module.graph.nodes:
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
    # What a function means also depends on the default dtype and on autocast.
    key = (structure, tuple(inputs), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    with _lock:
        graphs = _graphs_of(function)
        if key not in graphs:
            graphs[key] = _trace(function, structure, tuple(inputs), check or (lambda result: None))
        return graphs[key]


def _graphs_of(function: Callable[..., Any]) -> dict[Any, StepGraph]:
    """The graphs of this very function, as long as it lives; not of one that is equal to it."""
    number = id(function)
    reference, graphs = _graphs.get(number, (None, {}))
    if reference is None or reference() is not function:
        graphs = {}
        with contextlib.suppress(TypeError):  # where it can't be referred to weakly, it is traced anew each time
            _graphs[number] = weakref.ref(function, partial(_forget, _graphs, number)), graphs
    return graphs


def _forget(graphs: dict[int, Any], number: int, reference: object) -> None:
    graphs.pop(number, None)


def describe(node: fx.Node) -> str:
    """The line of the user's code that a node comes from: ``file:line: `source` ``."""
    return node.stack_trace or UNKNOWN


def _trace(
    function: Callable[..., Any],
    structure: optree.PyTreeSpec,
    inputs: tuple[TensorSpec, ...],
    check: Callable[[Any], Any],
) -> StepGraph:
    out_structure: list[optree.PyTreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        with _NoteLines(), ZeroDIndices():
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
    # Two passes: in one, an autograd.Function breaks. The first removes torch.func's transforms, the second mutation.
    try:
        with fx_traceback.preserve_node_meta():
            first = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    except RuntimeError as error:
        explanation = _explained(error)
        if explanation is None:
            raise
        raise explanation from error
    for node in first.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise TraceError(
                f"step: random numbers can't be drawn inside, as {op_name(node)!r} does in {describe(node)}: draw them "
                f"before and pass them in xs."
            )
    # What the function closes over becomes an input before the second pass, which removes mutations of inputs only.
    constants = _lift_constants(first)
    first.recompile()
    fakes += [mode.from_tensor(constant.detach()) for constant in constants]
    with fx_traceback.preserve_node_meta():  # the second pass's nodes come from the same lines as the first's
        module = make_fx(
            functionalize(fx.Interpreter(first).run, remove="mutations"),
            decomposition_table=_decompositions(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*fakes)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(placeholders[len(inputs) :]):
        node.name = node.target = f"constant_{number}"
    constants += _lift_constants(module, start=len(constants))
    _merge_equal(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return StepGraph(
        module=module,
        inputs=inputs,
        outputs=tuple(TensorSpec.of(node.meta["val"]) for node in output.args[0]),
        out_structure=out_structure[0],
        constants=tuple(constant.detach() for constant in constants),
        wants_gradient=any(constant.requires_grad for constant in constants),
        compiled={},
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """The core decompositions, and some that the core keeps whole for speed that no engine here needs."""
    aten = torch.ops.aten
    more = [aten.elu, aten.leaky_relu, aten.linalg_vector_norm, aten.native_layer_norm, aten.native_group_norm]
    return {**core_aten_decompositions(), **get_decompositions(more)}


def _lift_constants(module: fx.GraphModule, start: int = 0) -> tuple[Tensor, ...]:
    """Turns the tensors that the graph holds into further inputs."""
    constants: list[Tensor] = []
    last_input = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        value = getattr(module, node.target)
        with module.graph.inserting_after(*last_input) if last_input else module.graph.inserting_before():
            placeholder = module.graph.placeholder(f"constant_{start + len(constants)}")
        placeholder.meta["val"] = value
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        last_input = [placeholder]
        constants.append(value)
    return tuple(constants)


def _merge_equal(graph: fx.Graph) -> None:
    """Computes what is the same only once."""
    seen: dict[Hashable, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        key = node.target, _key(node.args), _key(node.kwargs)
        if seen.setdefault(key, node) is not node:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)


def _key(argument: Any) -> Hashable:
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in argument.items())
    return type(argument), repr(argument)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0


class _NoteLines(TorchDispatchMode):
    """Notes for each op which line of the user's code called it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fx_traceback.set_stack_trace([_user_line(frame for frame, _ in traceback.walk_stack(None))])
        return func(*args, **(kwargs or {}))


def _explained(error: RuntimeError) -> TraceError | None:
    """What PyTorch's error means for a step, at the user's line; None where it is the user's own."""
    text = str(error)
    where = _user_line(reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)]))
    if isinstance(error, DynamicOutputShapeException) or "dynamic shape" in text:
        return TraceError(
            f"step: a shape depends on values in {where}: instead of selecting use torch.where, or multiply by a mask."
        )
    if isinstance(error, DataDependentOutputException) or any(
        sign in text for sign in ("value out of a tracing tensor", "data-dependent", ".item()", "local_scalar_dense")
    ):
        return TraceError(
            f"step: the value of a tensor is read in {where}: a step is traced once for all values. Instead of a "
            f"branch use torch.where; instead of .item(), int() or float() keep the 0-d tensor."
        )
    return None


def _user_line(frames: Iterable[FrameType]) -> str:
    """The innermost line that belongs to neither Python nor a library, this one included."""
    for frame in frames:
        name = frame.f_code.co_filename
        if not name.startswith(("<", *_LIBRARIES)) and "site-packages" not in name:
            return f"{name}:{frame.f_lineno}: `{linecache.getline(name, frame.f_lineno).strip()}`"
    return UNKNOWN


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
