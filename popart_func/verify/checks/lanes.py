"""Checks that lanes are independent of each other, and that every engine agrees with eager."""

from __future__ import annotations

import functools
from collections.abc import Callable

import optree
import torch
from torch import Tensor, vmap

from popart_func import engines, learners, models, optim, pop_art, tree
from popart_func.learners import Learner
from popart_func.tree import PyTree
from popart_func.verify import draw
from popart_func.verify.check import Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare
from popart_func.verify.noise import measure, roundings_per_disturbance
from popart_func.verify.problems import (
    HEAD,
    Problem,
    compared_values,
    draw_problem,
    learner_maker,
    train,
    train_by_hand,
)

__all__ = [
    "CHECKS",
    "compare_lanes",
    "draw_lanes",
    "engine_to_check",
    "initial_states",
    "lane_values",
    "learner_step",
    "popart_learner",
]

MOST_ALONE = 1000
"""The most seeds that run one after the other; each takes milliseconds, on any device."""

popart_learner = learner_maker("popart_learner", head=HEAD)


def draw_lanes(keys: Tensor, settings: Settings, steps: int) -> tuple[Problem, PyTree]:
    """The problems of all lanes, and for what `train` returns the terms that Algorithm 1 by hand measures."""

    def one(key: Tensor) -> tuple[Problem, PyTree]:
        problem = draw_problem(key, settings, steps)
        measured = measure(
            lambda noise: train_by_hand(problem, settings, noise, popped=True, normalized=True),
            problem.x,
            settings.dtype,
        )
        return problem, measured.terms

    return vmap(one)(keys)


def compare_lanes(got: PyTree, expected: PyTree, terms: PyTree, settings: Settings) -> Discrepancy:
    """The discrepancy of each lane, where both sides were computed in the dtype and round."""
    count = 2 * roundings_per_disturbance(settings.architecture)
    return vmap(lambda a, b, c: compare(a, b, c, count, settings.dtype))(got, expected, terms)


@check("a lane among others = its seed alone, without vmap", "README", over_lanes=True, most_seeds=MOST_ALONE)
def lane_alone(keys: Tensor, settings: Settings) -> Discrepancy:
    """A lane among all others equals the same learner without `torch.vmap`, one seed after the other."""
    problems, terms = draw_lanes(keys, settings, steps=1)
    together = vmap(lambda problem: train(problem, settings, popart_learner)[1])(problems)
    alone = tree.stack([train(problem, settings, popart_learner)[1] for problem in tree.unstack(problems)])
    return compare_lanes(together, alone, terms, settings)


@check("a lane's neighbours, NaN included, change no bit of it", "README", over_lanes=True)
def lane_neighbours(keys: Tensor, settings: Settings) -> Discrepancy:
    """Lanes whose neighbours turn to NaN equal, to the bit, the same lanes beside healthy neighbours."""
    problems = vmap(lambda key: draw_problem(key, settings, steps=2))(keys)
    experiment = vmap(lambda problem: train(problem, settings, popart_learner)[1])
    clean: PyTree = experiment(problems)
    lanes = torch.arange(keys.shape[0], device=keys.device)
    got: PyTree = clean
    for half in (0, 1):
        sick = lanes % 2 == half
        poisoned = problems._replace(y=torch.where(_like(sick, problems.y), torch.nan, problems.y))
        beside = experiment(poisoned)
        got = optree.tree_map(lambda a, b, sick=sick: torch.where(_like(sick, a), a, b), got, beside)  # type: ignore[arg-type]
    return vmap(lambda a, b: compare(a, b, b, 0, settings.dtype))(got, clean)


def _like(lanes: Tensor, tensor: Tensor) -> Tensor:
    """A number for each lane, in a shape that broadcasts with a tensor of all lanes."""
    return lanes.reshape(-1, *(1 for _ in tensor.shape[1:]))


@functools.cache
def learner_step(settings: Settings) -> Callable[..., tuple[learners.LearnerState, Tensor]]:
    """One step of Pop-Art SGD for the engines: all that differs from lane to lane is an argument of it.

    The same settings give the same function, so that an engine compiles it once for any number of calls.
    """

    def step(
        state: learners.LearnerState, batch: learners.Batch, hparams: dict[str, Tensor]
    ) -> tuple[learners.LearnerState, Tensor]:
        state, info = _learner(settings, **hparams).update(state, batch)
        return state, info.prediction

    return step


def _learner(settings: Settings, learning_rate: float | Tensor, step_size: float | Tensor) -> Learner:
    apply = models.stateless(draw.modules(settings.architecture).unified)
    statistics = pop_art.popart(settings.architecture.tasks, step_size, **draw.BOUNDS)
    return learners.popart_learner(apply, optim.sgd(learning_rate), statistics, head=HEAD)


def initial_states(problems: Problem, settings: Settings) -> learners.LearnerState:
    """The first state of each lane. It does not depend on the rates."""
    return vmap(_learner(settings, learning_rate=0.0, step_size=0.5).init)(problems.params)


def lane_values(problems: Problem, state: learners.LearnerState, predictions: Tensor, settings: Settings) -> PyTree:
    """`compared_values` of each lane, from the last states and the predictions ``[lanes, steps, ...]``."""
    return vmap(functools.partial(compared_values, settings=settings))(problems, state.params, predictions)


def engine_to_check(device: torch.device, engine: str = "auto") -> str:
    """The engine to compare with eager: the given one, or for ``"auto"`` the first that can run on the device."""
    if engine != "auto":
        return engine
    reasons = engines.available_engines(device)
    return next(name for name in engines.ENGINES if reasons[name] is None)


def _why_no_engine(settings: Settings, device: torch.device) -> str | None:
    name = engine_to_check(device, settings.engine)
    if name == "eager":
        reasons = (f"{name}: {why}" for name, why in engines.available_engines(device).items() if why is not None)
        return (
            "eager is the engine that the others are compared with" if settings.engine == "eager" else " ".join(reasons)
        )
    return engines.available_engines(device)[name]


@check(
    "a compiled engine = eager, 8 steps of Algorithm 1",
    "README",
    over_lanes=True,
    architectures=(0, 3),
    why_not=_why_no_engine,
)
def engine(keys: Tensor, settings: Settings) -> Discrepancy:
    """A scan over the steps of all lanes on a compiled engine equals the same scan on eager."""
    problems, terms = draw_lanes(keys, settings, steps=8)
    hparams = {"learning_rate": problems.learning_rate, "step_size": problems.step_size}
    batch = (problems.x, problems.y, problems.indices)[: 3 if settings.architecture.indexed else 2]
    xs = tuple(leaf.transpose(0, 1).contiguous() for leaf in batch)

    def run(name: str) -> PyTree:
        state, predictions = engines.scan_lanes(
            learner_step(settings), initial_states(problems, settings), xs, hparams=hparams, shared=False, engine=name
        )
        return lane_values(problems, state, predictions.transpose(0, 1), settings)

    return compare_lanes(run(engine_to_check(keys.device, settings.engine)), run("eager"), terms, settings)


CHECKS = (lane_alone, lane_neighbours, engine)
