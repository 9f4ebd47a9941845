"""Records the ATen ops that a function calls, below autograd and the transforms of `torch.func`, without values.

A tensor that is being traced has a shape, strides, a dtype and a device, but nothing that could be read. The shapes
that ops return come from `shapes`. What reads values, draws at random, or has shapes that depend on values is refused,
with the line of the user's code.

Dispatch modes, wrapper subclasses and the tags of ops are semi-private: a test fails loudly when they move.
"""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._C import _DisableTorchDispatch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from popart_func.engines.tracing.decompositions import decomposition
from popart_func.engines.tracing.mutations import functional_variant
from popart_func.engines.tracing.shapes import blank, infer, map_tensors
from popart_func.engines.tracing.source_lines import (
    Line,
    TraceError,
    depends_on_values,
    described,
    reads_values,
    user_line,
)

__all__ = ["Recorder", "TensorSpec", "Traced", "is_recording"]

_aten = torch.ops.aten
_ZERO = torch._C.DispatchKeySet(torch._C.DispatchKey.ZeroTensor)
_PROXIES = torch._C._TorchDispatchModeKey.PROXY  # make_fx
_PURE = "a step must be pure, and keep nothing that it has computed"
# What PyTorch puts off: a bit of the tensor says what is still to be done, and a traced tensor has no such bits.
_AT_ONCE = {_aten._conj.default: _aten._conj_physical.default, _aten._neg_view.default: _aten.neg.default}
# Ops whose tensors may lie on two devices.
_MIXES = {"_to_copy", "copy", "copy_", "index", "index_put", "index_put_"}


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


class Traced(Tensor):
    """A value of the function that is being traced.

    Attributes:
        node: what computes it.
        stand_in: of its shape, strides and dtype, on the CPU; see `shapes`.
        known: its value, where that is a constant of which nothing has been changed.
    """

    node: Any
    stand_in: Any
    known: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        stand_in: Tensor,
        device: torch.device,
        node: fx.Node | None = None,
        known: Tensor | None = None,
        keys: Any = None,
    ) -> Traced:
        """Shape, strides and dtype are the stand-in's; ``keys`` are what else PyTorch's dispatcher has to know."""
        traced: Any = Tensor._make_wrapper_subclass(
            cls,
            stand_in.shape,
            strides=stand_in.stride(),
            storage_offset=stand_in.storage_offset(),
            dtype=stand_in.dtype,
            device=device,
            **({} if keys is None else {"_extra_dispatch_keys": keys}),
        )
        traced.node, traced.stand_in, traced.known = node, stand_in, known
        return traced

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"step: {func} was called on a tensor of an earlier trace: {_PURE}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({TensorSpec.of(self)})"


