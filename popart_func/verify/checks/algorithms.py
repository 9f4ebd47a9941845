"""Checks of Algorithms 1 and 2: each against the same algorithm by hand, and against each other (Proposition 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from popart_func import learners, models, optim, random
from popart_func.learners import Batch, Info, Learner
from popart_func.optim import GradientTransformation
from popart_func.pop_art import PopArtState
from popart_func.tree import PyTree
from popart_func.verify import draw
from popart_func.verify.check import Check, Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare, rounding_sides, unit_roundoff, worst
from popart_func.verify.noise import compare_measured, measure, roundings_per_disturbance
from popart_func.verify.problems import (
    HEAD,
    MakeLearner,
    Problem,
    StatisticsKind,
    draw_problem,
    drawn_statistics,
    learner_maker,
    sgd_of,
    train,
    train_by_hand,
)

__all__ = ["CHECKS"]


def _against_hand(
    make: MakeLearner, *, popped: bool, normalized: bool, statistics: StatisticsKind = "running"
) -> Callable[[Tensor, Settings], Discrepancy]:
    """A check that compares a learner with `train_by_hand`, which explains the options."""

    def compare_with_hand(key: Tensor, settings: Settings) -> Discrepancy:
        problem = draw_problem(key, settings, popped=popped or not normalized)
        if statistics == "fixed":  # nothing normalizes the errors: they are as large as the targets
            problem = problem._replace(learning_rate=problem.learning_rate / problem.magnitude.amax().clamp(min=1))
        _, got = train(problem, settings, make)
        return compare_measured(
            got,
            lambda noise: train_by_hand(
                problem, settings, noise, popped=popped, normalized=normalized, statistics=statistics
            ),
            problem.x,
            settings,
        )

    return compare_with_hand


def _proposition_3(
    optimizer: Callable[[Problem], GradientTransformation], *, momentum: bool = False
) -> Callable[[Tensor, Settings], Discrepancy]:
    """A check that Algorithms 1 and 2 agree, with drawn statistics, on the lower layers and the predictions.

    Both sides round. Algorithm 1 also rounds twice where it pops a weight; the disturbance of the weight at each step
    covers that.
    """

    def compare_algorithms(key: Tensor, settings: Settings) -> Discrepancy:
        problem = draw_problem(key, settings)
        first, second = (
            _without_head(train(problem, settings, learner_maker(name, optimizer, drawn_statistics, head=HEAD))[1])
            for name in ("popart_learner", "normalized_sgd_learner")
        )
        _, terms = measure(
            lambda noise: _without_head(
                train_by_hand(
                    problem, settings, noise, popped=False, normalized=False, statistics="drawn", momentum=momentum
                )
            ),
            problem.x,
            settings.dtype,
        )
        return compare(first, second, terms, 2 * roundings_per_disturbance(settings.architecture), settings.dtype)

    return compare_algorithms


def _without_head(values: dict[str, PyTree]) -> dict[str, PyTree]:
    """The values that Proposition 3 is about. The algorithms' heads differ, since their units do."""
    lower = {name: value for name, value in values["params"].items() if not name.startswith(f"{HEAD}.")}
    return {"lower": lower, "predictions": values["predictions"]}


def _sgd_learner(problem: Problem, time: int, settings: Settings) -> Learner:
    apply = models.stateless(draw.modules(settings.architecture).unified)
    return learners.sgd_learner(apply, sgd_of(problem))


LEARNERS = (
    _sgd_learner,
    learner_maker("art_learner"),
    learner_maker("popart_learner", head=HEAD),
    learner_maker("normalized_sgd_learner", head=HEAD),
)


