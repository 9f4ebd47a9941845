"""Losses of learners: functions of normalized predictions and targets, value by value.

``loss(prediction, target, statistics, indices, **others)`` gives the loss of each target, in the shape of both. The
learner sums over outputs, averages over the batch with its weights, and leaves absent targets out. ``statistics`` and
``indices`` are for `pop_art.normalize`; ``others`` is what else the batch holds. A loss of your own is any such
function. A loss with a parameter for each output is a `ByOutput`, which the learner tells the output of each target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from popart_func._checks import check_scalar, is_known
from popart_func._typing import Scalar
from popart_func.pop_art import PopArtState, normalize

__all__ = ["ByOutput", "Loss", "check_loss", "clipped_value", "half_square", "huber", "quantile"]

Loss = Callable[..., Tensor]
"""``loss(prediction, target, statistics, indices, **others)`` -> the loss of each target."""


def check_loss(caller: str, loss: Any) -> None:
    """Raises TypeError unless a learner can call a loss.

    A loss of PyTorch takes other arguments in the places of ``statistics`` and ``indices``, and averages.
    """
    if torch.compiler.is_compiling():
        return
    if not callable(loss):
        raise TypeError(f"{caller}: `loss` must be a function, as in popart_func.losses, got {type(loss).__name__}.")
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, torch.nn.Module) else loss)
    except ValueError:  # a builtin
        return
    try:
        signature.bind(*("prediction", "target", "statistics", "indices"))
    except TypeError:
        fits = False
    else:
        fits = "reduction" not in signature.parameters
    if not fits:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise TypeError(
            f"{caller}: `loss` must take (prediction, target, statistics, indices, **others), got "
            f"{name}({', '.join(signature.parameters)}). If it makes a loss, call it: losses.huber(). "
            f"Of a loss of two arguments make one: lambda prediction, target, *_, **others: "
            f"torch.nn.functional.huber_loss(prediction, target, reduction='none')."
        )


def half_square(prediction: Tensor, target: Tensor, *_: Any, **others: Any) -> Tensor:
    """``½ (n − ỹ)²``."""
    return 0.5 * (prediction - target).square()


def huber(delta: Scalar = 1.0) -> Loss:
    """``½ e²`` up to ``|e| = δ``, and ``δ (|e| − ½ δ)`` beyond, in normalized units.

    Source: Huber (1964); as `optax.huber_loss`.
    """
    check_scalar("huber", "delta", delta, above=0)

    def loss(prediction: Tensor, target: Tensor, *_: Any, **others: Any) -> Tensor:
        error = (prediction - target).abs()
        small = torch.minimum(error, torch.zeros_like(error) + delta)
        return small * (error - 0.5 * small)

    return loss


@dataclass(frozen=True, eq=False)
class ByOutput:
    """A loss with a parameter for each output of the network.

    Attributes:
        name: the function that made it, which errors name.
        parameters: the parameter of each output, ``[outputs]``; after `at`, of each target.
        loss: ``loss(prediction, target, parameter)`` -> the loss of each target.
        is_placed: whether `at` has said which output each target belongs to.
    """

    name: str
    parameters: Tensor
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    is_placed: bool = False

    def at(self, outputs: int, indices: Tensor | None) -> ByOutput:
        """The loss of targets that belong to the outputs ``indices``, or, where that is None, to all outputs in order.

        Args:
            outputs: how many outputs the network has.
            indices: the output of each target, in the shape of the targets.

        Raises:
            ValueError: a number of parameters that is not that of the outputs.
        """
        if self.parameters.shape != (outputs,):
            raise ValueError(
                f"{self.name}: there must be a parameter for each of the {outputs} outputs of the network, "
                f"got {tuple(self.parameters.shape)}."
            )
        if indices is None:
            return replace(self, is_placed=True)
        own = self.parameters.index_select(0, indices.reshape(-1).long()).reshape(indices.shape)
        return replace(self, parameters=own, is_placed=True)

    def __call__(
        self, prediction: Tensor, target: Tensor, statistics: Any = None, indices: Any = None, **others: Any
    ) -> Tensor:
        """The loss of each target: of every output, ``[..., outputs]``, or after `at` of those that it names.

        Raises:
            ValueError: predictions whose last axis, or after `at` whose shape, is not that of the parameters; an index
                for each prediction, and no `at`.
        """
        shape = self.parameters.shape
        one_each = isinstance(indices, Tensor) and indices.shape == prediction.shape and not self.is_placed
        if shape != (1,) and (one_each or prediction.shape[-len(shape) :] != shape):
            raise ValueError(
                f"{self.name}: the last axis of `prediction` must be the {shape.numel()} outputs, got shape "
                f"{tuple(prediction.shape)}{' and as many indices' * one_each}. Write `loss.at(outputs, indices)` in "
                f"the place of `loss` where each prediction is of the output that an index names."
            )
        return self.loss(prediction, target, self.parameters)


def quantile(quantiles: Tensor, delta: Scalar | None = None) -> ByOutput:
    """The pinball loss, ``|τ − 1[ỹ < n]| · |ỹ − n|``: output i learns the quantile τ_i of the targets.

    POP preserves such a head exactly. With ``delta`` the absolute value is Huber's, as in QR-DQN. In a batch with
    indices, a target belongs to the quantile of the output that its index names.

    Args:
        quantiles: τ of each output, ``[outputs]``, in (0, 1). Where every task has the same, repeat them.
        delta: where `huber` goes from a parabola to a line; None for the absolute value itself.

    Raises:
        ValueError: quantiles that are not one for each output.

    Source: Koenker and Bassett (1978); Dabney et al. (2018).
    """
    if not isinstance(quantiles, Tensor) or quantiles.ndim != 1:
        got = tuple(quantiles.shape) if isinstance(quantiles, Tensor) else type(quantiles).__name__
        raise ValueError(f"quantile: `quantiles` must be a tensor [outputs], got {got}.")
    if is_known(quantiles) and not bool(((quantiles > 0) & (quantiles < 1)).all()):
        raise ValueError(f"quantile: `quantiles` must lie in (0, 1), got {quantiles.tolist()}.")
    of_error = None if delta is None else huber(delta)

    def loss(prediction: Tensor, target: Tensor, quantiles: Tensor) -> Tensor:
        error = target - prediction
        share = torch.where(error < 0, 1 - quantiles, quantiles).to(error.dtype)
        return share * (error.abs() if of_error is None else of_error(prediction, target))

    return ByOutput("quantile", quantiles, loss)


def clipped_value(epsilon: Scalar, name: str = "old_value") -> Loss:
    """PPO's clipped loss of values: ``½ max((n − ỹ)², (clip(n, o − ε, o + ε) − ỹ)²)``.

    o is an earlier prediction, unnormalized, which the batch holds under ``name``, in the shape of the targets. It is
    normalized by the present statistics, so that ε is in their units.

    Raises:
        ValueError: a batch without ``name``, or with another shape.

    Source: Schulman et al., *Proximal policy optimization* (2017), as in OpenAI's baselines.
    """
    check_scalar("clipped_value", "epsilon", epsilon, above=0)

    def loss(
        prediction: Tensor, target: Tensor, statistics: PopArtState, indices: Tensor | None = None, **others: Any
    ) -> Tensor:
        held = others.get(name)
        if not isinstance(held, Tensor) or held.shape != prediction.shape:
            raise ValueError(
                f"clipped_value: {name!r} of the batch must have the shape of the targets, {tuple(prediction.shape)}, "
                f"got {tuple(held.shape) if isinstance(held, Tensor) else held}."
            )
        old = normalize(statistics, held, indices).detach()
        clipped = old + torch.maximum(torch.minimum(prediction - old, 0 * old + epsilon), 0 * old - epsilon)
        return 0.5 * torch.maximum((prediction - target).square(), (clipped - target).square())

    return loss
