"""Checks against other libraries: the learner run by JAX, and rlax's Pop-Art. Skipped where they are not installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, vmap
from torch.func import vjp

from popart_func import models, pop_art
from popart_func.pop_art import PopArtState
from popart_func.verify import by_hand, draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.checks.lanes import (
    compare_lanes,
    draw_lanes,
    initial_states,
    lane_values,
    learner_step,
    popart_learner,
)
from popart_func.verify.closed_form import Bounds, Updates, task_mask, track, track_update
from popart_func.verify.discrepancy import Discrepancy, compare, worst
from popart_func.verify.noise import Noise, compare_measured
from popart_func.verify.problems import Problem, draw_problem, train

__all__ = ["CHECKS", "bridged_gradients", "lanes_in_jax"]


def jax_is_torch(keys: Tensor, settings: Settings) -> Discrepancy:
    """``jax.jit(jax.vmap(jax.lax.scan))`` of the learner's step, through `to_jax_function`, equals PyTorch."""
    import jax

    from popart_func.interop.jax import to_jax, to_torch

    problems, terms = draw_lanes(keys.cpu(), settings, steps=4)
    expected = vmap(lambda problem: train(problem, settings, popart_learner)[1])(problems)
    hparams = {"learning_rate": problems.learning_rate, "step_size": problems.step_size}
    batch = (problems.x, problems.y, problems.indices.int())[: 3 if settings.architecture.indexed else 2]
    with jax.enable_x64(settings.dtype == torch.float64):
        run_lanes = lanes_in_jax(settings)
        state, predictions = to_torch(run_lanes(*to_jax((initial_states(problems, settings), batch, hparams))))
    got = lane_values(problems, state, predictions, settings)
    return _on_device_of(keys, compare_lanes(got, expected, terms, settings))


@functools.cache
def lanes_in_jax(settings: Settings) -> Any:
    """The jitted scan over all lanes' steps; the same settings give the same function, which is compiled once."""
    import jax

    from popart_func.interop.jax import to_jax_function

    step = to_jax_function(learner_step(settings))

    def run_lane(state: Any, xs: Any, hparams: Any) -> Any:
        return jax.lax.scan(lambda state, x: step(state, x, hparams), state, xs)

    return jax.jit(jax.vmap(run_lane))


def jax_bridge(keys: Tensor, settings: Settings) -> Discrepancy:
    """Gradients through the bridge, both ways, equal back-propagation by hand; trees go there and back unchanged.

    The network's gradient is taken by JAX of a PyTorch function (`to_jax_function`), and by PyTorch of the network
    written in JAX (`from_jax`).
    """
    import jax

    from popart_func.interop.jax import to_jax, to_torch

    problems = vmap(lambda key: draw_problem(key, settings, steps=1))(keys.cpu())
    cotangents = problems.y[:, 0] / problems.magnitude[:, None]
    arguments = problems.params, problems.x[:, 0], cotangents
    with jax.enable_x64(settings.dtype == torch.float64):
        of_torch, of_jax = bridged_gradients(settings)
        there = to_jax(arguments)
        back = to_torch(there)
        found = to_torch(of_torch(*there)), vmap(of_jax)(*arguments)

    def one(problem: Problem, cotangent: Tensor, found: Any) -> Discrepancy:
        def by_back_propagation(noise: Noise) -> Any:
            layers = by_hand.layers_of(problem.params)
            hidden, _ = by_hand.forward(layers, problem.x[0].double(), noise)
            gradients = by_hand.named(problem.params, by_hand.backward(layers, hidden, cotangent.double(), noise))
            return gradients, gradients

        return compare_measured(found, by_back_propagation, problem.x, settings)

    same = vmap(lambda one, other: compare(one, other, other, 0, settings.dtype))(back, arguments)
    return _on_device_of(keys, worst(vmap(one)(problems, cotangents, found), same))


