"""Checks of the gradients that learners follow, and of optimizers' moments when POP changes the gradients' units."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import optree
import torch
from torch import Tensor, vmap
from torch.func import grad

from popart_func import optim, pop_art, random
from popart_func.optim import GradientTransformation
from popart_func.tree import PyTree
from popart_func.verify import by_hand, draw
from popart_func.verify.by_hand import Gradients, Layers, MeanVariance
from popart_func.verify.check import Check, Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare, unit_roundoff
from popart_func.verify.noise import Noise, amplify, compare_measured, measure, no_noise, roundings_per_disturbance
from popart_func.verify.problems import (
    HEAD,
    MakeLearner,
    Problem,
    draw_problem,
    drawn_statistics,
    learner_maker,
    masked_batch,
    start_by_hand,
    train,
)

__all__ = ["CHECKS"]

STEPS = 3
"""How many updates build up the optimizer's moments."""


def _recording(problem: Problem) -> GradientTransformation:
    """An optimizer that changes no parameter and whose state is the last gradients."""

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return {name: torch.zeros_like(value) for name, value in grads.items()}, grads

    return GradientTransformation(
        lambda params: {name: torch.zeros_like(value) for name, value in params.items()}, update
    )


def _gradient(make: MakeLearner, *, popped: bool) -> Callable[[Tensor, Settings], Discrepancy]:
    """A check that compares a learner's gradient with finite differences, along a random direction in each parameter.

    The loss by hand is ``½ ‖n − (y − μ')/σ'‖²`` with the (popped) head, and with the new statistics held fixed.
    """

    def compare_gradients(key: Tensor, settings: Settings) -> Discrepancy:
        first, second = random.split(key).unbind()
        problem = draw_problem(first, settings, steps=1, popped=popped)
        shapes = {name: tuple(value.shape) for name, value in problem.params.items()}
        uniform = draw.uniforms(second, settings.dtype, **shapes)
        directions = {name: draw.between(-1, 1, value).double() for name, value in uniform.items()}
        state, _ = train(problem, settings, make)
        got = {name: (state.opt_state[name].double() * directions[name]).sum() for name in problem.params}
        expected, errors = _finite_differences(problem, settings, popped, directions)

        def by_back_propagation(noise: Noise) -> dict[str, Tensor]:
            layers, statistics = _before_the_step(problem, settings, popped, noise)
            return by_hand.named(problem.params, _step_gradients(layers, problem, 0, settings, statistics, noise))

        _, terms = measure(by_back_propagation, problem.x, settings.dtype)
        count = roundings_per_disturbance(settings.architecture)
        one = count * unit_roundoff(settings.dtype)
        along = {name: directions[name].abs().sum() * terms[name] + errors[name] / one for name in terms}
        return compare(got, expected, along, count, settings.dtype)

    return compare_gradients


def _finite_differences(
    problem: Problem, settings: Settings, popped: bool, directions: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The derivatives of the loss along each direction, and their largest errors."""
    layers, statistics = _before_the_step(problem, settings, popped, no_noise)
    params = by_hand.named(problem.params, layers)
    loss = measure(lambda noise: _loss(params, problem, settings, statistics, noise), problem.x, torch.float64)
    rounding = roundings_per_disturbance(settings.architecture) * unit_roundoff(torch.float64) * loss.terms

    def along(name: str) -> Callable[[Tensor], Tensor]:
        def at(place: Tensor) -> Tensor:
            moved = {**params, name: params[name] + place * directions[name]}
            return _loss(moved, problem, settings, statistics, no_noise)

        return at

    found = {name: _derivative(along(name), rounding) for name in params}
    return {name: value for name, (value, _) in found.items()}, {name: error for name, (_, error) in found.items()}


def _before_the_step(problem: Problem, settings: Settings, popped: bool, noise: Noise) -> tuple[Layers, MeanVariance]:
    """The network and the statistics after ART, and POP if asked for, with the first batch."""
    layers, start = start_by_hand(problem, settings)
    batch = masked_batch(problem, 0, settings)
    new = by_hand.art(start, batch.y, batch.mask, problem.step_size.double(), noise)
    return ([*layers[:-1], by_hand.pop(layers[-1], start, new, noise)] if popped else layers), new


def _loss(
    params: dict[str, Tensor], problem: Problem, settings: Settings, statistics: MeanVariance, noise: Noise
) -> Tensor:
    """The loss by hand on the first batch, with fixed statistics."""
    batch = masked_batch(problem, 0, settings)
    _, outputs = by_hand.forward(by_hand.layers_of(params), batch.x, noise)
    error = noise(outputs - noise((batch.y - statistics.mean) / statistics.scale)) * batch.mask
    return 0.5 * error.square().sum() / batch.x.shape[0]


def _derivative(along: Callable[[Tensor], Tensor], error: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative at 0 by central differences of fourth order, and its largest error.

    ``D(h) = (8 (f(h) − f(−h)) − (f(2h) − f(−2h))) / 12h`` errs by ``h⁴ f⁽⁵⁾/30``, and by 16 times as much with twice
    the step. So ``D(h) − D(2h)`` is 15 times the error of D(h). ``D(2h) − D(4h)`` is 240 times the error, and counts in
    case the first difference vanishes by chance. The rounding error of f, ``error`` at 0 and in proportion elsewhere,
    enters with a factor of 1.5 / h.
    """
    h = 2.0**-10
    steps = h * torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, device=error.device)
    ahead, behind = vmap(along)(steps), vmap(along)(-steps)
    difference = (ahead - behind) / steps
    estimate = (4 * difference[:-1] - difference[1:]) / 6
    fine, coarse, coarser = estimate.unbind()
    largest = torch.maximum(ahead.amax(), behind.amax()) / along(torch.zeros_like(error))
    return fine, (fine - coarse).abs() + (coarse - coarser).abs() / 16 + 1.5 * error * largest / h


