"""Traces the bodies of loops, once and outside of all transforms; tensors that a body closes over become inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from popart_func._torch import (
    DisableTorchFunction,
    apart_from_transforms,
    function_modes,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_transforming,
    through_hooks,
)
from popart_func.engines.stop_gradients import STOP_GRADIENT, StopGradient, StopGradientMarks
from popart_func.engines.tracing.ambient import without_autocast
from popart_func.engines.tracing.draws import refuse_draws
from popart_func.engines.tracing.loop_nodes import Body
from popart_func.engines.tracing.mutations import is_mutable
from popart_func.engines.tracing.recorder import Recorder, recorder_here
from popart_func.engines.tracing.shapes import TensorSpec, map_tensors
from popart_func.engines.tracing.source_lines import TraceError, describe_line
from popart_func.engines.tracing.traced import Traced
from popart_func.engines.tracing.tracer import record
from popart_func.engines.tracing.walk import Values, op_name, substitute, walk
from popart_func.random.keyed import count_draws

__all__ = ["check_carry_stays", "closed", "in_dtype_of", "replay", "trace_bodies", "trace_body", "with_same_inputs"]


def trace_body(
    caller: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[TensorSpec], *, keeps_ops: bool = True
) -> tuple[Body, list[Tensor]]:
    """Traces a function of flat tensors that closes over nothing of the user's, as the rules of loops make them.

    Args:
        caller: the function that the user has called, for errors.
        function: of flat tensors.
        inputs: their specs.
        keeps_ops: whether ops stay as they are, for PyTorch to differentiate; else they are taken apart, for an engine.

    Returns:
        The body, and the constants that it needs as further inputs.
    """
    outer = recorder_here()
    recording = Recorder(caller, keeps_ops=keeps_ops, outer=outer)
    with apart_from_transforms(), torch.inference_mode(False), torch.enable_grad():
        recording, outputs = record(function, inputs, recording)
    change = next(filter(is_mutable, recording.graph.nodes), None)
    if change is not None:
        raise TraceError(
            f"{caller}: the body changes an argument, or a tensor that it closes over, in place in "
            f"{describe_line(change.meta.get('line'))}: it must be pure. Write `x = x + 1` instead of `x += 1`."
        )
    refuse_draws(caller, recording.graph)
    if outer is not None:
        outer.known.read.update(recording.known.read)
    specs = (*inputs, *map(TensorSpec.of, recording.constants))
    return Body(recording.graph, specs, outputs), recording.constants


def closed(
    caller: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[TensorSpec]
) -> tuple[Body, list[Tensor]]:
    """Traces a user's function: the tensors that it closes over become inputs behind its own, and are returned.

    They may be wrapped by transforms of `torch.func` around the loop, which the trace does not see.
    """

    def lifted(*arguments: Tensor) -> Sequence[Tensor]:
        recording = recorder_here()
        assert recording is not None, "a body is recorded"
        is_marked = any(isinstance(mode, StopGradientMarks) for mode in function_modes())
        marks = contextlib.nullcontext() if is_marked else StopGradientMarks(caller, kept=False)
        lifts = _Lifts(recording)
        with through_hooks(lifts.lift, lifts.call), lifts, marks:
            before = count_draws()
            results = function(*arguments)
            if count_draws() != before:
                raise TraceError(
                    f"{caller}: the body draws from a key that `keyed` was given outside of the loop: each round would "
                    f"draw the same numbers. Enter popart_func.random.keyed within the body, with a key that the carry "
                    f"or the xs hold."
                )
            return [lifts.lift(result) for result in results]

    return trace_body(caller, lifted, inputs)


def trace_bodies(
    caller: str, functions: Sequence[Callable[..., Sequence[Tensor]]], inputs: Sequence[TensorSpec], **options: bool
) -> tuple[list[Body], list[Tensor]]:
    """Traces functions that take the same inputs; the constants of all of them are further inputs of each."""
    traced = [trace_body(caller, function, inputs, **options) for function in functions]
    return with_same_inputs(traced, len(inputs))


def with_same_inputs(traced: Sequence[tuple[Body, list[Tensor]]], inputs: int) -> tuple[list[Body], list[Tensor]]:
    """Bodies that have the same first inputs, each with the constants of all of them as further inputs."""
    found = {id(constant): constant for _, constants in traced for constant in constants}
    bodies = []
    for body, constants in traced:
        nodes = dict(zip(map(id, constants), body.placeholders[inputs:], strict=True))
        last = body.placeholders[inputs - 1] if inputs else None
        order: list[Tensor] = []
        for number, constant in found.items():
            node = nodes.get(number)
            with body.graph.inserting_after(last) if last is not None else body.graph.inserting_before():
                if node is None:
                    node = body.graph.placeholder(f"constant_{len(order)}")
                    with apart_from_transforms():
                        one = torch.empty((), dtype=constant.dtype, device=constant.device)
                        node.meta["val"] = one.expand(constant.shape)
            if last is not None:
                last.append(node)
            order.append(constant)
            last = node
        bodies.append(Body(body.graph, (*body.inputs[:inputs], *map(TensorSpec.of, order)), body.outputs))
    return bodies, list(found.values())


def check_carry_stays(caller: str, body: Body, carries: int) -> None:
    """Raises if a body that the library has made gives a carry of other shapes or dtypes than it takes."""
    for before, after in zip(body.inputs[:carries], body.outputs, strict=False):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise TypeError(
                f"{caller}: a transform of the loop makes {after.dtype} {tuple(after.shape)} of a carry's "
                f"{before.dtype} {tuple(before.shape)}. Write the numbers in the loop as tensors of the carry's dtype."
            )


def in_dtype_of(value: Tensor, tangent: Any) -> Any:
    """A tangent in the dtype of its value: PyTorch gives that of a 0-d tensor times a Python number in float64."""
    return tangent if tangent is None or tangent.dtype == value.dtype else tangent.to(value.dtype)


def replay(body: Body, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Calls the ops of a body: within transforms of `torch.func` these transform it, within a trace it is recorded."""
    recording = recorder_here()

    def call(node: fx.Node, values: Values) -> Any:
        if recording is not None:
            recording.line = node.meta.get("line")
        args, kwargs = substitute((node.args, node.kwargs), values)
        if op_name(node) == STOP_GRADIENT:
            return StopGradient.apply(*args)
        if node.target is torch.ops.aten.view.default:  # the strides may be others than where it was recorded
            return args[0].reshape(args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with without_autocast():
            return walk(body.graph, tensors, call)
    finally:
        if recording is not None:
            recording.line = None


class _Lifts(TorchFunctionMode):
    """Replaces the tensors that a body closes over by its inputs, before any transform in the body sees them."""

    def __init__(self, recording: Recorder) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_tensors(self.lift, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def lift(self, tensor: Tensor) -> Tensor:
        """The tensor itself if the body computes it, else the input that it becomes."""
        if recorder_here() is not self._recording:
            return tensor
        with DisableTorchFunction():  # this mode, too
            inside = tensor
            while is_functorch_wrapped_tensor(inside):
                inside = get_unwrapped(inside)
            if isinstance(inside, Traced) and inside.node is not None and inside.node.graph is self._recording.graph:
                return tensor
            if is_functorch_wrapped_tensor(tensor):
                return self._recording.constant(tensor)
            return self._recording.traced(tensor)

    def call(self, function: Any, apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Records the call of a user's `torch.autograd.Function` as one node, so that its own backward is used."""
        if (
            recorder_here() is not self._recording
            or is_transforming()
            or function.__module__.startswith(_OWN)
            or kwargs
        ):
            return apply(*args, **kwargs)
        tensors = [self._recording.traced(one) for one in args if isinstance(one, Tensor)]
        target = _CustomCall(function, [None if isinstance(one, Tensor) else (one,) for one in args])
        body, _ = trace_body(self._recording.caller, target, [TensorSpec.of(one) for one in tensors])
        results = self._recording.call(target, tensors, body.outputs)
        return results[0] if target.is_single else tuple(results)


_OWN = "popart_func.engines"


class _CustomCall:
    """Calls a custom `torch.autograd.Function` with tensors; its other arguments are known."""

    def __init__(self, function: Any, given: list[tuple[Any] | None]) -> None:
        self.name = self.__name__ = function.__name__
        self._function, self._given = function, given
        self.is_single = False

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        left = iter(tensors)
        result = self._function.apply(*(next(left) if one is None else one[0] for one in self._given))
        self.is_single = isinstance(result, Tensor)
        return [result] if self.is_single else list(result)