@functools.cache
def bridged_gradients(settings: Settings) -> tuple[Any, Any]:
    """The gradient of all lanes by JAX of a PyTorch function, and that of a lane by PyTorch of a JAX function."""
    import jax
    import jax.numpy as jnp

    from popart_func.interop.jax import from_jax, to_jax_function

    def network_in_jax(params: Any, x: Any) -> Any:
        *below, head = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
        for name in below:
            x = jnp.tanh(x @ params[f"{name}.weight"].T + params[f"{name}.bias"])
        return x @ params[f"{head}.weight"].T + params[f"{head}.bias"]

    unified = draw.modules(settings.architecture).unified
    names = [name for name, _ in unified.named_parameters()]
    in_jax, in_torch = to_jax_function(models.stateless(unified)), from_jax(network_in_jax)
    of_torch = jax.jit(jax.vmap(lambda params, x, cotangent: jax.vjp(lambda p: in_jax(p, x), params)[1](cotangent)[0]))
    return of_torch, lambda params, x, cotangent: vjp(lambda p: in_torch(p, x), params)[1](cotangent)[0]


def rlax_is_popart(keys: Tensor, settings: Settings) -> Discrepancy:
    """`art` with ``reduction="sum"`` and `pop` equal `rlax.art` and `rlax.pop`, also while a bound binds."""
    import jax
    import rlax

    from popart_func.interop.jax import to_jax, to_torch

    examples = vmap(lambda key: _draw(key, settings))(keys.cpu())
    start, head = examples.start, examples.head
    with jax.enable_x64(settings.dtype == torch.float64):
        second = start.variance + start.shift.square()
        their_start = rlax.PopArtState(*to_jax((start.shift, start.scale, second)))
        their_head = {"w": to_jax(head["weight"].mT), "b": to_jax(head["bias"])}

        @jax.jit
        @jax.vmap
        def update(state: Any, targets: Any, indices: Any, step_size: Any, head: Any, bounds: Any) -> Any:
            new = rlax.art(state, targets, indices, step_size, **bounds)
            return new, rlax.pop(head, state, new)

        batch = to_jax((examples.targets, examples.indices.int(), examples.step_size))
        theirs, popped = to_torch(update(their_start, *batch, their_head, to_jax(examples.bounds)))
    return _on_device_of(keys, vmap(functools.partial(_compare_rlax, settings=settings))(examples, theirs, popped))


class _Example(NamedTuple):
    start: PopArtState
    targets: Tensor
    indices: Tensor
    step_size: Tensor
    head: dict[str, Tensor]
    bounds: Bounds


def _compare_rlax(example: _Example, theirs: Any, popped: dict[str, Tensor], settings: Settings) -> Discrepancy:
    """The discrepancy of the library and rlax in one lane; ``theirs`` and ``popped`` are rlax's statistics and head."""
    start, targets, indices, step_size, head, bounds = example
    new = pop_art.art(start, targets, indices, step_size=step_size, reduction="sum", **bounds)
    # Both pops lead to rlax's statistics, so that their difference is that of the pops alone.
    last = draw.statistics(theirs.shift, theirs.scale, torch.zeros_like(theirs.shift))
    got = pop_art.pop(head, start, last)
    expected = {"weight": popped["w"].mT, "bias": popped["b"]}
    ratio = start.scale.double() / theirs.scale.double()
    size = (start.shift.double().abs() + theirs.shift.double().abs()) / theirs.scale.double()
    terms = {
        "weight": (ratio[:, None] * head["weight"].double()).abs(),
        "bias": (ratio * head["bias"].double()).abs() + size,
    }
    errors = _rlax_errors(example, settings)
    return worst(
        compare((new.shift + new.residue, new.scale), (theirs.shift, theirs.scale), errors, 1, settings.dtype),
        # The library's pop rounds 4 times; rlax's rounds a product, a sum, a difference and a quotient.
        compare(got, expected, terms, 4 + 4, settings.dtype),
    )