class Recorder(TorchDispatchMode):
    """Records ops in `graph`, while it is entered.

    Attributes:
        graph: what has been recorded; each node has its spec in ``meta["val"]`` and its line in ``meta["line"]``.
        constants: tensors that came from elsewhere, which are placeholders behind the inputs.
        read: of those, what Python code has read: the tensor and its value.
        line: of the ops to come; None where it is the caller's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.read: list[tuple[Tensor, bool | int | float | complex]] = []
        self.line: Line | None = None
        self._placeholders: list[fx.Node] = []
        self._written: list[torch.UntypedStorage] = []
        self._traced: dict[int, Traced] = {}  # of constants, by their ids

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else TorchDynamo is imported

    def input(self, spec: TensorSpec) -> Traced:
        """The next input."""
        return self._placeholder(
            f"arg{len(self._placeholders)}_1", torch.zeros(spec.shape, dtype=spec.dtype, device="cpu"), spec.device
        )

    def constant(self, tensor: Tensor) -> Traced:
        """The input that a tensor from elsewhere becomes."""
        if id(tensor) not in self._traced:
            stand_in = blank(tensor.shape, tensor.stride(), tensor.dtype)
            name = f"constant_{len(self.constants)}"
            self._traced[id(tensor)] = self._placeholder(name, stand_in, tensor.device, known=tensor)
            self.constants.append(tensor)  # and so it lives as long as its id is needed
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
        if torch._C._get_dispatch_mode(_PROXIES) is not None:
            raise TraceError(
                f"step: make_fx, and so torch.func.linearize, can't be followed, in {described(self._line())}: use "
                f"torch.func.jvp."
            )
        decompose = decomposition(func) or (func.decompose if _is_composite(func) else None)
        if decompose is not None:
            with self:
                result = decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(
                f"step: random numbers can't be drawn inside, as {func.overloadpacket.__name__!r} does in "
                f"{described(self._line())}: draw them before and pass them in xs."
            )
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args)
        if torch.Tag.dynamic_output_shape in func.tags and (func is not _aten.index.Tensor or _has_mask(args[1])):
            raise depends_on_values(self._line())
        if torch.Tag.inplace_view in func.tags and functional_variant(func) is not None:
            return self._view_in_place(func, args, kwargs)
        if func is _aten._efficientzerotensor.default:  # what forward-mode derivatives begin with
            with self:
                zeros = _aten.zeros.default(*args, **kwargs)
            return Traced(zeros.stand_in, zeros.device, zeros.node, keys=_ZERO)
        if func is _aten._new_zeros_with_same_feature_meta.default:  # and what those under `torch.vmap` go on with
            tangent, value = args
            with self:
                return value.new_zeros((*tangent.shape[: kwargs.get("self_num_batch_dims", 0)], *value.shape))
        if func is _aten.lift_fresh.default:
            traced = self._record(_aten.clone.default, args, {})
            traced.known = args[0]
            return traced
        if func in _AT_ONCE and isinstance(args[0], Tensor):  # and not a number
            func = _AT_ONCE[func]
        return self._record(func, args, kwargs)

    def _read(self, func: Any, args: Any) -> Any:
        """What can be read: a constant of which nothing has been changed."""
        if func is _aten._local_scalar_dense.default:
            traced = self.traced(args[0])
            storage = traced.stand_in.untyped_storage().data_ptr()
            if traced.known is not None and all(storage != other.data_ptr() for other in self._written):
                value = traced.known.item()
                if id(traced.known) in self._traced:
                    self.read.append((traced.known, value))
                return value
        raise reads_values(self._line())

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        originals: dict[int, Tensor] = {}  # by the ids of their stand-ins

        def stand_in(tensor: Tensor) -> Tensor:
            traced = self.traced(tensor)
            originals[id(traced.stand_in)] = tensor
            return traced.stand_in

        plain_args = map_tensors(stand_in, tuple(args))
        plain_kwargs = {name: map_tensors(stand_in, value) for name, value in kwargs.items()}
        device = self._device(func, list(originals.values()), kwargs)
        if kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            plain_kwargs["pin_memory"] = False
        node = self.graph.create_node(
            "call_function",
            func,
            map_tensors(lambda tensor: self.traced(tensor).node, tuple(args)),
            {name: map_tensors(lambda tensor: self.traced(tensor).node, value) for name, value in kwargs.items()},
            _name(func),
        )
        line = node.meta["line"] = self._line()
        variant = functional_variant(func)
        if variant is not None and not _is_taken_apart(variant):
            made = infer(variant, plain_args, plain_kwargs)
            if isinstance(made, Tensor) and TensorSpec.of(made) == TensorSpec.of(plain_args[0]):
                node.meta["functional"] = variant
        if func._schema.is_mutable:
            self._note_mutation(func, args, kwargs)
        results = infer(func, plain_args, plain_kwargs)

        def wrapped(result: Any, node: fx.Node) -> Any:
            if not isinstance(result, Tensor):
                return result
            original = originals.get(id(result))
            traced = Traced(result, device) if original is None else self.traced(original)
            traced.node, node.meta["val"], node.meta["line"] = node, traced, line
            return traced if original is None else original

        if isinstance(results, Tensor):
            return wrapped(results, node)
        if not isinstance(results, list | tuple):
            self.graph.erase_node(node)  # a question about shapes
            return results
        parts = [
            wrapped(part, self.graph.call_function(operator.getitem, (node, index)))
            for index, part in enumerate(results)
        ]
        node.meta["val"] = parts
        return type(results)(parts)

    def traced(self, tensor: Tensor) -> Traced:
        """The tensor itself, or the input that it becomes."""
        if not isinstance(tensor, Traced):
            return self.constant(tensor)
        if tensor.node is None or tensor.node.graph is not self.graph:
            raise RuntimeError(f"step: a tensor of an earlier trace is used in {described(self._line())}: {_PURE}.")
        return tensor

    def forget(self) -> None:
        """Lets go of all that only recording needs."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            for traced in value if isinstance(value, list | tuple) else [value]:
                if isinstance(traced, Traced):
                    traced.node = traced.stand_in = traced.known = None

    def _note_mutation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        written: list[Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                map_tensors(written.append, args[position] if position < len(args) else kwargs.get(argument.name))
        self._written += [self.traced(tensor).stand_in.untyped_storage() for tensor in written]

    def _view_in_place(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """``t_`` and the like, which leave the elements as they are: `t`, under the old name."""
        tensor: Tensor = args[0]
        before = self.traced(tensor)
        with self:
            view = functional_variant(func)(*args, **kwargs)
        kept = Traced(before.stand_in, before.device)
        for node in self.graph.nodes:  # all that it has been so far keeps its shape
            if "val" in node.meta:
                node.meta["val"] = map_tensors(lambda other: kept if other is before else other, node.meta["val"])
        before.node, before.stand_in = view.node, view.stand_in
        with _DisableTorchDispatch():
            func(before, *args[1:], **kwargs)
        return tensor

    def _device(self, func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> torch.device:
        """Where an op's results lie."""
        if kwargs.get("device") is not None:
            device: torch.device = torch.device(kwargs["device"])
            return device if device.type == "cpu" or device.index is not None else torch.empty(0, device=device).device
        devices = list(dict.fromkeys(tensor.device for tensor in tensors if tensor.ndim))
        if len(devices) > 1 and func.overloadpacket.__name__ not in _MIXES:
            raise RuntimeError(f"step: tensors on {devices[0]} and on {devices[1]} meet in {described(self._line())}.")
        return (devices or [tensor.device for tensor in tensors] or [torch.device("cpu")])[0]

    def _line(self) -> Line | None:
        return self.line or user_line(sys._getframe(1))


def is_recording() -> bool:
    """Whether a step is being traced in this thread."""
    return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())


def _name(func: Any) -> str:
    name: str = func.overloadpacket.__name__
    if name.startswith("__"):
        return name[2:-2]
    return name[:-1] if name.endswith("_") else name


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether autograd takes an op apart, and what is below autograd has to."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if func is _aten.native_batch_norm.default:  # its parts change the statistics
        return False
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _is_taken_apart(func: Any) -> bool:
    return decomposition(func) is not None or _is_composite(func)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
