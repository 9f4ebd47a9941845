"""The network of a learner: which parameters are trained, and checks of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from popart_func._checks import check_params
from popart_func.heads import Head, HeadLike, as_heads, locate_layers
from popart_func.models import Params, Stateless

__all__ = ["Apply", "Network", "as_network"]

Apply = Callable[[Params, Any], Tensor]
"""``apply(params, x)`` -> the head's outputs, ``[..., outputs]``."""


@dataclass(frozen=True)
class Network:
    """A checked ``apply``.

    Attributes:
        caller: the learner, which errors name.
        apply: as the user gave it. A `models.Stateless` knows what is trained and returns its buffers; of any other
            function all floating-point parameters are trained.
        heads: the heads, or none where they do not matter.
    """

    caller: str
    apply: Apply
    heads: tuple[Head, ...]

    def init(self, params: Params) -> dict[str, Tensor]:
        """Checked parameters. A module's own are detached: they would keep the graph of all updates alive."""
        check_params(self.caller, params)
        layers = locate_layers(self.caller, params, self.heads)
        own = {name for layer in layers for name in (layer.weight, layer.bias) if name is not None}
        frozen = sorted(own - self.trained(params).keys())
        if frozen:
            raise ValueError(
                f"{self.caller}: `head` must be trained, since POP moves it, got {frozen} with requires_grad=False."
            )
        return {name: leaf.detach() if isinstance(leaf, torch.nn.Parameter) else leaf for name, leaf in params.items()}

    def trained(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the parameters that are trained; the others are frozen, or buffers."""
        if isinstance(self.apply, Stateless):
            return {name: leaf for name, leaf in params.items() if name in self.apply.trainable}
        return {name: leaf for name, leaf in params.items() if leaf.is_floating_point() or leaf.is_complex()}

    def __call__(self, params: Params, x: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs, checked, and the buffers afterwards."""
        if isinstance(self.apply, Stateless):
            outputs, buffers = self.apply.with_buffers(params, x)
        else:
            outputs, buffers = self.apply(params, x), {}
        if not isinstance(outputs, Tensor) or outputs.is_complex():
            got = f"dtype {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"{self.caller}: `apply` must return one tensor of real outputs, got {got}.")
        if outputs.ndim == 0:
            raise ValueError(f"{self.caller}: `apply` must return outputs of shape [..., outputs], got a 0-d tensor.")
        sizes = [layer.outputs for layer in locate_layers(self.caller, params, self.heads)]
        if sizes and set(sizes) != {outputs.shape[-1]} and sum(sizes) != outputs.shape[-1]:
            names = " and ".join(repr(head.name) for head in self.heads)
            raise ValueError(
                f"{self.caller}: `head` must name the last layer, whose outputs `apply` returns: {names} has "
                f"{' and '.join(map(str, sizes))} outputs, and `apply` returned {tuple(outputs.shape)}."
            )
        return outputs, buffers


def as_network(caller: str, apply: Apply, head: HeadLike | None = None) -> Network:
    """The network of a learner, if ``apply`` can be one."""
    if isinstance(apply, torch.nn.Module) or not callable(apply):
        raise TypeError(
            f"{caller}: `apply` must be a function apply(params, x), got {type(apply).__name__}: "
            f"popart_func.stateless(module) makes one of a module."
        )
    return Network(caller, apply, () if head is None else as_heads(caller, head))
