"""Where a function stops gradients, as ops in its graph.

`.detach()` and `torch.no_grad` leave nothing in a trace that could be told from the detaching that autograd itself
does. Within `StopGradientMarks` a function leaves an op ``popart_func::stop_gradient`` there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["STOP_GRADIENT", "StopGradientMarks"]

STOP_GRADIENT = "popart_func::stop_gradient"

_library = torch.library.Library("popart_func", "FRAGMENT")
_library.define("stop_gradient(Tensor x) -> Tensor")
_library.impl("stop_gradient", lambda x: x.clone(), "CompositeExplicitAutograd")
_library.impl("stop_gradient", lambda x: torch.empty_like(x), "Meta")


class _StopGradient(torch.autograd.Function):
    """The identity, whose derivative is 0, for every transform of `torch.func`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.ops.popart_func.stop_gradient(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return torch.zeros_like(cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return torch.zeros_like(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any) -> Any:
        return _StopGradient.apply(x), in_dims[0]


class StopGradientMarks(TorchFunctionMode):
    """Marks what `.detach()` returns, and everything that is computed within `torch.no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self._no_grad = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.detach, torch.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
            return _marked(args[0])
        if func in (Tensor.detach_, torch.detach_):
            raise TypeError("to_jax_function: `.detach_()` can't be followed; use `.detach()`.")
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._no_grad = not args[0]
        elif self._no_grad:
            return pytree.tree_map(_marked, result)
        return result


def _marked(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return _StopGradient.apply(value) if is_real else value