def _step_gradients(
    layers: Layers, problem: Problem, time: int, settings: Settings, statistics: MeanVariance, noise: Noise
) -> Gradients:
    """The gradients of the loss in normalized units, by back-propagation."""
    batch = masked_batch(problem, time, settings)
    hidden, outputs = by_hand.forward(layers, batch.x, noise)
    target = noise(noise(batch.y - statistics.mean) / statistics.scale)
    return by_hand.backward(layers, hidden, noise(outputs - target) * batch.mask / batch.x.shape[0], noise)


@check("no gradient flows into the statistics", "2016, Alg. 1")
def no_statistics_gradient(key: Tensor, settings: Settings) -> Discrepancy:
    """The gradient of new statistics in the targets, the old statistics and the step size is 0, to the bit."""
    problem = draw_problem(key, settings, steps=1)
    tasks = settings.architecture.tasks
    start = pop_art.init_state(tasks, dtype=settings.dtype, device=key.device)
    targets = problem.y[0].reshape(-1)[:, None].expand(-1, tasks)

    def total(targets: Tensor, before: dict[str, Tensor], step_size: Tensor) -> Tensor:
        new = pop_art.art(start._replace(**before), targets, step_size=step_size)
        return new.shift.sum() + new.scale.sum() + new.variance.sum() + new.residue.sum()

    before = {name: getattr(start, name) for name in ("shift", "scale", "variance", "residue")}
    got = optree.tree_leaves(grad(total, argnums=(0, 1, 2))(targets, before, problem.step_size))
    zeros = [torch.zeros_like(value) for value in got]
    return compare(got, zeros, zeros, 0, settings.dtype)


class _Moments(NamedTuple):
    """An optimizer with moments, and the formula of the moments: ``factor Σ decayⁿ gᵖ``, n the age of a gradient g.

    Attributes:
        optimizer: makes the optimizer with a problem's decays.
        weights: ``(factor, decay, power p)`` of each moment.
        read: reads the moments and the count of updates from the optimizer's state.
        roundings: the roundings of a moment, without those of its gradients. At each later step the first gradient is
            rescaled, decayed and added to. The ratio rounds once, its square again, and each product.
    """

    optimizer: Callable[[Problem], GradientTransformation]
    weights: Callable[[Problem], tuple[tuple[Tensor, Tensor, int], ...]]
    read: Callable[[PyTree], PyTree]
    roundings: int


_FACTOR = 3
"""Roundings of ``r² = (σ/σ')²``: the ratio's counts twice in the square, and the square rounds once."""


def _one(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.float64)


_MOMENTUM = _Moments(
    # With a learning rate of zero the network's function does not change, so that all its gradients are known.
    lambda problem: optim.sgd(0.0, momentum=problem.momentum),
    lambda problem: ((_one(problem.momentum), problem.momentum.double(), 1),),
    lambda opt_state: ((opt_state[0].trace,), opt_state[1].count),
    roundings=(STEPS - 1) * (_FACTOR + 1 + 2),
)
_ADAM = _Moments(
    lambda problem: optim.adam(0.0, b1=problem.momentum, b2=(1 + problem.momentum) / 2),
    lambda problem: (
        (1 - problem.momentum.double(), problem.momentum.double(), 1),
        (1 - ((1 + problem.momentum) / 2).double(), ((1 + problem.momentum) / 2).double(), 2),
    ),
    lambda opt_state: ((opt_state[0].mu, opt_state[0].nu), opt_state[0].count),
    # The second moment is rescaled by the factor twice. It also has a square and the factor 1 − b2, which rounds.
    roundings=(STEPS - 1) * (2 * (_FACTOR + 1) + 2) + 3,
)


