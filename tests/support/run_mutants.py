"""Runs the checks on every mutant and prints which fail, as JSON.

It is a program of its own, so that annotations are not enforced: they would be enforced anew on every closure that a
learner makes. The result is a dict from the names of mutants to the failing checks; ``""`` is the library as it is,
and the names of `SURROUNDINGS` have the prefix ``"surroundings: "``.

Four things save time. A mutant is run only on the checks that reach its part. A check stops at the first architecture
whose seeds fail. A check that must stay green runs on two of its architectures, which differ from mutant to mutant. And
there is one process for each core.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence

import pytest
import torch
from mutants import MUTANTS
from mutation import mutate, observe
from surroundings import OTHERS, SINGLE, SURROUNDINGS

from popart_func import verify
from popart_func.learners import algorithms
from popart_func.verify.checks import lanes, other_libraries

SEEDS = range(40)
"""Eight of each architecture."""


def fails(name: str, chosen: Sequence[int] = range(5)) -> bool:
    """Whether a check fails for any of the seeds of some of its architectures; by default of all."""
    kinds = len(verify.CHECKS[name].architectures)
    groups = ([seed for seed in SEEDS if seed % kinds == kind] for kind in {one % kinds for one in chosen})
    return any(verify.run(name, seeds=seeds)[0].passed is False for seeds in groups)


def red(names: Iterable[str]) -> list[str]:
    """The checks that fail."""
    return sorted(filter(fails, names))


def survey() -> tuple[list[str], dict[str, list[str]]]:
    """Runs the checks on the library as it is: those that fail, and for each mutant those that reach its part."""
    reached: set[str] = set()
    reaching: dict[str, list[str]] = {name: [] for name in MUTANTS}
    failing = []
    with pytest.MonkeyPatch.context() as patch:
        observe(patch, MUTANTS, reached)
        for check in SINGLE:
            reached.clear()
            failing += red([check])
            for name in reached:
                reaching[name].append(check)
    return failing, reaching


def run_mutant(task: tuple[str, list[str]]) -> tuple[str, list[str]]:
    """A mutant's name, and which of some checks fail on it."""
    name, checks = task
    place = list(MUTANTS).index(name)
    two = place, place + 1
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch, MUTANTS[name])
        return name, [check for check in checks if (fails(check) if check in MUTANTS[name].red else fails(check, two))]


def run_surroundings(name: str) -> list[str]:
    """Which checks fail in changed surroundings."""
    change, checks, _ = SURROUNDINGS[name]
    for compiled in (lanes.learner_step, other_libraries.lanes_in_jax, other_libraries.bridged_gradients):
        compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        return red(checks)


def main() -> None:
    torch.set_num_threads(1)  # before the processes part: a copy of a process lacks its threads
    # It would refuse some mutants of the networks before a check has seen them: what is asked is whether a check does.
    algorithms.check_preservation = lambda *_: None
    failing, reaching = survey()
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = pool.imap_unordered(run_mutant, reaching.items())
        found = {f"surroundings: {name}": run_surroundings(name) for name in SURROUNDINGS}
        found[""] = failing + red(OTHERS)
        found |= results
    print(json.dumps(found))


if __name__ == "__main__":
    main()
