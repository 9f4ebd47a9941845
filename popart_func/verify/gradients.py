"""What the learners differentiate, and what becomes of an optimizer's moments when the units of gradients change."""

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
from popart_func.verify.by_hand import Gradients, Layers, Noise, Statistics
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, sides, unit_roundoff
from popart_func.verify.runs import (
    HEAD,
    Make,
    Run,
    data_of,
    draw_run,
    drawn_statistics,
    learner_of,
    train,
)

__all__ = ["CHECKS"]

STEPS = 3
"""Updates that leave moments to be rescaled."""


def _recording(run: Run) -> GradientTransformation:
    """An optimizer that changes nothing and keeps the gradients as its state."""

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return {name: torch.zeros_like(value) for name, value in grads.items()}, grads

    return GradientTransformation(
        lambda params: {name: torch.zeros_like(value) for name, value in params.items()}, update
    )


def _gradient(make: Make, *, popped: bool) -> Callable[[Tensor, Settings], Discrepancy]:
    """A learner's gradient along a random direction in each parameter, against finite differences.

    The loss by hand: ``½ ‖n − (y − μ')/σ'‖²`` of the (popped) head, with the new statistics held fixed.
    """

    def check(key: Tensor, settings: Settings) -> Discrepancy:
        first, second = random.split(key).unbind()
        run = draw_run(first, settings, steps=1, popped=popped)
        shapes = {name: tuple(value.shape) for name, value in run.params.items()}
        uniform = draw.uniforms(second, settings.dtype, **shapes)
        directions = {name: draw.between(-1, 1, value).double() for name, value in uniform.items()}
        state, _ = train(run, settings, make)
        got = {name: (state.opt_state[name].double() * directions[name]).sum() for name in run.params}
        expected, errors = _finite_differences(run, settings, popped, directions)

        def by_back_propagation(noise: Noise) -> dict[str, Tensor]:
            layers, statistics = _before_the_step(run, settings, popped, noise)
            return by_hand.named(run.params, _step_gradients(layers, run, 0, settings, statistics, noise))

        _, terms = by_hand.measure(by_back_propagation, run.x, settings.dtype)
        count = by_hand.roundings(settings.architecture)
        one = count * unit_roundoff(settings.dtype)
        along = {name: directions[name].abs().sum() * terms[name] + errors[name] / one for name in terms}
        return compare(got, expected, along, count, settings.dtype)

    return check


