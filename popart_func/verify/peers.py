"""The same learner run by JAX, and rlax's Pop-Art: each where it is installed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, vmap

from popart_func import pop_art
from popart_func.tree import PyTree
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, worst
from popart_func.verify.lanes import compare_runs, draw_runs, popart_learner, start_of, step_of
from popart_func.verify.running import Batches, begin, belongs_to, follow
from popart_func.verify.runs import result, train

__all__ = ["CHECKS"]


def jax_is_torch(keys: Tensor, settings: Settings) -> Discrepancy:
    """``jax.jit(jax.vmap(jax.lax.scan))`` of the learner's step through `to_jax_function`, against PyTorch."""
    import jax

    from popart_func.interop.jax import to_jax, to_torch

    runs, terms = draw_runs(keys.cpu(), settings, steps=4)
    expected = vmap(lambda run: train(run, settings, popart_learner)[1])(runs)
    hparams = {"learning_rate": runs.learning_rate, "step_size": runs.step_size}
    batch = (runs.x, runs.y, runs.indices.int()) if settings.architecture.indexed else (runs.x, runs.y)
    with jax.enable_x64(settings.dtype == torch.float64):
        run_lanes = lanes_in_jax(settings)
        state, predictions = to_torch(run_lanes(*to_jax((start_of(runs, settings), batch, hparams))))
    got = vmap(lambda run, state, ys: result(run, state, ys, settings))(runs, state, predictions)
    return _back(compare_runs(got, expected, terms, settings), keys)


@functools.cache
def lanes_in_jax(settings: Settings) -> Any:
    """The jitted run, made and compiled once for the same settings."""
    import jax

    from popart_func.interop.jax import to_jax_function

    step = to_jax_function(step_of(settings))

    def run_lane(state: Any, xs: Any, hparams: Any) -> Any:
        return jax.lax.scan(lambda state, x: step(state, x, hparams), state, xs)

    return jax.jit(jax.vmap(run_lane))


def rlax_is_popart(keys: Tensor, settings: Settings) -> Discrepancy:
    """`rlax.art` and `rlax.pop`, against `art` with ``reduction="sum"`` and `pop`, while bounds bind as well."""
    import jax
    import rlax

    from popart_func.interop.jax import to_jax, to_torch

    numbers = vmap(lambda key: _draw(key, settings))(keys.cpu())
    start, targets, indices, step_size, head, bounds = numbers
    with jax.enable_x64(settings.dtype == torch.float64):
        second = start.variance + start.shift.square()
        their_start = rlax.PopArtState(*to_jax((start.shift, start.scale, second)))
        their_head = {"w": to_jax(head["weight"].mT), "b": to_jax(head["bias"])}

        @jax.jit
        @jax.vmap
        def update(state: Any, targets: Any, indices: Any, step_size: Any, head: Any, bounds: Any) -> Any:
            new = rlax.art(state, targets, indices, step_size, **bounds)
            return new, rlax.pop(head, state, new)

        their_state, their_popped = to_torch(
            update(their_start, *to_jax((targets, indices.int(), step_size)), their_head, to_jax(bounds))
        )

    def one(
        start: Any,
        targets: Tensor,
        indices: Tensor,
        step_size: Tensor,
        head: Any,
        bounds: Any,
        theirs: Any,
        popped: Any,
    ) -> Discrepancy:
        new = pop_art.art(start, targets, indices, step_size=step_size, reduction="sum", **bounds)
        # The same statistics on both sides of pop: theirs.
        last = draw.statistics(theirs.shift, theirs.scale, torch.zeros_like(theirs.shift))
        got = pop_art.pop(head, start, last)
        expected = {"weight": popped["w"].mT, "bias": popped["b"]}
        ratio = start.scale.double() / theirs.scale.double()
        size = (start.shift.double().abs() + theirs.shift.double().abs()) / theirs.scale.double()
        sizes = {
            "weight": (ratio[:, None] * head["weight"].double()).abs(),
            "bias": (ratio * head["bias"].double()).abs() + size,
        }
        return worst(
            compare(
                (new.shift + new.residue, new.scale),
                (theirs.shift, theirs.scale),
                _rlax_errors(start, targets, indices, step_size, bounds, settings),
                1,
                settings.dtype,
            ),
            # Ours 4; theirs a product, a sum, a difference and a quotient.
            compare(got, expected, sizes, 4 + 4, settings.dtype),
        )

    return _back(vmap(one)(start, targets, indices, step_size, head, bounds, their_state, their_popped), keys)


