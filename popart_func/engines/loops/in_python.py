"""Loops that run in Python where no step is traced: autograd and the transforms of `torch.func` see each round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from popart_func._torch import DisableTorchFunction, get_unwrapped, is_functorch_wrapped_tensor, transform_depth
from popart_func.engines.loops.arguments import Outline, check_predicate, check_same, pair
from popart_func.engines.loops.primitive import wants_gradient
from popart_func.engines.loops.while_loop import NO_GRADIENT
from popart_func.engines.tracing.shapes import map_tensors
from popart_func.tree import PyTree

__all__ = ["cond_in_python", "scan_in_python", "while_in_python"]


def scan_in_python(
    step: Callable[..., Any], carry: PyTree, xs: PyTree, length: int, reverse: bool
) -> tuple[PyTree, PyTree]:
    """Runs a scan of at least one round."""
    start = Outline.of("scan", "`carry`", carry)
    ys: list[PyTree] = []
    for time in reversed(range(length)) if reverse else range(length):
        carry, y = pair("scan", step(carry, optree.tree_map(lambda leaf, time=time: leaf[time], xs)))
        check_same("scan", "step", start, carry)
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, optree.tree_map(lambda *leaves: torch.stack(leaves), *ys)


def while_in_python(condition: Callable[..., Any], body: Callable[..., Any], carry: PyTree) -> PyTree:
    """Runs a while loop. Within `torch.vmap` it ends with the last lane, and a lane that is done keeps its carry."""
    start = Outline.of("while_loop", "`carry`", carry)
    before = carry
    while True:
        going = check_predicate("while_loop", "what `cond` returns", condition(carry))
        lanes = _values(going)
        if not lanes.any():
            return optree.tree_map(_without_gradient, carry)
        if lanes.ndim:  # a lane that is done repeats its last round: another one might fail, say by an index
            before = _selected(going, carry, before)
        new = body(before if lanes.ndim else carry)
        check_same("while_loop", "body", start, new)
        carry = _selected(going, new, carry) if lanes.ndim else new


def cond_in_python(predicate: Tensor, true: Callable[..., Any], false: Callable[..., Any], operands: Any) -> PyTree:
    """Runs the branch that a predicate chooses. In lanes both branches run, and each lane selects its results."""
    lanes = _values(predicate)
    if not lanes.ndim:
        return true(*operands) if lanes else false(*operands)
    with _GradientsWhere(predicate):
        first = true(*operands)
    with _GradientsWhere(predicate.logical_not()):
        second = false(*operands)
    check_same("cond", "false", Outline.of("cond", "what `true` returns", first), second, "what `true` returns")
    return _selected(predicate, first, second)


def _selected(predicate: Tensor, true: PyTree, false: PyTree) -> PyTree:
    return optree.tree_map(lambda one, other: torch.where(predicate, one, other), true, false)


# `torch.func.vjp` calls these. They look up a tensor in autograd's graph, so they must get the tensor itself.
_IN_GRAPH = (torch.autograd.grad, Tensor.requires_grad_, Tensor.requires_grad.__get__)  # type: ignore[attr-defined]


class _GradientsWhere(TorchFunctionMode):
    """Within it, tensors from outside of it have no gradient in the lanes that don't take the branch, not even NaN."""

    def __init__(self, taken: Tensor) -> None:
        super().__init__()
        self._taken = taken
        # What stands for a tensor, by its id and by how many transforms are around; the tensors are kept alive.
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = map_tensors(self._guarded, kwargs or {})
        if func not in _IN_GRAPH:
            args = map_tensors(self._guarded, tuple(args))
        result = func(*args, **kwargs)
        map_tensors(self._note_own, result)
        return result

    def _guarded(self, tensor: Tensor) -> Tensor:
        with DisableTorchFunction():  # the mode of a choice around this one must not see the question
            if not torch.is_grad_enabled() or not wants_gradient(tensor):
                return tensor
        key = id(tensor), transform_depth()
        if key not in self._known:
            self._known[key] = tensor, torch.where(self._taken, tensor, tensor.detach())
        return self._known[key][1]

    def _note_own(self, tensor: Tensor) -> None:
        self._known[id(tensor), transform_depth()] = tensor, tensor


def _values(tensor: Tensor) -> Tensor:
    """The values of a tensor in all lanes of the transforms that wrap it."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _without_gradient(leaf: Tensor) -> Any:
    return _NoGradient.apply(leaf) if leaf.requires_grad else leaf


class _NoGradient(torch.autograd.Function):
    """The identity, which has tangents but refuses a cotangent."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        raise NotImplementedError(NO_GRADIENT)

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any) -> Any:
        return _NoGradient.apply(x), in_dims[0]