def _finite_differences(
    run: Run, settings: Settings, popped: bool, directions: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The derivatives of the loss along each direction, and what they may be off by."""
    layers, statistics = _before_the_step(run, settings, popped, by_hand.silent)
    params = by_hand.named(run.params, layers)
    loss = by_hand.measure(lambda noise: _loss(params, run, settings, statistics, noise), run.x, torch.float64)
    rounding = by_hand.roundings(settings.architecture) * unit_roundoff(torch.float64) * loss.terms

    def along(name: str) -> Callable[[Tensor], Tensor]:
        def at(place: Tensor) -> Tensor:
            moved = {**params, name: params[name] + place * directions[name]}
            return _loss(moved, run, settings, statistics, by_hand.silent)

        return at

    found = {name: _derivative(along(name), rounding) for name in params}
    return {name: value for name, (value, _) in found.items()}, {name: error for name, (_, error) in found.items()}


def _before_the_step(run: Run, settings: Settings, popped: bool, noise: Noise) -> tuple[Layers, Statistics]:
    """ART and, where asked for, POP of the first batch."""
    layers, start = _start(run, settings)
    data = data_of(run, 0, settings)
    new = by_hand.art(start, data.y, data.mask, run.step_size.double(), noise)
    return ([*layers[:-1], by_hand.pop(layers[-1], start, new, noise)] if popped else layers), new


def _start(run: Run, settings: Settings) -> tuple[Layers, Statistics]:
    """The network, and the statistics that normalize nothing yet."""
    ones = torch.ones(settings.architecture.tasks, dtype=torch.float64, device=run.x.device)
    return by_hand.layers_of(run.params), Statistics(torch.zeros_like(ones), ones)


def _loss(params: dict[str, Tensor], run: Run, settings: Settings, statistics: Statistics, noise: Noise) -> Tensor:
    data = data_of(run, 0, settings)
    _, outputs = by_hand.forward(by_hand.layers_of(params), data.x, noise)
    error = noise(outputs - noise((data.y - statistics.mean) / statistics.scale)) * data.mask
    return 0.5 * error.square().sum() / data.x.shape[0]


def _derivative(along: Callable[[Tensor], Tensor], error: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative at 0 by central differences of fourth order, and the error they may have.

    ``D(h) = (8 (f(h) − f(−h)) − (f(2h) − f(−2h))) / 12h`` errs by ``h⁴ f⁽⁵⁾/30``, 16 times as much with twice the step:
    ``D(h) − D(2h)`` is 15 times the error of D(h), and ``D(2h) − D(4h)`` 240 times, should the first vanish by chance.
    What rounding does to f counts 1.5 times, over h: ``error`` at 0, and in proportion where f is larger.
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
    layers: Layers, run: Run, time: int, settings: Settings, statistics: Statistics, noise: Noise
) -> Gradients:
    """Of the loss in normalized units, by back-propagation."""
    data = data_of(run, time, settings)
    hidden, outputs = by_hand.forward(layers, data.x, noise)
    target = noise(noise(data.y - statistics.mean) / statistics.scale)
    return by_hand.backward(layers, hidden, noise(outputs - target) * data.mask / data.x.shape[0], noise)


def statistics_carry_no_gradient(key: Tensor, settings: Settings) -> Discrepancy:
    """Neither targets nor the statistics before nor a step size reach the new statistics: zero, to the bit."""
    run = draw_run(key, settings, steps=1)
    tasks = settings.architecture.tasks
    start = pop_art.init_state(tasks, dtype=settings.dtype, device=key.device)
    targets = run.y[0].reshape(-1)[:, None].expand(-1, tasks)

    def total(targets: Tensor, before: dict[str, Tensor], step_size: Tensor) -> Tensor:
        new = pop_art.art(start._replace(**before), targets, step_size=step_size)
        return new.shift.sum() + new.scale.sum() + new.variance.sum() + new.residue.sum()

    before = {name: getattr(start, name) for name in ("shift", "scale", "variance", "residue")}
    got = optree.tree_leaves(grad(total, argnums=(0, 1, 2))(targets, before, run.step_size))
    zeros = [torch.zeros_like(value) for value in got]
    return compare(got, zeros, zeros, 0, settings.dtype)


class _Moments(NamedTuple):
    """An optimizer, and by hand what it keeps of a history.

    Attributes:
        optimizer: with a run's decays.
        kept: ``(factor, decay, power)`` of each moment.
        read: the moments out of its state, and how many updates it counts.
        roundings: of a moment, after those of its gradients: the first is rescaled, decayed and added to at each later
            step. With a factor of r², the ratio rounds once and its square again, and so does each product.
    """

    optimizer: Callable[[Run], GradientTransformation]
    kept: Callable[[Run], tuple[tuple[Tensor, Tensor, int], ...]]
    read: Callable[[PyTree], PyTree]
    roundings: int


_FACTOR = 3
"""Roundings of ``r² = (σ/σ')²``: the ratio counts twice in its square, and the square once."""


def _one(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.float64)


_MOMENTUM = _Moments(
    # A learning rate of zero: the network's function stands still, and the history is known.
    lambda run: optim.sgd(0.0, momentum=run.momentum),
    lambda run: ((_one(run.momentum), run.momentum.double(), 1),),
    lambda opt_state: ((opt_state[0].trace,), opt_state[1].count),
    roundings=(STEPS - 1) * (_FACTOR + 1 + 2),
)
_ADAM = _Moments(
    lambda run: optim.adam(0.0, b1=run.momentum, b2=(1 + run.momentum) / 2),
    lambda run: (
        (1 - run.momentum.double(), run.momentum.double(), 1),
        (1 - ((1 + run.momentum) / 2).double(), ((1 + run.momentum) / 2).double(), 2),
    ),
    lambda opt_state: ((opt_state[0].mu, opt_state[0].nu), opt_state[0].count),
    # The second moment takes the factor twice, and has a square and its own factor, 1 − b2, which rounds.
    roundings=(STEPS - 1) * (2 * (_FACTOR + 1) + 2) + 3,
)


def _moments(kind: _Moments) -> Callable[[Tensor, Settings], Discrepancy]:
    """The moments after some steps, against the weighted sums of gradients that are all in the last statistics' units.

    Those of the head always; those below it where one statistic is shared and they follow (``"all"``), else each
    gradient in the units of its own time.
    """

    def check(key: Tensor, settings: Settings) -> Discrepancy:
        run = draw_run(key, settings, STEPS)
        got = []
        for rule in ("head", "all") if settings.architecture.tasks == 1 else ("head",):
            make = learner_of("popart_learner", kind.optimizer, drawn_statistics, head=HEAD, rescale_moments=rule)
            got.append(kind.read(train(run, settings, make)[0].opt_state))
        value, terms = by_hand.measure(
            lambda noise: _moments_by_hand(run, settings, kind, noise)[: len(got)], run.x, settings.dtype
        )
        counted = torch.full((), STEPS, device=key.device)
        value, terms = ([(moments, counted) for moments in each] for each in (value, terms))
        count = sides(settings.dtype) * by_hand.roundings(settings.architecture)
        return compare(got, value, terms, count, settings.dtype)

    return check


def _moments_by_hand(run: Run, settings: Settings, kind: _Moments, noise: Noise) -> list[tuple[dict[str, Tensor], ...]]:
    """The moments where those of the head follow, and where all do."""
    states = [Statistics(run.shifts[time].double(), run.scales[time].double().square()) for time in range(STEPS)]
    last = [_gradients_in(states[-1], states, time, run, settings, noise) for time in range(STEPS)]
    then = [_gradients_in(states[time], states, time, run, settings, noise) for time in range(STEPS)]
    head_follows = [before[:-1] + after[-1:] for before, after in zip(then, last, strict=True)]
    own = by_hand.louder(noise, kind.roundings, settings.architecture)
    return [
        tuple(_weighted(history, factor, decay, power, run, noise, own) for factor, decay, power in kind.kept(run))
        for history in (head_follows, last)
    ]


def _weighted(
    history: list[Gradients], factor: Tensor, decay: Tensor, power: int, run: Run, noise: Noise, own: Noise
) -> dict[str, Tensor]:
    """``factor Σ decayⁿ gᵖ``, n the age of a gradient; ``own`` is the noise of the moments."""
    ages = torch.arange(STEPS - 1, -1, -1, device=run.x.device)
    weights = factor * decay**ages

    def moment(leaves: list[Tensor]) -> Tensor:
        return own(torch.tensordot(weights, noise(torch.stack(leaves)) ** power, dims=1))

    layers = zip(*history, strict=True)
    return by_hand.named(
        run.params, [(moment([w for w, _ in pairs]), moment([b for _, b in pairs])) for pairs in layers]
    )


def _gradients_in(
    units: Statistics,
    states: list[Statistics],
    time: int,
    run: Run,
    settings: Settings,
    noise: Noise,
) -> Gradients:
    """The gradients of a batch in the units of some statistics, with the head popped straight to them."""
    layers, start = _start(run, settings)
    weight, bias = by_hand.pop(layers[-1], start, units, noise)
    for state in states[: time + 1]:  # each has been in the bias, and rounded there
        bias = bias + (noise(state.mean) - state.mean) / units.scale
    return _step_gradients([*layers[:-1], (weight, bias)], run, time, settings, units, noise)


CHECKS = (
    Check(
        "algorithm_1_gradient",
        "popart_learner's gradient = finite differences, statistics fixed, head popped",
        "2016, Alg. 1",
        _gradient(learner_of("popart_learner", _recording, head=HEAD), popped=True),
    ),
    Check(
        "art_gradient",
        "art_learner's gradient = the same, head left",
        "2016, sec. 3",
        _gradient(learner_of("art_learner", _recording), popped=False),
    ),
    Check(
        "no_statistics_gradient",
        "no gradient flows into the statistics",
        "2016, Alg. 1",
        statistics_carry_no_gradient,
    ),
    Check(
        "moments_momentum",
        "momentum after POP = that of the same gradients in the new units",
        "README",
        _moments(_MOMENTUM),
    ),
    Check("moments_adam", "the same for both moments of Adam", "README", _moments(_ADAM)),
)
