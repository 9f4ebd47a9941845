"""Lanes do not touch each other, and every engine gives what `eager` gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import optree
import torch
from torch import Tensor, vmap

from popart_func import engines, learners, models, optim, pop_art, tree
from popart_func.learners import Learner
from popart_func.tree import PyTree
from popart_func.verify import by_hand, draw
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, compare
from popart_func.verify.runs import HEAD, Run, by_hand_run, draw_run, learner_of, result, train

__all__ = ["CHECKS", "compare_runs", "draw_runs", "engine_on", "start_of", "step_of"]

MOST_ALONE = 1000
"""How many seeds are run one after the other; that takes milliseconds each, on any device."""

popart_learner = learner_of("popart_learner", head=HEAD)


def draw_runs(keys: Tensor, settings: Settings, steps: int) -> tuple[Run, PyTree]:
    """Runs of all lanes, and the terms that Algorithm 1 by hand finds for what `train` returns of each."""

    def one(key: Tensor) -> tuple[Run, PyTree]:
        run = draw_run(key, settings, steps)
        measured = by_hand.measure(
            lambda noise: by_hand_run(run, settings, noise, popped=True, normalized=True), run.x, settings.dtype
        )
        return run, measured.terms

    return vmap(one)(keys)


def compare_runs(got: PyTree, expected: PyTree, terms: PyTree, settings: Settings) -> Discrepancy:
    """Lane by lane; both sides round."""
    count = 2 * by_hand.roundings(settings.architecture)
    return vmap(lambda a, b, c: compare(a, b, c, count, settings.dtype))(got, expected, terms)


def lane_alone(keys: Tensor, settings: Settings) -> Discrepancy:
    """A lane among all others, against the same learner without `torch.vmap`, one seed after the other."""
    runs, terms = draw_runs(keys, settings, steps=1)
    together = vmap(lambda run: train(run, settings, popart_learner)[1])(runs)
    alone = tree.stack([train(run, settings, popart_learner)[1] for run in tree.unstack(runs)])
    return compare_runs(together, alone, terms, settings)


def lane_neighbours(keys: Tensor, settings: Settings) -> Discrepancy:
    """Half of the lanes beside neighbours that turn to NaN, against the same lanes beside healthy ones: to the bit."""
    runs = vmap(lambda key: draw_run(key, settings, steps=2))(keys)
    experiment = vmap(lambda run: train(run, settings, popart_learner)[1])
    clean: PyTree = experiment(runs)
    lanes = torch.arange(keys.shape[0], device=keys.device)
    got: PyTree = clean
    for half in (0, 1):
        sick = lanes % 2 == half
        poisoned = runs._replace(y=torch.where(_like(sick, runs.y), torch.nan, runs.y))
        beside = experiment(poisoned)
        got = optree.tree_map(lambda a, b, sick=sick: torch.where(_like(sick, a), a, b), got, beside)  # type: ignore[arg-type]
    return vmap(lambda a, b: compare(a, b, b, 0, settings.dtype))(got, clean)


def _like(lanes: Tensor, tensor: Tensor) -> Tensor:
    return lanes.reshape(-1, *(1 for _ in tensor.shape[1:]))


@functools.cache
def step_of(settings: Settings) -> Callable[..., tuple[learners.LearnerState, Tensor]]:
    """One step of Pop-Art SGD for the engines: everything that differs from lane to lane comes as an argument.

    The same function for the same settings, so that an engine compiles it once, for however many calls.
    """
    apply = models.stateless(draw.modules(settings.architecture).unified)

    def step(
        state: learners.LearnerState, batch: learners.Batch, hparams: dict[str, Tensor]
    ) -> tuple[learners.LearnerState, Tensor]:
        learner = _learner(apply, hparams, settings)
        state, info = learner.update(state, batch)
        return state, info.prediction

    return step


def _learner(apply: learners.Apply, hparams: dict[str, Tensor], settings: Settings) -> Learner:
    statistics = pop_art.popart(settings.architecture.tasks, hparams["step_size"], **draw.BOUNDS)
    return learners.popart_learner(apply, optim.sgd(hparams["learning_rate"]), statistics, head=HEAD)


def start_of(runs: Run, settings: Settings) -> learners.LearnerState:
    """The first state of each lane."""
    apply = models.stateless(draw.modules(settings.architecture).unified)
    learner = learners.popart_learner(
        apply, optim.sgd(0.0), pop_art.popart(settings.architecture.tasks, 0.5), head=HEAD
    )
    return vmap(learner.init)(runs.params)


def engine_is_eager(keys: Tensor, settings: Settings) -> Discrepancy:
    """A scan over the steps of all lanes on a compiled engine, against the same on `eager`."""
    steps = 8
    runs, terms = draw_runs(keys, settings, steps)
    hparams = {"learning_rate": runs.learning_rate, "step_size": runs.step_size}
    batch = (runs.x, runs.y, runs.indices) if settings.architecture.indexed else (runs.x, runs.y)
    xs = tuple(leaf.transpose(0, 1).contiguous() for leaf in batch)
    results = []
    for engine in (engine_on(keys.device, settings.engine), "eager"):
        state, predictions = engines.scan_lanes(
            step_of(settings), start_of(runs, settings), xs, hparams=hparams, shared=False, engine=engine
        )
        results.append(
            vmap(lambda run, state, ys: result(run, state, ys, settings))(runs, state, predictions.transpose(0, 1))
        )
    return compare_runs(results[0], results[1], terms, settings)


def engine_on(device: torch.device, engine: str = "auto") -> str:
    """The engine that is held against `eager`: the one that is asked for, or the first that can run on a device."""
    if engine != "auto":
        return engine
    reasons = engines.available_engines(device)
    return next(name for name in engines.ENGINES if reasons[name] is None)


def _why_no_engine(settings: Settings, device: torch.device) -> str | None:
    name = engine_on(device, settings.engine)
    if name == "eager":
        reasons = (f"{name}: {why}" for name, why in engines.available_engines(device).items() if why is not None)
        return "eager is what the others are held against" if settings.engine == "eager" else " ".join(reasons)
    return engines.available_engines(device)[name]


CHECKS = (
    Check(
        "lane_alone",
        "a lane among others = its seed alone, without vmap",
        "README",
        lane_alone,
        over_lanes=True,
        most_seeds=MOST_ALONE,
    ),
    Check(
        "lane_neighbours",
        "a lane's neighbours, NaN included, change no bit of it",
        "README",
        lane_neighbours,
        over_lanes=True,
    ),
    Check(
        "engine",
        "a compiled engine = eager, 8 steps of Algorithm 1",
        "README",
        engine_is_eager,
        over_lanes=True,
        architectures=(0, 3),
        why_not=_why_no_engine,
    ),
)