def _rlax_errors(example: _Example, settings: Settings) -> tuple[Tensor, Tensor]:
    """The largest difference that rounding can cause in the means and in the scales, in units of a rounding.

    rlax keeps the second moment ν. A sample's ``β (y − μ)`` rounds twice and ``β (y² − ν)`` three times, and each of
    the n sums once more. ν at the start is a square and a sum. In rlax's variance ``ν − μ²`` the errors of both remain
    where the numbers cancel.
    """
    start, targets, indices, step_size, _, bounds = example
    mask = task_mask(indices, start.shift.shape[0])
    updates = Updates.from_rules(targets[None, :, None], mask[None], step_size, settings.dtype, summed=True)
    relative = targets.double()[:, None] - start.shift.double()
    ours = track_update(track(start), relative, mask, updates.steps[0], updates.step_roundings[0], settings.dtype)

    count, beta, y = mask.sum(0), step_size.double(), targets.double()[:, None]
    shift, variance = start.shift.double(), start.variance.double()
    second = variance + shift.square()
    largest = torch.maximum(shift.abs(), (mask * y.abs()).amax(0))
    mean = count * largest + 2 * beta * (mask * relative.abs()).sum(0)
    of_second = count * torch.maximum(second, largest.square()) + 3 * beta * (mask * (y.square() + second)).sum(0)
    of_variance = second + shift.square() + of_second + 2 * largest * mean + largest.square() + ours.variance
    scale = ours.variance.sqrt().clamp(bounds["scale_lb"].double(), bounds["scale_ub"].double())
    # √v errs by the error of v over √v. Both sides round the root, and rlax also the squares of the bounds.
    deviation = ours.variance.sqrt().clamp(min=bounds["scale_lb"].double())
    return ours.mean_error + mean + largest, (ours.variance_error + of_variance) / deviation + 3 * scale


def _draw(key: Tensor, settings: Settings) -> _Example:
    """Draws statistics and a head of several tasks of any magnitude, and a batch.

    Offsets are a few scales only, since larger ones cancel in rlax's variance.
    """
    tasks, batch = 4, 6
    numbers = draw.uniforms(
        key,
        settings.dtype,
        weight=(tasks, 5),
        bias=(tasks,),
        targets=(batch,),
        task=(batch,),
        step=(),
        bounds=(2,),
        scale=(tasks,),
        offset=(tasks,),
    )
    scale = draw.magnitude(numbers["scale"])
    shift = scale * (draw.normal(numbers["offset"]) + 0.5)
    indices = (numbers["task"] * tasks).long().clamp(max=tasks - 1)
    targets = shift[indices] + scale[indices] * (draw.normal(numbers["targets"]) + 0.3)
    start = draw.statistics(shift, scale, torch.zeros_like(shift))
    head = {"weight": draw.normal(numbers["weight"]), "bias": draw.normal(numbers["bias"]) + 0.4}
    step_size = draw.log_between(1e-3, 1 / batch, numbers["step"])
    bounds = draw.bounds(numbers["bounds"])
    # rlax also clamps the scale of a task without targets; the library leaves it.
    start = start._replace(scale=start.scale.clamp(bounds["scale_lb"], bounds["scale_ub"]))
    return _Example(start, targets, indices, step_size, head, bounds)


def _on_device_of(keys: Tensor, discrepancy: Discrepancy) -> Discrepancy:
    """Moves a discrepancy to the device of the keys: these checks run on the CPU, where JAX is."""
    return Discrepancy(*(field.to(keys.device) for field in discrepancy))


def _needs(*packages: str, extra: str) -> Callable[[Settings, torch.device], str | None]:
    """A `Check.why_not` that names the first package that can't be imported, and the extra that installs it."""

    def why_not(settings: Settings, device: torch.device) -> str | None:
        for package in packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                return f"{package} can't be imported ({error}): pip install 'popart-func[{extra}]'"
        return None

    return why_not


CHECKS = (
    Check(
        "jax",
        "the learner in JAX = in PyTorch, 4 steps of Algorithm 1",
        "README",
        jax_is_torch,
        over_lanes=True,
        architectures=(0, 3),
        why_not=_needs("jax", extra="jax"),
    ),
    Check(
        "jax_bridge",
        "gradients across the bridge, both ways = back-propagation by hand",
        "README",
        jax_bridge,
        over_lanes=True,
        architectures=(1,),
        why_not=_needs("jax", extra="jax"),
    ),
    Check(
        "rlax",
        "art (sum) and pop = rlax.art and rlax.pop",
        "rlax",
        rlax_is_popart,
        over_lanes=True,
        architectures=(0,),
        why_not=_needs("jax", "rlax", extra="test"),
    ),
)
