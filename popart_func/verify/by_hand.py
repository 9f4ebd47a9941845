"""The mathematics of networks, statistics and Pop-Art by hand, in float64: the reference for the library.

Nothing here calls the library. A network is a list of layers ``(W, b)``. Gradients are back-propagated by hand. The
statistics are plain float64. Each function applies a `Noise` to its intermediate results, so that `noise.measure`
can tell what rounding does to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from popart_func.verify.noise import Noise

__all__ = ["Gradients", "Layers", "MeanVariance", "art", "backward", "forward", "layers_of", "named", "pop", "sgd_step"]

Layers = list[tuple[Tensor, Tensor]]
Gradients = list[tuple[Tensor, Tensor]]


def layers_of(params: dict[str, Tensor]) -> Layers:
    """The layers of a flat dict of parameters in the order of the layers, in float64."""
    names = [name.removesuffix(".weight") for name in params if name.endswith(".weight")]
    return [(params[f"{name}.weight"].double(), params[f"{name}.bias"].double()) for name in names]


def named(params: dict[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """The flat dict of layers, under the names of ``params``."""
    flat = [tensor for layer in layers for tensor in layer]
    return dict(zip(params, flat, strict=True))


def forward(layers: Layers, x: Tensor, noise: Noise) -> tuple[list[Tensor], Tensor]:
    """The forward pass: the input and each hidden layer's activations, and the outputs; ``[batch, ...]`` each."""
    hidden = [x]
    for weight, bias in layers[:-1]:
        hidden.append(noise(torch.tanh(noise(noise(hidden[-1]) @ weight.mT + noise(bias)))))
    weight, bias = layers[-1]
    return hidden, noise(noise(hidden[-1]) @ weight.mT + noise(bias))


def backward(layers: Layers, hidden: list[Tensor], cotangent: Tensor, noise: Noise) -> Gradients:
    """The gradients of ``Σ cotangent · outputs`` by back-propagation, summed over the batch."""
    gradients: Gradients = []
    for (weight, _), h in zip(reversed(layers), reversed(hidden), strict=True):
        gradients.append((noise(cotangent).mT @ noise(h), noise(cotangent).sum(-2)))
        # For h near 1 the difference 1 − h² cancels, and the rounding of h² dominates it.
        cotangent = (noise(cotangent) @ weight) * (noise(torch.ones_like(h)) - noise(h.square()))
    return gradients[::-1]


def sgd_step(layers: Layers, gradients: Gradients, learning_rate: Tensor, noise: Noise) -> Layers:
    """One step of gradient descent: ``θ − α g`` for each parameter θ."""
    return [
        (noise(weight - noise(learning_rate * dw)), noise(bias - noise(learning_rate * db)))
        for (weight, bias), (dw, db) in zip(layers, gradients, strict=True)
    ]


class MeanVariance(NamedTuple):
    """Statistics as plain float64: mean and variance, ``[tasks]`` each."""

    mean: Tensor
    variance: Tensor

    @property
    def scale(self) -> Tensor:
        """σ, without bounds."""
        return self.variance.sqrt()


def art(statistics: MeanVariance, targets: Tensor, mask: Tensor, step_size: Tensor, noise: Noise) -> MeanVariance:
    """The paper's ART for a batch, where a task's targets together count as one update.

    Args:
        statistics: the statistics before.
        targets: ``[batch, outputs]``; with one task all outputs are its targets.
        mask: 1 for each target that exists, else 0, ``[batch, outputs]``.
        step_size: β.
        noise: the noise of the arithmetic.
    """
    if statistics.mean.shape[0] == 1:
        targets, mask = targets.reshape(-1, 1), mask.reshape(-1, 1)
    count = mask.sum(0)
    step = torch.where(count > 0, step_size, 0)
    share = mask / count.clamp(min=1)
    deviation = noise(targets - statistics.mean)
    first, second = (noise(share * deviation)).sum(0), (noise(share * deviation.square())).sum(0)
    # The paper's ν' − μ'², with the old mean as origin, so that it does not cancel.
    second_moment = noise((1 - step) * statistics.variance) + noise(step * second)
    return MeanVariance(statistics.mean + noise(step * first), second_moment - noise((step * first).square()))


def pop(head: tuple[Tensor, Tensor], old: MeanVariance, new: MeanVariance, noise: Noise) -> tuple[Tensor, Tensor]:
    """POP (Proposition 1): ``W' = σ/σ' W``, ``b' = (σ b + μ − μ')/σ'``."""
    weight, bias = head
    moved = noise(old.scale * noise(bias)) + noise(old.mean - new.mean)
    return noise(weight * noise(old.scale / new.scale)[:, None]), noise(moved / new.scale)
