"""Records the ATen ops that a function calls, below autograd and the transforms of `torch.func`, without values.

A tensor that is being traced has a shape, strides, a dtype and a device, but no values. `shapes` finds the shapes that
ops return. The recorder refuses code that reads values, draws random numbers, or has shapes that depend on values, and
names the line of the user's code.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from popart_func._torch import (
    DisableTorchDispatch,
    DisableTorchFunction,
    TorchDispatchMode,
    apart_from_transforms,
    dispatch_modes,
    is_functorch_wrapped_tensor,
    is_make_fx_tracing,
    schema,
    zero_tensor_keys,
)
from popart_func.engines.tracing.decompositions import taken_apart, taken_apart_in_body
from popart_func.engines.tracing.draws import draw_behind, draws_numbers, is_draw
from popart_func.engines.tracing.known_values import KnownValues, has_mask, mask_places, written_by
from popart_func.engines.tracing.mutations import functional_variant
from popart_func.engines.tracing.shapes import TensorSpec, blank, blank_of, infer, map_tensors
from popart_func.engines.tracing.source_lines import (
    Line,
    TraceError,
    depends_on_values,
    describe_line,
    reads_values,
    user_line,
)
from popart_func.engines.tracing.traced import KEEPS_NOTHING, Traced, node_of, stand_in_of

__all__ = ["Recorder", "is_recording", "recorder_here"]

_aten = torch.ops.aten
# Ops recorded as another op. PyTorch puts the first two off and sets a bit of the tensor, which a traced tensor lacks.
_RECORDED_AS = {
    _aten._conj.default: _aten._conj_physical.default,
    _aten._neg_view.default: _aten.neg.default,
    _aten.lift_fresh.default: _aten.clone.default,  # a tensor that was made from Python numbers
}
# Ops that list positions, which are few and known.
_POSITIONS = {_aten.tril_indices, _aten.triu_indices}
# Ops that write to places: one value where a mask is true, or values whose number has to be known.
_WRITES = {_aten.index_put, _aten.index_put_, _aten._index_put_impl_}
# Ops that take tensors of two devices.
_MIXES = {"_to_copy", "copy", "copy_", "index", "index_put", "index_put_"}


class Recorder(TorchDispatchMode):
    """Records ops in `graph` while it is entered.

    Attributes:
        keeps_ops: whether ops are recorded as they are, rather than taken apart: a loop's body is differentiated and
            mapped later, by PyTorch's own rules for its ops.
        outer: the recorder around this one, of the function that calls the loop whose body is recorded here.
        graph: the ops so far; each node has its result in ``meta["val"]`` and its line in ``meta["line"]``.
        constants: tensors that the function closes over, which are placeholders behind the inputs.
        known: the values that do not depend on inputs.
        line: the line of the ops to come; None where that is found on the stack.
    """

    def __init__(self, caller: str, *, keeps_ops: bool = False, outer: Recorder | None = None) -> None:
        super().__init__()
        self.caller = caller  # the user's function, for errors
        self.keeps_ops, self.outer = keeps_ops, outer
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.known = KnownValues()
        self.line: Line | None = None
        self._placeholders: list[fx.Node] = []
        self._traced: dict[int, Traced] = {}  # of constants, by their ids

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else TorchDynamo is imported

    def input(self, spec: TensorSpec) -> Traced:
        """Adds the next input."""
        return self._placeholder(f"arg{len(self._placeholders)}_1", blank_of(spec), spec.device)

    def constant(self, tensor: Tensor, *, is_own: bool = False) -> Traced:
        """The input that stands for a tensor which the step does not compute.

        ``is_own``: whether the recorder has made the tensor, so that nobody else can change its values.
        """
        if id(tensor) not in self._traced:
            name = f"constant_{len(self.constants)}"
            if isinstance(tensor, Traced) or is_functorch_wrapped_tensor(tensor):  # of the trace around a loop's body
                stand_in, known = blank_of(TensorSpec.of(tensor)), None
            else:
                with apart_from_transforms():
                    stand_in, known = blank(tensor.shape, tensor.stride(), tensor.dtype), tensor
                self.known.add_constant(tensor, is_own=is_own)
            self._traced[id(tensor)] = self._placeholder(name, stand_in, tensor.device, known=known)
            self.constants.append(tensor)  # which keeps it alive, and its id its own
        return self._traced[id(tensor)]

    def _placeholder(self, name: str, stand_in: Tensor, device: torch.device, known: Tensor | None = None) -> Traced:
        before = self._placeholders[-1:]
        with self.graph.inserting_after(*before) if before else self.graph.inserting_before():
            node = self.graph.placeholder(name)
        self._placeholders.append(node)
        traced = Traced(stand_in, device, node, known)
        node.meta["val"] = traced
        return traced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_make_fx_tracing():
            raise TraceError(
                f"{self.caller}: make_fx, and so torch.func.linearize, can't be traced, in {self._described()}: use "
                f"torch.func.jvp."
            )
        decompose = taken_apart_in_body(func) if self.keeps_ops else taken_apart(func)
        if decompose is not None:
            with self:
                result = decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs)
        if torch.Tag.dynamic_output_shape in func.tags and (func is not _aten.index.Tensor or has_mask(args[1])):
            return self._of_known_shape(func, args, kwargs)
        if func.overloadpacket in _POSITIONS:
            return self._of_known_shape(func, args, kwargs)
        if func.overloadpacket in _WRITES and has_mask(args[1]) and args[2].numel() != 1:
            return self._with_places(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags and functional_variant(func) is not None:
            return self._view_in_place(func, args, kwargs)
        if func is _aten._efficientzerotensor.default:  # the first tangent of a forward-mode derivative
            with self:
                zeros = _aten.zeros.default(*args, **kwargs)
            return Traced(zeros.stand_in, zeros.device, zeros.node, keys=zero_tensor_keys())
        if func in _RECORDED_AS and isinstance(args[0], Tensor):  # and not a number
            func = _RECORDED_AS[func]
        return self._record(func, args, kwargs)

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an op tells of values that are known; any other read is refused."""
        known = self._decided(func, args, kwargs)
        if known is not None:
            return func(*known[0], **known[1])
        nodes: list[fx.Node] = []
        map_tensors(lambda tensor: nodes.append(self.traced(tensor).node), (args, kwargs))
        draw = next(filter(None, map(draw_behind, nodes)), None)
        raise reads_values(self.caller, self._line()) if draw is None else draws_numbers(self.caller, draw)

    def _decided(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any | None:
        """The arguments of an op by their values, which decide what the graph will be; None if one is not known."""
        arguments = map_tensors(self.traced, (tuple(args), kwargs))
        known = self.known.arguments(func, torch.device("cpu"), arguments)
        self.known.decide_by(known)
        return known

    def _of_known_shape(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an op whose shape depends on values, where those are known."""
        known = self._decided(func, args, kwargs)
        if known is not None:
            copy = lambda tensor: self._record(_aten.clone.default, (self.constant(tensor, is_own=True),), {})  # noqa: E731
            return map_tensors(copy, func(*known[0], **known[1]))
        if func is _aten.index.Tensor:
            return self._with_places(func, args, kwargs)
        if func is _aten.masked_select.default:
            with self:
                x, mask = torch.broadcast_tensors(*args)
            return self._with_places(_aten.index.Tensor, (x, [mask]), {})
        raise depends_on_values(self.caller, self._line())

    def _with_places(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls an op that indexes with the places where its masks are true, which have to be known."""
        places: list[Tensor | None] = []
        for index in args[1]:
            if not has_mask([index]):
                places.append(index)
                continue
            known = self._decided(_aten.nonzero.default, (index,), {})
            if known is None or not index.ndim:
                raise depends_on_values(self.caller, self._line())
            places += [self.constant(place, is_own=True) for place in mask_places(known[0][0])]
        with self:
            return func(args[0], places, *args[2:], **kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        map_tensors(tensors.append, (args, kwargs))
        device = self._device(func, tensors, kwargs)
        arguments = map_tensors(self.traced, (tuple(args), kwargs))
        known = self.known.arguments(func, device, arguments)
        values = None if known is None else self.known.compute(func, known)
        plain_args, plain_kwargs = map_tensors(stand_in_of, arguments)
        if kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            plain_kwargs["pin_memory"] = False
        node_args, node_kwargs = map_tensors(node_of, arguments)
        node = self.graph.create_node("call_function", func, node_args, node_kwargs, _name(func))
        line = node.meta["line"] = self._line()
        variant = None if is_draw(node) else functional_variant(func)  # that of `bernoulli_` lacks a default
        if variant is not None and taken_apart(variant) is None:
            made = infer(variant, plain_args, plain_kwargs)
            if isinstance(made, Tensor) and TensorSpec.of(made) == TensorSpec.of(plain_args[0]):
                node.meta["functional"] = variant
        if schema(func).is_mutable and values is None:
            self.known.spoil(list(map(stand_in_of, written_by(func, *arguments))))
        try:
            results = infer(func, plain_args, plain_kwargs)
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and "no fake impl" not in str(error):  # a custom op's
                raise
            if is_draw(node):
                raise draws_numbers(self.caller, node) from error
            raise TraceError(
                f"{self.caller}: PyTorch can't tell the shape that {func.name()!r} returns without computing it, in "
                f"{self._described()}: register a fake implementation with torch.library.register_fake."
            ) from error
        changed = {id(self.traced(tensor).stand_in): tensor for tensor in tensors}
        if isinstance(results, Tensor):
            return self._result(results, node, line, device, changed, values)
        if not isinstance(results, list | tuple):
            self.graph.erase_node(node)  # it asked about a shape
            return results
        parts = [
            self._result(part, self.graph.call_function(operator.getitem, (node, index)), line, device, changed, value)
            for index, (part, value) in enumerate(zip(results, values or [None] * len(results), strict=True))
        ]
        node.meta["val"] = parts
        return type(results)(parts)

    def _result(
        self, made: Any, node: fx.Node, line: Line | None, device: torch.device, changed: dict[int, Tensor], known: Any
    ) -> Any:
        """A result of an op: a new tensor; or an argument, by its stand-in's id, which the op has changed in place."""
        if not isinstance(made, Tensor):
            return made
        argument = changed.get(id(made))
        traced = Traced(made, device, known=known) if argument is None else self.traced(argument)
        traced.node, node.meta["val"], node.meta["line"] = node, traced, line
        return traced if argument is None else argument

    def traced(self, tensor: Tensor) -> Traced:
        """The tensor itself if it is traced here, else the input that it becomes."""
        if not isinstance(tensor, Traced) and not is_functorch_wrapped_tensor(tensor) and tensor._is_zerotensor():
            # The tangent of what has none, which has no memory: PyTorch makes it where no mode sees that.
            zeros = self._record(
                _aten.zeros.default, (list(tensor.shape),), {"dtype": tensor.dtype, "device": tensor.device}
            )
            assert isinstance(zeros, Traced), "an op on traced tensors gives one"
            return zeros
        if not isinstance(tensor, Traced) or self._is_around(tensor):
            return self.constant(tensor)
        if tensor.node is None or tensor.node.graph is not self.graph:
            raise RuntimeError(
                f"{self.caller}: a tensor of an earlier trace is used in {self._described()}: {KEEPS_NOTHING}."
            )
        return tensor

    def _is_around(self, tensor: Traced) -> bool:
        """Whether a tensor belongs to the trace around this one, which is that of a loop's body."""
        outer = self.outer
        while outer is not None and tensor.node is not None:
            if tensor.node.graph is outer.graph:
                return True
            outer = outer.outer
        return False

    def call(self, target: Callable[..., Any], args: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
        """Records a call of something that is no op, such as a loop; its results have these specs."""
        line = self._line()
        with DisableTorchFunction():  # a mode would take the results' stand-ins for tensors of the user's
            nodes = tuple(self.traced(one).node for one in args)
            node = self.graph.create_node("call_function", target, nodes, {}, getattr(target, "name", "call"))
            results = []
            for index, spec in enumerate(specs):
                part = self.graph.call_function(operator.getitem, (node, index))
                traced = Traced(blank_of(spec), spec.device, part)
                part.meta["val"], part.meta["line"] = traced, line
                results.append(traced)
        node.meta["val"], node.meta["line"] = results, line
        return list(results)

    def forget(self) -> None:
        """Drops what only recording needs, so that a graph does not keep stand-ins alive."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            for traced in value if isinstance(value, list | tuple) else [value]:
                if isinstance(traced, Traced):
                    traced.node = traced.stand_in = traced.known = None

    def _view_in_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Records ``t_`` and the like as `t`: the tensor then stands for the view, and nothing is written."""
        tensor: Tensor = args[0]
        before = self.traced(tensor)
        with self:
            view = functional_variant(func)(*args, **kwargs)
        kept = Traced(before.stand_in, before.device)
        for node in self.graph.nodes:  # nodes so far keep the shape that it had
            if "val" in node.meta:
                node.meta["val"] = map_tensors(lambda other: kept if other is before else other, node.meta["val"])
        before.node, before.stand_in, before.known = view.node, view.stand_in, view.known
        with DisableTorchDispatch():
            func(before, *args[1:], **kwargs)
        return tensor

    def _device(self, func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> torch.device:
        """The device of an op's results."""
        if kwargs.get("device") is not None:
            device: torch.device = torch.device(kwargs["device"])
            return device if device.type == "cpu" or device.index is not None else torch.empty(0, device=device).device
        devices = list(dict.fromkeys(tensor.device for tensor in tensors if tensor.ndim))
        if len(devices) > 1 and func.overloadpacket.__name__ not in _MIXES:
            raise RuntimeError(
                f"{self.caller}: tensors on {devices[0]} and on {devices[1]} meet in {self._described()}."
            )
        return (devices or [tensor.device for tensor in tensors] or [torch.device("cpu")])[0]

    def _line(self) -> Line | None:
        return self.line or user_line(sys._getframe(1))

    def _described(self) -> str:
        return describe_line(self._line())


def is_recording() -> bool:
    """Whether a step is being traced in this thread."""
    return recorder_here() is not None


def recorder_here() -> Recorder | None:
    """The innermost recorder that is entered in this thread."""
    return next((mode for mode in reversed(dispatch_modes()) if isinstance(mode, Recorder)), None)


def _name(func: Any) -> str:
    name: str = func.overloadpacket.__name__
    if name.startswith("__"):
        return name[2:-2]
    return name[:-1] if name.endswith("_") else name
