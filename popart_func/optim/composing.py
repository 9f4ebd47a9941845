"""Transformations that go around an optimizer: clipping, weight decay, another optimizer for some of the parameters.

State: NamedTuples and dicts of tensors
init, update: those of a `GradientTransformation`; `chain` puts them one after the other

The names are optax's. All numbers may be 0-d tensors, so that each lane can have its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._checks import check_scalar
from popart_func._typing import Scalar
from popart_func.optim.rescaling import PARAMETERS, register_state
from popart_func.optim.transformations import (
    GradientTransformation,
    Rate,
    as_dtype,
    chain,
    scale_by_adam,
    scale_by_learning_rate,
    squared_magnitude,
)
from popart_func.tree import PyTree

__all__ = [
    "DecayState",
    "adamw",
    "add_decayed_weights",
    "clip_by_global_norm",
    "incremental_update",
    "partition",
    "periodic_update",
    "set_to_zero",
]


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """``g · min(1, max_norm / ‖g‖)``, with the norm of all gradients together.

    The norm is computed in float32, or in float64 if any gradient is float64.

    Args:
        max_norm: the largest norm, > 0.

    Source: Pascanu et al. (2012); as `optax.clip_by_global_norm`.

    >>> _, update = clip_by_global_norm(1.0)
    >>> update({"w": torch.tensor([3.0, 4.0])}, ())[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    check_scalar("clip_by_global_norm", "max_norm", max_norm, above=0)

    def update(grads: PyTree, state: tuple[()], params: PyTree = None) -> tuple[PyTree, tuple[()]]:
        leaves = optree.tree_leaves(grads)
        if not leaves:
            return grads, state
        # The squares of half precision soon overflow, and those of float64 overflow in float32.
        wide = reduce(torch.promote_types, [leaf.dtype.to_real() for leaf in leaves], torch.float32)

        def widened(leaf: Tensor) -> Tensor:
            return leaf.to(torch.promote_types(leaf.dtype, wide))

        norm = torch.stack([squared_magnitude(widened(leaf)).sum() for leaf in leaves]).sum().sqrt()

        def clip(grad: Tensor) -> Tensor:
            # Divided before it is multiplied: a quotient of the two norms could overflow.
            clipped = widened(grad) / norm * as_dtype(max_norm, norm)
            return torch.where(norm < max_norm, grad, clipped.to(grad.dtype))

        return optree.tree_map(clip, grads), state

    return GradientTransformation(lambda params: (), update)


@partial(register_state, center=PARAMETERS)
class DecayState(NamedTuple):
    """What the parameters decay toward, a tree like them.

    It begins at 0. POP moves it with the head, so that it stays where it is in the units of the targets: a head decays
    toward predictions of 0, not toward the mean of the targets.
    """

    center: PyTree


def add_decayed_weights(
    weight_decay: Scalar, mask: Callable[[str], bool] | Mapping[str, bool] | None = None
) -> GradientTransformation:
    """Weight decay: ``u = g + λ p``, to be put before the learning rate.

    With Pop-Art, plain decay would pull every prediction toward the mean of the targets. `PopArt.update_network` and
    the learners therefore move what the head decays toward, so that it is the *folded* head that decays, toward 0.

    Args:
        weight_decay: λ >= 0.
        mask: which parameters decay: a function of a name, or a dict by name; None for all.

    Source: as `optax.add_decayed_weights`; the folded head is this library's.

    >>> init, update = add_decayed_weights(0.1)
    >>> params = {"w": torch.tensor(2.0)}
    >>> update({"w": torch.tensor(1.0)}, init(params), params)[0]
    {'w': tensor(1.2000)}
    """
    check_scalar("add_decayed_weights", "weight_decay", weight_decay, least=0)

    def decays(name: str) -> bool:
        return mask is None or (mask(name) if callable(mask) else mask[name])

    def init(params: PyTree) -> DecayState:
        return DecayState(optree.tree_map(torch.zeros_like, params))

    def update(grads: PyTree, state: DecayState, params: PyTree = None) -> tuple[PyTree, DecayState]:
        if params is None:
            raise ValueError("add_decayed_weights: `params` must be given to update, since they decay.")

        def add(path: tuple[Any, ...], grad: Tensor, param: Tensor, center: Tensor) -> Tensor:
            if not decays(".".join(map(str, path))):
                return grad
            return grad + as_dtype(weight_decay, grad) * (param - center).to(grad.dtype)

        return optree.tree_map_with_path(add, grads, params, state.center), state

    return GradientTransformation(init, update)


def adamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Callable[[str], bool] | Mapping[str, bool] | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``u = −α (m̂ / (√v̂ + ε) + λ p)``. Arguments as in `adam`, `add_decayed_weights`.

    Source: Loshchilov and Hutter (2019); as `optax.adamw`.
    """
    decay = add_decayed_weights(weight_decay, mask)
    return chain(scale_by_adam(b1, b2, eps), decay, scale_by_learning_rate(learning_rate))


def set_to_zero() -> GradientTransformation:
    """Updates of zero: in `partition`, its parameters stay frozen."""

    def update(grads: PyTree, state: tuple[()], params: PyTree = None) -> tuple[PyTree, tuple[()]]:
        return optree.tree_map(torch.zeros_like, grads), state

    return GradientTransformation(lambda params: (), update)


def partition(
    transforms: Mapping[str, GradientTransformation], param_labels: Mapping[str, str] | Callable[[str], str]
) -> GradientTransformation:
    """Another transformation for some of the parameters: rates per parameter, frozen ones, one optimizer for the head.

    Args:
        transforms: label to transformation.
        param_labels: the label of each parameter, a dict by name or a function of the name. Parameters are a flat dict.

    Raises:
        ValueError: a label without a transformation.

    Source: as `optax.partition`.

    >>> from popart_func.optim import sgd
    >>> rates = {"head": sgd(0.1), "rest": set_to_zero()}
    >>> init, update = partition(rates, lambda name: "head" if name.startswith("head.") else "rest")
    >>> params = {"head.bias": torch.ones(1), "body.bias": torch.ones(1)}
    >>> update(params, init(params), params)[0]
    {'head.bias': tensor([-0.1000]), 'body.bias': tensor([0.])}
    """

    def parts(params: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        split: dict[str, dict[str, Tensor]] = {label: {} for label in transforms}
        for name, leaf in params.items():
            label = param_labels(name) if callable(param_labels) else param_labels[name]
            if label not in split:
                raise ValueError(
                    f"partition: `param_labels` must be one of {sorted(split)}, got {label!r} for {name!r}."
                )
            split[label][name] = leaf
        return split

    def init(params: Mapping[str, Tensor]) -> dict[str, Any]:
        return {label: transforms[label].init(part) for label, part in parts(params).items()}

    def update(
        grads: Mapping[str, Tensor], state: dict[str, Any], params: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = {} if params is None else parts(params)
        updates, new = {}, {}
        for label, part in parts(grads).items():
            changes, new[label] = transforms[label].update(part, state[label], own.get(label))
            updates.update(changes)
        return {name: updates[name] for name in grads}, new

    return GradientTransformation(init, update)


def incremental_update(new_tensors: PyTree, old_tensors: PyTree, step_size: Scalar) -> PyTree:
    """Polyak averaging of a target network: ``old + τ (new − old)``. With Pop-Art both must be popped alike.

    `PopArt.update_network` pops the target network too, if it gets both: ``(params, target_params)``.

    Source: as `optax.incremental_update`.

    >>> incremental_update({"w": torch.tensor(1.0)}, {"w": torch.tensor(0.0)}, 0.25)
    {'w': tensor(0.2500)}
    """
    check_scalar("incremental_update", "step_size", step_size, least=0, most=1)
    return optree.tree_map(lambda new, old: old + as_dtype(step_size, old) * (new - old), new_tensors, old_tensors)


def periodic_update(new_tensors: PyTree, old_tensors: PyTree, steps: Tensor, update_period: int) -> PyTree:
    """A target network that is copied every ``update_period`` steps: new at steps 0, k, 2k, …, else old.

    Args:
        new_tensors: the network.
        old_tensors: the target network.
        steps: the number of steps so far, a 0-d integer tensor.
        update_period: k >= 1.

    Source: as `optax.periodic_update`.
    """
    now = steps % update_period == 0
    return optree.tree_map(lambda new, old: torch.where(now, new, old), new_tensors, old_tensors)
