"""Every check can fail: what it guards is broken, line by line, and exactly the checks that guard it go red."""

from __future__ import annotations

import __future__
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest

from popart_func import engines, learners, models, optim, pop_art, verify

# Two architectures are enough to break: several outputs with a statistic each, in batches; and two that share one.
SEEDS = [seed for seed in range(60) if seed % 4 in (1, 2)]

# These compare the library with itself in other surroundings, and take a compiler.
COMPILED = {"engine", "jax", "rlax"}

NETWORK = {"split_sgd", "split_momentum", "split_adam"}
LEARNED = {"proposition_3", "proposition_3_momentum"}
POPPED = {"algorithm_1", *LEARNED, "algorithm_1_gradient"}
HEADS = {"pop_preserves_outputs", "pop_composes", "fold_is_invariant"}
MOMENTS = {"moments_momentum", "moments_adam"}
RUNNING = {"weighted_moments", "batches", "sequential_batch", "sample_moments", "offsets"}
TRAINED = {"algorithm_1", "art_alone", "algorithm_2", "algorithm_1_gradient", "art_gradient"}
BOUND = {"bound_holds", "bound_is_reached"}


class Mutant(NamedTuple):
    """A line of a function, what it becomes, and who must notice."""

    function: Callable[..., object]
    line: str
    instead: str
    red: Iterable[str]


MUTANTS = {
    "the halves are put together without the head": Mutant(
        models.unify, "return {**lower, **upper}", "return {**lower, **{k: 0 * v for k, v in upper.items()}}", NETWORK
    ),
}


def mutate(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    """Puts the changed function wherever the package holds the original."""
    original = mutant.function
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    assert source.count(mutant.line) == 1, f"{original.__name__} has no such line any more: {mutant.line}"
    changed = source.replace(mutant.line, mutant.instead)
    code = compile(changed, original.__name__, "exec", flags=__future__.annotations.compiler_flag)
    scope: dict[str, object] = {}
    exec(code, vars(sys.modules[original.__module__]), scope)
    for name, module in list(sys.modules.items()):
        if name.startswith("popart_func"):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, scope[original.__name__])


def red(names: Iterable[str], seeds: Iterable[int] = SEEDS) -> set[str]:
    outcomes = verify.run(names, seeds=seeds)
    assert all(outcome.skipped is None for outcome in outcomes)
    return {outcome.check.name for outcome in outcomes if not outcome.passed}
