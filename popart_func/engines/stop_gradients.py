"""Marks in a graph where a function stops gradients, so that JAX, or a loop, can differentiate the graph.

In a trace, `.detach()`, `torch.no_grad` and `torch.autograd.grad` without ``create_graph`` look like the detaching that
autograd itself does. Within `StopGradientMarks` they call the op ``popart_func::stop_gradient``, which is recorded.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from popart_func._torch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    set_grad_enabled,
    storage_id,
    torch_pytree,
)
from popart_func.engines.lane_scan import UnsupportedError
from popart_func.engines.tracing.recorder import recorder_here

__all__ = ["STOP_GRADIENT", "StopGradient", "StopGradientMarks", "keeps_marks"]

STOP_GRADIENT = "popart_func::stop_gradient"

_library = torch.library.Library("popart_func", "FRAGMENT")
_library.define("stop_gradient(Tensor x) -> Tensor")
_library.impl("stop_gradient", lambda x: x.clone(), "CompositeExplicitAutograd")
_library.impl("stop_gradient", lambda x: torch.empty_like(x), "Meta")


class _InThread(threading.local):
    kept = False


_in_thread = _InThread()


def keeps_marks() -> bool:
    """Whether the graph that is traced here will be differentiated, so that it keeps the marks."""
    recorder = recorder_here()
    return _in_thread.kept or (recorder is not None and recorder.keeps_ops)


class StopGradient(torch.autograd.Function):
    """The identity with derivative 0, for every transform of `torch.func`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """A copy, or the tensor itself where no mark is kept."""
        return torch.ops.popart_func.stop_gradient(x) if keeps_marks() else torch.ops.aten.alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps nothing."""
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        """No gradient."""
        return torch.zeros_like(cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        """No tangent."""
        return torch.zeros_like(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any) -> Any:
        """In all lanes alike."""
        return StopGradient.apply(x), in_dims[0]


class StopGradientMarks(TorchFunctionMode):
    """Marks what `.detach()` and `torch.autograd.grad` return, and everything that is computed within `torch.no_grad`.

    ``kept``: whether a graph that is traced here keeps the marks, for JAX; else only the bodies of loops have them,
    while PyTorch differentiates those.

    A gradient with ``create_graph`` is not marked. A mark copies its tensor: a write to it, which in PyTorch would
    reach the tensor that it was detached from, is refused.
    """

    def __init__(self, caller: str, *, kept: bool) -> None:
        super().__init__()
        self._caller, self._kept = caller, kept
        self._no_grad = False
        # Tensors by their memory, which they keep alive: marks of other tensors, and tensors made within no_grad.
        self._shared: dict[Any, Tensor] = {}
        self._made: dict[Any, Tensor] = {}

    def __enter__(self) -> Any:
        self._before, _in_thread.kept = _in_thread.kept, _in_thread.kept or self._kept
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _in_thread.kept = self._before
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.detach, torch.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
            return _noted(_marked(args[0]), self._shared) if _is_real(args[0]) else args[0]
        if func in (Tensor.detach_, torch.detach_, Tensor.data.__set__):  # type: ignore[attr-defined]
            raise UnsupportedError(f"{self._caller}: `.detach_()` and `.data = ` can't be traced; use `.detach()`.")
        written = _written(func, args, kwargs)
        if written is not None:
            self._check_written(func.__name__, written)
        result = func(*args, **kwargs)
        if func is set_grad_enabled:
            self._no_grad = not args[0]
        elif func is torch.autograd.grad and not kwargs.get("create_graph"):
            return tuple(map(_marked_if_real, result))
        elif self._stops and written is not None:
            written.copy_(_marked(written))
        elif self._stops:
            owners = {_memory(leaf) for leaf in torch_pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            return torch_pytree.tree_map(lambda value: self._without_gradient(value, owners), result)
        return result

    @property
    def _stops(self) -> bool:
        return self._no_grad or torch.is_inference_mode_enabled()

    def _check_written(self, name: str, written: Tensor) -> None:
        if _memory(written) in self._shared:
            raise UnsupportedError(
                f"{self._caller}: `{name}` writes to a detached tensor, and in PyTorch through it to the one that it "
                f"was detached from, which can't be traced: clone it first."
            )
        if self._stops and _is_real(written) and _memory(written) not in self._made:
            raise UnsupportedError(
                f"{self._caller}: `{name}` within torch.no_grad writes to a tensor from outside of it, whose gradient "
                f"can't be traced: make a new tensor."
            )

    def _without_gradient(self, value: Any, owners: set[Any]) -> Any:
        if not _is_real(value) or _memory(value) in self._made:
            return value
        return _noted(_marked(value), self._shared if _memory(value) in owners else self._made)


_IN_PLACE = tuple(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


def _written(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that a function writes to."""
    name = getattr(func, "__name__", "")
    in_place = name in ("__setitem__", *_IN_PLACE) or (name.endswith("_") and not name.endswith("__"))
    in_place = (in_place and name != "requires_grad_") or kwargs.get("inplace", False)
    written = kwargs.get("out", args[0] if args and in_place else None)
    return written if isinstance(written, Tensor) else None


def _memory(tensor: Tensor) -> Any:
    """Equal for tensors that share memory, inside of transforms too."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    tensor = getattr(tensor, "stand_in", tensor)
    return storage_id(tensor)


def _noted(tensor: Tensor, where: dict[Any, Tensor]) -> Tensor:
    where[_memory(tensor)] = tensor
    return tensor


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _marked(value: Tensor) -> Any:
    return StopGradient.apply(value)


def _marked_if_real(value: Any) -> Any:
    return _marked(value) if _is_real(value) else value