@check("a learner reports consistent loss, error, predictions and targets", "README")
def info(key: Tensor, settings: Settings) -> Discrepancy:
    """Each learner's `Info` follows from its outputs and statistics, also for shifts of 100 to 10,000 scales."""
    architecture, dtype = settings.architecture, settings.dtype
    first, second = random.split(key).unbind()
    problem = draw_problem(first, settings, steps=1)
    numbers = draw.uniforms(second, dtype, **dict.fromkeys(("far", "sign", "residue"), (architecture.tasks,)))
    shift = problem.magnitude * draw.log_between(1e2, 1e4, numbers["far"]) * torch.sign(numbers["sign"] - 0.4)
    residue = shift * unit_roundoff(dtype) * draw.between(-1, 1, numbers["residue"])
    x, y, *indices = problem.batch(0, settings)
    shifted = y + (shift.expand(architecture.outputs)[indices[0]] if indices else shift)
    parts = []
    for make in LEARNERS:
        learner = make(problem, 0, settings)
        start = learner.init(problem.params)
        if make is not _sgd_learner:
            start = start._replace(statistics=draw.statistics(shift, problem.magnitude, residue))
        batch = (x, y if make is _sgd_learner else shifted, *indices)
        state, report = learner.update(start, batch)
        parts.append(_compare_info(report, state.statistics, batch, make is not LEARNERS[-1], settings))
    return worst(*parts)


def _compare_info(
    info: Info, statistics: PopArtState, batch: Batch, normalized: bool, settings: Settings
) -> Discrepancy:
    """The discrepancy of the fields of an `Info`, each computed from the others; ``normalized``: as the outputs are.

    Roundings: three in ``(y − μ)/σ`` and in ``σ n + μ``, two in ``σ |n − ỹ|``, one in ``|f(x) − y|``. In the loss three
    for each square (its difference counts twice), one for each addition, and one for the quotient.
    """
    shift, scale, residue = (field.double() for field in (statistics.shift, statistics.scale, statistics.residue))
    if len(batch) == 3 and shift.shape[0] > 1:
        shift, scale, residue = (field[batch[2]] for field in (shift, scale, residue))
    y, prediction = batch[1].double(), info.prediction.double()
    n, target = info.normalized_prediction.double(), info.normalized_target.double()
    loss = 0.5 * (n - target).square().sum() / max(settings.architecture.batch, 1)

    def near(got: Tensor, expected: Tensor, roundings: int, terms: Tensor | None = None) -> Discrepancy:
        terms = expected.abs() if terms is None else terms
        return compare(got, expected, terms, rounding_sides(settings.dtype) * roundings, settings.dtype)

    def normalizes(got: Tensor, value: Tensor) -> Discrepancy:
        return near(got, ((value - shift) - residue) / scale, 3, ((value - shift).abs() + residue.abs()) / scale)

    parts = [near(info.target, y, 0), normalizes(info.normalized_target, y), near(info.loss, loss, 3 + n.numel())]
    if normalized:
        parts.append(near(info.prediction, (n * scale + residue) + shift, 3, (n * scale).abs() + shift.abs()))
        parts.append(near(info.error, scale * (n - target).abs(), 2))
    else:
        parts.append(normalizes(info.normalized_prediction, prediction))
        parts.append(near(info.error, (prediction - y).abs(), 1))
    return worst(*parts)


CHECKS = (
    Check(
        "sgd_alone",
        "sgd_learner = SGD on the raw targets, by hand, 5 steps",
        "2016, sec. 3",
        _against_hand(_sgd_learner, popped=False, normalized=True, statistics="fixed"),
    ),
    Check(
        "algorithm_1",
        "popart_learner = Algorithm 1 by hand, 5 steps",
        "2016, Alg. 1",
        _against_hand(learner_maker("popart_learner", head=HEAD), popped=True, normalized=True),
    ),
    Check(
        "art_alone",
        "art_learner = Algorithm 1 without POP, by hand",
        "2016, sec. 3",
        _against_hand(learner_maker("art_learner"), popped=False, normalized=True),
    ),
    Check(
        "algorithm_2",
        "normalized_sgd_learner = Algorithm 2 by hand",
        "2016, Alg. 2",
        _against_hand(learner_maker("normalized_sgd_learner", head=HEAD), popped=False, normalized=False),
    ),
    Check(
        "proposition_3",
        "Algorithms 1 and 2 agree for any scales and shifts, several outputs",
        "2016, Prop. 3",
        _proposition_3(sgd_of),
    ),
    Check(
        "proposition_3_momentum",
        "Algorithms 1 and 2 agree with momentum; POP rescales the head's",
        "README",
        _proposition_3(lambda problem: optim.sgd(problem.learning_rate, momentum=problem.momentum), momentum=True),
    ),
    info,
)
