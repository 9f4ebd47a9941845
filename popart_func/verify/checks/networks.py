"""Checks that a network split in two equals the whole network, and that functional gradients equal ``backward()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, vmap
from torch.func import functional_call, grad, vjp

from popart_func import models, optim, random
from popart_func.optim import GradientTransformation
from popart_func.verify import by_hand, draw
from popart_func.verify.by_hand import Layers
from popart_func.verify.check import Check, Settings, check
from popart_func.verify.checks.lanes import compare_lanes
from popart_func.verify.checks.optimizers import ADAM, MOMENTUM, SGD, OptimizerCase
from popart_func.verify.discrepancy import Discrepancy
from popart_func.verify.noise import Measured, Noise, amplify, compare_measured, measure

__all__ = ["CHECKS"]

SPLIT = "split network"
"""The source of the claims: the early code of this project, which the notebook `split_vs_unified` tells about."""

STEPS = 4
"""How many steps are trained. Parameters are compared after the first step and after the last."""


class _Example(NamedTuple):
    params: dict[str, Tensor]
    x: Tensor
    y: Tensor
    rates: dict[str, Tensor]


def _draw(key: Tensor, settings: Settings, *, adam: bool = False) -> _Example:
    """Draws a network that predicts numbers of order 1, targets of any magnitude, and rates, on request for Adam."""
    architecture, dtype = settings.architecture, settings.dtype
    first, second = random.split(key).unbind()
    numbers = draw.uniforms(
        second,
        dtype,
        x=architecture.batched(architecture.inputs),
        y=architecture.batched(architecture.outputs),
        scale=(architecture.outputs,),
        offset=(architecture.outputs,),
        rates=(4,),
    )
    scale = draw.magnitude(numbers["scale"])
    offset = draw.heavy_tailed(numbers["offset"])
    y = scale * (offset + draw.heavy_tailed(numbers["y"]))
    x = draw.normal(numbers["x"]) + 0.2
    a, b, c, d = numbers["rates"].unbind()
    # A step moves the inputs of tanh by about the rate. Larger rates saturate tanh, which would hide differences.
    error = 1 + y.abs().amax()
    rates = {
        "learning_rate": draw.log_between(1e-3, 3e-2, a)
        if adam
        else draw.log_between(1e-2, 0.3, a) / (error * (1 + x.square().sum())),
        "momentum": draw.between(0.5, 0.95, b),
        "b1": draw.between(0.5, 0.95, b),
        "b2": draw.between(0.8, 0.999, c),
        # Far above the rounding of a gradient: where gradient and ε vanish, Adam's step is not continuous.
        "eps": draw.log_between(1e-2, 1e-1, d) * error,
    }
    return _Example(draw.network(first, dtype, architecture), x, y, rates)


def _train_split(example: _Example, settings: Settings, optimizer: GradientTransformation) -> list[dict[str, Tensor]]:
    """Trains the two halves with the library, each with an optimizer of its own, on one loss through both."""
    lower_module, upper_module, _ = draw.modules(settings.architecture)
    lower_apply, upper_apply = models.stateless(lower_module), models.stateless(upper_module)
    lower, upper = models.split(example.params)
    lower_state, upper_state = optimizer.init(lower), optimizer.init(upper)

    def mean_square(lower: dict[str, Tensor], upper: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.mse_loss(upper_apply(upper, lower_apply(lower, example.x)), example.y)

    history = []
    for _ in range(STEPS):
        lower_grads, upper_grads = grad(mean_square, argnums=(0, 1))(lower, upper)
        updates, lower_state = optimizer.update(lower_grads, lower_state, lower)
        lower = optim.apply_updates(lower, updates)
        updates, upper_state = optimizer.update(upper_grads, upper_state, upper)
        upper = optim.apply_updates(upper, updates)
        history.append(models.unify(models.SplitParams(lower, upper)))
    return [history[0], history[-1]]


def _train_unified(
    example: _Example, optimizer: OptimizerCase, noise: Noise, of_update: Noise
) -> list[dict[str, Tensor]]:
    """Trains the whole network by hand; ``of_update`` is the noise of the optimizer's updates."""
    layers = by_hand.layers_of(example.params)
    x, y = _batch(example.x.double()), _batch(example.y.double())
    rates = {name: rate.double() for name, rate in example.rates.items()}
    gradients: list[list[Tensor]] = []
    results = []
    for _ in range(STEPS):
        hidden, outputs = by_hand.forward(layers, x, noise)
        cotangent = 2 * noise(outputs - noise(y)) / y.numel()
        gradients.append(_flat(by_hand.backward(layers, hidden, cotangent, noise)))
        updates = [of_update(optimizer.rule(list(history), rates)) for history in zip(*gradients, strict=True)]
        flat = [noise(leaf + update) for leaf, update in zip(_flat(layers), updates, strict=True)]
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        results.append(by_hand.named(example.params, layers))
    return [results[0], results[-1]]


def _flat(layers: Layers) -> list[Tensor]:
    return [leaf for layer in layers for leaf in layer]


def _batch(tensor: Tensor) -> Tensor:
    """The tensor with a batch axis, if it has none."""
    return tensor if tensor.ndim == 2 else tensor[None]


