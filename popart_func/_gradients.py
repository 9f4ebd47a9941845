"""The gradient of a learner's objective: `torch.func.grad`, or autograd itself where no transform needs the former.

`torch.func.grad` wraps every tensor that the objective touches, which takes twice as long as the gradient of a small
network. Outside of every transform, trace and mode it has nothing to do, and autograd gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad

from popart_func._torch import is_plain
from popart_func.models import Params

__all__ = ["gradient"]


def gradient(
    objective: Callable[[dict[str, Tensor]], tuple[Tensor, Any]], params: Params, x: Any
) -> tuple[dict[str, Tensor], Any]:
    """``torch.func.grad(objective, has_aux=True)(params)``.

    Args:
        objective: of flat parameters -> a 0-d tensor, and a tree of other results.
        params: by name.
        x: a tree of the tensors that the objective closes over, as far as they are known.

    Returns:
        The gradients by name, and the other results. They have a graph if the objective depends on anything but
        ``params`` that requires a gradient, such as a tensor that it closes over.
    """
    if _needs_transform((*params.values(), *optree.tree_leaves(x))):
        result: tuple[dict[str, Tensor], Any] = grad(objective, has_aux=True)(dict(params))
        return result
    outside = torch.is_grad_enabled()
    with torch.enable_grad():
        own = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        value, others = objective(own)
        has_outer_graph = outside and _reaches_beyond(value, own.values())
        grads: Iterable[Tensor] = map(torch.zeros_like, own.values())
        if value.requires_grad:
            leaves = list(own.values())
            grads = torch.autograd.grad(value, leaves, create_graph=has_outer_graph, materialize_grads=True)
    if not has_outer_graph:
        others = optree.tree_map(Tensor.detach, others)
    return dict(zip(own, grads, strict=True)), others


def _needs_transform(tensors: Iterable[Any]) -> bool:
    """Whether the gradient of these tensors must be taken by `torch.func.grad`."""
    if not is_plain() or torch.is_inference_mode_enabled():
        return True
    return any(isinstance(one, Tensor) and (one.requires_grad or one.is_inference()) for one in tensors)


def _reaches_beyond(value: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether a value depends on anything but these leaves that requires a gradient."""
    own = set(map(id, leaves))
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = {None}
    for node in nodes:  # which grows
        if node not in seen:
            seen.add(node)
            sources = node.next_functions
            nodes += [source for source, _ in sources]
            if not sources and id(getattr(node, "variable", value)) not in own:
                return True
    return False
