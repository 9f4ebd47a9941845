"""Algorithms 1 and 2: each against itself written by hand, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from popart_func import learners, models, optim, random
from popart_func.learners import Batch, Info, Learner
from popart_func.optim import GradientTransformation
from popart_func.pop_art import PopArtState
from popart_func.tree import PyTree
from popart_func.verify import by_hand, draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare, sides, unit_roundoff, worst
from popart_func.verify.runs import HEAD, Make, Run, by_hand_run, draw_run, drawn_statistics, learner_of, sgd_of, train

__all__ = ["CHECKS"]

Statistics = Literal["running", "drawn", "fixed"]


def _against_hand(
    make: Make, *, popped: bool, normalized: bool, statistics: Statistics = "running"
) -> Callable[[Tensor, Settings], Discrepancy]:
    def check(key: Tensor, settings: Settings) -> Discrepancy:
        run = draw_run(key, settings, popped=popped or not normalized)
        if statistics == "fixed":  # errors are as large as the targets
            run = run._replace(learning_rate=run.learning_rate / run.magnitude.amax().clamp(min=1))
        _, got = train(run, settings, make)
        value, terms = by_hand.measure(
            lambda noise: by_hand_run(
                run, settings, noise, popped=popped, normalized=normalized, statistics=statistics
            ),
            run.x,
            settings.dtype,
        )
        count = sides(settings.dtype) * by_hand.roundings(settings.architecture)
        return compare(got, value, terms, count, settings.dtype)

    return check


def _proposition_3(
    optimizer: Callable[[Run], GradientTransformation], *, momentum: bool = False
) -> Callable[[Tensor, Settings], Discrepancy]:
    def check(key: Tensor, settings: Settings) -> Discrepancy:
        run = draw_run(key, settings)
        first, second = (
            _outside(train(run, settings, learner_of(name, optimizer, drawn_statistics, head=HEAD))[1])
            for name in ("popart_learner", "normalized_sgd_learner")
        )
        _, terms = by_hand.measure(
            lambda noise: _outside(
                by_hand_run(run, settings, noise, popped=False, normalized=False, statistics="drawn", momentum=momentum)
            ),
            run.x,
            settings.dtype,
        )
        # Both sides round. Algorithm 1 also where it pops a weight, twice, which is disturbed at each step as it is.
        return compare(first, second, terms, 2 * by_hand.roundings(settings.architecture), settings.dtype)

    return check


def _outside(result: dict[str, PyTree]) -> dict[str, PyTree]:
    """What Proposition 3 speaks of: not the head, whose units differ."""
    lower = {name: value for name, value in result["params"].items() if not name.startswith(f"{HEAD}.")}
    return {"lower": lower, "predictions": result["predictions"]}


def _sgd_learner(run: Run, time: int, settings: Settings) -> Learner:
    apply = models.stateless(draw.modules(settings.architecture).unified)
    return learners.sgd_learner(apply, sgd_of(run))


LEARNERS = (
    _sgd_learner,
    learner_of("art_learner"),
    learner_of("popart_learner", head=HEAD),
    learner_of("normalized_sgd_learner", head=HEAD),
)


def info_is_consistent(key: Tensor, settings: Settings) -> Discrepancy:
    """What each learner reports of a step, from its outputs and its statistics, thousands of scales away from 0."""
    architecture, dtype = settings.architecture, settings.dtype
    first, second = random.split(key).unbind()
    run = draw_run(first, settings, steps=1)
    numbers = draw.uniforms(second, dtype, **dict.fromkeys(("far", "sign", "residue"), (architecture.tasks,)))
    shift = run.magnitude * draw.log_between(1e2, 1e4, numbers["far"]) * torch.sign(numbers["sign"] - 0.4)
    residue = shift * unit_roundoff(dtype) * draw.between(-1, 1, numbers["residue"])
    x, y, *indices = run.batch(0, settings)
    there = y + (shift.expand(architecture.outputs)[indices[0]] if indices else shift)
    parts = []
    for make in LEARNERS:
        learner = make(run, 0, settings)
        start = learner.init(run.params)
        if make is not _sgd_learner:
            start = start._replace(statistics=draw.statistics(shift, run.magnitude, residue))
        batch = (x, y if make is _sgd_learner else there, *indices)
        state, info = learner.update(start, batch)
        parts.append(_compare_info(info, state.statistics, batch, make is not LEARNERS[-1], settings))
    return worst(*parts)


def _compare_info(
    info: Info, statistics: PopArtState, batch: Batch, normalized: bool, settings: Settings
) -> Discrepancy:
    """Roundings: ``(y − μ)/σ`` and ``σ n + μ`` three, ``σ |n − ỹ|`` two, or ``|f(x) − y|`` one.

    In the loss three for each square (its difference counts twice), one for each that is added, and a quotient.
    """
    shift, scale, residue = (field.double() for field in (statistics.shift, statistics.scale, statistics.residue))
    if len(batch) == 3 and shift.shape[0] > 1:
        shift, scale, residue = (field[batch[2]] for field in (shift, scale, residue))
    y, prediction = batch[1].double(), info.prediction.double()
    n, target = info.normalized_prediction.double(), info.normalized_target.double()
    loss = 0.5 * (n - target).square().sum() / max(settings.architecture.batch, 1)

    def near(got: Tensor, expected: Tensor, roundings: int, terms: Tensor | None = None) -> Discrepancy:
        terms = expected.abs() if terms is None else terms
        return compare(got, expected, terms, sides(settings.dtype) * roundings, settings.dtype)

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
        _against_hand(learner_of("popart_learner", head=HEAD), popped=True, normalized=True),
    ),
    Check(
        "art_alone",
        "art_learner = Algorithm 1 without POP, by hand",
        "2016, sec. 3",
        _against_hand(learner_of("art_learner"), popped=False, normalized=True),
    ),
    Check(
        "algorithm_2",
        "normalized_sgd_learner = Algorithm 2 by hand",
        "2016, Alg. 2",
        _against_hand(learner_of("normalized_sgd_learner", head=HEAD), popped=False, normalized=False),
    ),
    Check(
        "proposition_3",
        "Algorithms 1 and 2 agree for any scales and shifts, several outputs",
        "2016, Prop. 3",
        _proposition_3(sgd_of),
    ),
    Check(
        "proposition_3_momentum",
        "the same with momentum, the head's rescaled by POP",
        "README",
        _proposition_3(lambda run: optim.sgd(run.learning_rate, momentum=run.momentum), momentum=True),
    ),
    Check(
        "info",
        "what learners report: loss, error, and both in units and normalized",
        "README",
        info_is_consistent,
    ),
)