def _split_unified(optimizer: OptimizerCase) -> Callable[[Tensor, Settings], Discrepancy]:
    """A check that the split network, trained by the library, equals the whole network, trained by hand."""

    def compare_with_hand(key: Tensor, settings: Settings) -> Discrepancy:
        example = _draw(key, settings, adam=optimizer is ADAM)
        got = _train_split(example, settings, optimizer.make(example.rates))

        def unified(noise: Noise) -> list[dict[str, Tensor]]:
            of_update = amplify(noise, optimizer.roundings(STEPS), settings.architecture)
            return _train_unified(example, optimizer, noise, of_update)

        return compare_measured(got, unified, example.x, settings)

    return compare_with_hand


def _draw_lanes(keys: Tensor, settings: Settings) -> tuple[_Example, Measured]:
    """The examples of all lanes, and the gradients of ``½ Σ (f − y)²`` by hand, with their terms."""

    def one(key: Tensor) -> tuple[_Example, Measured]:
        example = _draw(key, settings)

        def gradients(noise: Noise) -> dict[str, Tensor]:
            layers = by_hand.layers_of(example.params)
            hidden, outputs = by_hand.forward(layers, _batch(example.x.double()), noise)
            cotangent = noise(outputs - noise(_batch(example.y.double())))
            return by_hand.named(example.params, by_hand.backward(layers, hidden, cotangent, noise))

        return example, measure(gradients, example.x, settings.dtype)

    return vmap(one)(keys)


def _leaves(example: _Example) -> dict[str, Tensor]:
    """The parameters as leaves that require gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in example.params.items()}


@check("torch.func.grad = backward(), leaf by leaf", SPLIT, over_lanes=True)
def grad_is_backward(keys: Tensor, settings: Settings) -> Discrepancy:
    """``torch.func.grad`` through `models.stateless` equals ``backward()`` on leaves that require gradients."""
    example, measured = _draw_lanes(keys, settings)
    module = draw.modules(settings.architecture).unified

    def half_square(predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda params, x, y: 0.5 * (predict(params, x) - y).square().sum()

    got = vmap(grad(half_square(models.stateless(module))))(example.params, example.x, example.y)
    leaves = _leaves(example)
    loss = half_square(lambda params, x: functional_call(module, params, (x,)))
    vmap(loss)(leaves, example.x, example.y).sum().backward()
    expected = {name: leaf.grad for name, leaf in leaves.items()}
    return compare_lanes(got, expected, measured.terms, settings)


@check("torch.func.vjp with v = backward(grad_tensors=v)", SPLIT, over_lanes=True)
def vjp_is_grad_tensors(keys: Tensor, settings: Settings) -> Discrepancy:
    """``backward(grad_tensors=v)`` on the outputs equals the vector-Jacobian product with v."""
    example, measured = _draw_lanes(keys, settings)
    module = draw.modules(settings.architecture).unified
    apply = models.stateless(module)
    outputs = vmap(apply)(example.params, example.x)
    cotangents = (outputs - example.y).detach()

    def pull_back(params: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        return vjp(lambda params: apply(params, x), params)[1](cotangent)[0]

    got = vmap(pull_back)(example.params, example.x, cotangents)
    leaves = _leaves(example)
    outputs = vmap(lambda params, x: functional_call(module, params, (x,)))(leaves, example.x)
    torch.autograd.backward([outputs], grad_tensors=[cotangents])
    expected = {name: leaf.grad for name, leaf in leaves.items()}
    return compare_lanes(got, expected, measured.terms, settings)


@check("basis cotangents, pulled back across the cut = rows of the Jacobian", SPLIT)
def jacobian_rows(key: Tensor, settings: Settings) -> Discrepancy:
    """Basis cotangents, pulled back through the head and then the layers below, are the rows of the Jacobian.

    The head's pull-back gives the ``grad_tensors`` of the layers below: the chain rule across the cut. The reference is
    the product of the layers' Jacobians.
    """
    example = _draw(key, settings)
    lower_module, upper_module, _ = draw.modules(settings.architecture)
    lower, upper = models.split(example.params)
    x = _batch(example.x)[0]
    h, pull_lower = vjp(lambda x: models.stateless(lower_module)(lower, x), x)  # type: ignore[misc]  # three results only with has_aux
    outputs, pull_upper = vjp(lambda h: models.stateless(upper_module)(upper, h), h)  # type: ignore[misc]
    basis = torch.eye(outputs.shape[0], dtype=x.dtype, device=x.device)
    got = vmap(lambda row: pull_lower(*pull_upper(row))[0])(basis)

    def product(noise: Noise) -> Tensor:
        layers = by_hand.layers_of(example.params)
        hidden, _ = by_hand.forward(layers, x.double()[None], noise)
        jacobian = noise(layers[-1][0])
        for (weight, _), h in zip(reversed(layers[:-1]), reversed(hidden[1:]), strict=True):
            jacobian = noise(noise(jacobian * (1 - noise(h.square()))) @ weight)
        return jacobian

    return compare_measured(got, product, x, settings)


CHECKS = (
    Check(
        "split_sgd",
        "two halves, an optimizer each = one network, a step by hand; after 1 step and 4",
        SPLIT,
        _split_unified(SGD),
    ),
    Check("split_momentum", "two halves = one network, with momentum", SPLIT, _split_unified(MOMENTUM)),
    Check("split_adam", "two halves = one network, with Adam", SPLIT, _split_unified(ADAM)),
    grad_is_backward,
    vjp_is_grad_tensors,
    jacobian_rows,
)