def _rlax_errors(
    start: Any, targets: Tensor, indices: Tensor, step_size: Tensor, bounds: Any, settings: Settings
) -> tuple[Tensor, Tensor]:
    """What rounding may make of the two means, and of the two scales, in units of a rounding.

    rlax keeps the second moment ν. A sample's ``β (y − μ)`` rounds twice and ``β (y² − ν)`` three times, and each of
    the n sums once more; ν at the start is a square and a sum; its variance ``ν − μ²`` cancels what is left of them.
    """
    belongs = belongs_to(indices, start.shift.shape[0])
    updates = Batches.of(targets[None, :, None], belongs[None], step_size, settings.dtype, summed=True)
    relative = targets.double()[:, None] - start.shift.double()
    ours = follow(begin(start), relative, belongs, updates.steps[0], updates.step_roundings[0], settings.dtype)

    count, beta, y = belongs.sum(0), step_size.double(), targets.double()[:, None]
    shift, variance = start.shift.double(), start.variance.double()
    second = variance + shift.square()
    largest = torch.maximum(shift.abs(), (belongs * y.abs()).amax(0))
    mean = count * largest + 2 * beta * (belongs * relative.abs()).sum(0)
    of_second = count * torch.maximum(second, largest.square()) + 3 * beta * (belongs * (y.square() + second)).sum(0)
    of_variance = second + shift.square() + of_second + 2 * largest * mean + largest.square() + ours.variance
    scale = ours.variance.sqrt().clamp(bounds["scale_lb"].double(), bounds["scale_ub"].double())
    # √v errs by the error of v over √v; then a root on both sides, and theirs is clamped by squares.
    deviation = ours.variance.sqrt().clamp(min=bounds["scale_lb"].double())
    return ours.mean_error + mean + largest, (ours.variance_error + of_variance) / deviation + 3 * scale


def _draw(key: Tensor, settings: Settings) -> PyTree:
    """Statistics and a head of several tasks, and a batch of them: magnitudes, but for rlax's sake small offsets."""
    tasks, batch = 4, 6
    shapes = dict.fromkeys(("scale", "offset"), (tasks,))
    numbers = draw.uniforms(
        key,
        settings.dtype,
        weight=(tasks, 5),
        bias=(tasks,),
        targets=(batch,),
        task=(batch,),
        step=(),
        bounds=(2,),
        **shapes,
    )
    scale = draw.magnitude(numbers["scale"])
    shift = scale * (draw.normal(numbers["offset"]) + 0.5)
    indices = (numbers["task"] * tasks).long().clamp(max=tasks - 1)
    targets = shift[indices] + scale[indices] * (draw.normal(numbers["targets"]) + 0.3)
    start = draw.statistics(shift, scale, torch.zeros_like(shift))
    head = {"weight": draw.normal(numbers["weight"]), "bias": draw.normal(numbers["bias"]) + 0.4}
    step_size = draw.log_between(1e-3, 1 / batch, numbers["step"])
    bounds = draw.bounds(numbers["bounds"])
    # rlax clamps the scale also of a task that has no target.
    start = start._replace(scale=start.scale.clamp(bounds["scale_lb"], bounds["scale_ub"]))
    return start, targets, indices, step_size, head, bounds


def _back(discrepancy: Discrepancy, keys: Tensor) -> Discrepancy:
    """JAX runs on the CPU here, whatever the device of the others."""
    return Discrepancy(*(field.to(keys.device) for field in discrepancy))


def _needs(*packages: str, extra: str) -> Callable[[Settings, torch.device], str | None]:
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
        "rlax",
        "art (sum) and pop = rlax.art and rlax.pop",
        "rlax",
        rlax_is_popart,
        over_lanes=True,
        architectures=(0,),
        why_not=_needs("jax", "rlax", extra="test"),
    ),
)