def _moments(kind: _Moments) -> Callable[[Tensor, Settings], Discrepancy]:
    """A check that compares an optimizer's moments after some steps with weighted sums of the gradients.

    A rescaled moment sums gradients in the units of the last statistics, any other moment gradients in the units of
    their own time. ``rescale_moments="head"`` rescales the head's moments, ``"all"`` (with one task) all moments.
    """

    def compare_moments(key: Tensor, settings: Settings) -> Discrepancy:
        problem = draw_problem(key, settings, STEPS)
        got = []
        for rule in ("head", "all") if settings.architecture.tasks == 1 else ("head",):
            make = learner_maker("popart_learner", kind.optimizer, drawn_statistics, head=HEAD, rescale_moments=rule)
            got.append(kind.read(train(problem, settings, make)[0].opt_state))
        counted = torch.full((), STEPS, device=key.device)

        def expected(noise: Noise) -> list[PyTree]:
            return [(moments, counted) for moments in _moments_by_hand(problem, settings, kind, noise)[: len(got)]]

        return compare_measured(got, expected, problem.x, settings)

    return compare_moments


def _moments_by_hand(
    problem: Problem, settings: Settings, kind: _Moments, noise: Noise
) -> list[tuple[dict[str, Tensor], ...]]:
    """The moments where those of the head are rescaled, and where all are."""
    states = [
        MeanVariance(problem.shifts[time].double(), problem.scales[time].double().square()) for time in range(STEPS)
    ]
    last = [_gradients_in(states[-1], states, time, problem, settings, noise) for time in range(STEPS)]
    then = [_gradients_in(states[time], states, time, problem, settings, noise) for time in range(STEPS)]
    head_rescaled = [before[:-1] + after[-1:] for before, after in zip(then, last, strict=True)]
    own = amplify(noise, kind.roundings, settings.architecture)
    return [
        tuple(
            _weighted(history, factor, decay, power, problem, noise, own)
            for factor, decay, power in kind.weights(problem)
        )
        for history in (head_rescaled, last)
    ]


def _weighted(
    history: list[Gradients], factor: Tensor, decay: Tensor, power: int, problem: Problem, noise: Noise, own: Noise
) -> dict[str, Tensor]:
    """A moment as in `_Moments`, of each parameter; ``own`` is the noise of the moments' own roundings."""
    ages = torch.arange(STEPS - 1, -1, -1, device=problem.x.device)
    weights = factor * decay**ages

    def moment(leaves: list[Tensor]) -> Tensor:
        return own(torch.tensordot(weights, noise(torch.stack(leaves)) ** power, dims=1))

    layers = zip(*history, strict=True)
    return by_hand.named(
        problem.params, [(moment([w for w, _ in pairs]), moment([b for _, b in pairs])) for pairs in layers]
    )


def _gradients_in(
    units: MeanVariance, states: list[MeanVariance], time: int, problem: Problem, settings: Settings, noise: Noise
) -> Gradients:
    """The gradients of the batch at a time, in the units of some statistics, with the head popped to these at once."""
    layers, start = start_by_hand(problem, settings)
    weight, bias = by_hand.pop(layers[-1], start, units, noise)
    for state in states[: time + 1]:  # the bias has held each shift, and was rounded then
        bias = bias + (noise(state.mean) - state.mean) / units.scale
    return _step_gradients([*layers[:-1], (weight, bias)], problem, time, settings, units, noise)


CHECKS = (
    Check(
        "algorithm_1_gradient",
        "popart_learner's gradient = finite differences, statistics fixed, head popped",
        "2016, Alg. 1",
        _gradient(learner_maker("popart_learner", _recording, head=HEAD, rescale_moments=False), popped=True),
    ),
    Check(
        "art_gradient",
        "art_learner's gradient = finite differences, head not popped",
        "2016, sec. 3",
        _gradient(learner_maker("art_learner", _recording), popped=False),
    ),
    no_statistics_gradient,
    Check(
        "moments_momentum",
        "momentum after POP = that of the same gradients in the new units",
        "README",
        _moments(_MOMENTUM),
    ),
    Check(
        "moments_adam",
        "Adam's moments after POP = those of the same gradients in the new units",
        "README",
        _moments(_ADAM),
    ),
)
