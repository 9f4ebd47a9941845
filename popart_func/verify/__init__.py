"""The claims of the papers, of the split network and of this library, each a check over thousands of random seeds.

>>> outcome, = run("pop_preserves_outputs", seeds=range(100))
>>> outcome.passed, len(outcome.seeds)
(True, 100)
>>> again, = run("pop_preserves_outputs", seeds=[outcome.worst_seed])  # the worst seed, alone

A check is a pure function of a key: it draws a network, data and statistics of any magnitude, computes one thing in two
ways, by the library and independently of it, and returns how far apart they are (`Discrepancy`), so that
``torch.vmap(check)(keys)`` is the experiment. Seed s has the key `random.key(s)`, in whatever company it runs.

What is allowed comes from the dtype and the operations, and stands with its reason beside each check: a difference
is measured relative to the terms that were added up, where one rounding costs half an eps, and their number is counted;
of the running statistics each update's roundings are followed to the end (`running.follow`); what many steps of a
network make of roundings is measured by disturbing it (`by_hand.measure`), which is no bound but an estimate.

Checks: `networks` (split and unified), `heads` (Proposition 1), `statistics` (Proposition 2, the running moments),
`algorithms` (Algorithms 1 and 2, Proposition 3), `optimizers`, `gradients` (and an optimizer's moments), `lanes` (and
engines), `peers` (JAX, rlax). `report` makes a table and JSON of outcomes, `plot` a figure.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor, vmap

from popart_func import random
from popart_func.verify import algorithms, gradients, heads, lanes, networks, optimizers, peers, statistics
from popart_func.verify.check import Check, Settings
from popart_func.verify.discrepancy import Discrepancy, ratio
from popart_func.verify.draw import ARCHITECTURES

__all__ = ["CHECKS", "Check", "Discrepancy", "Outcome", "Settings", "run"]

CHECKS: dict[str, Check] = {
    check.name: check
    for module in (networks, heads, statistics, algorithms, optimizers, gradients, lanes, peers)
    for check in module.CHECKS
}
"""Every check by name, in the order in which they are reported."""

CHUNK = {"cpu": 1024, "cuda": 16384}
"""How many seeds run at once: enough to hide what a call costs, few enough to stay in a cache, or in memory."""


class Outcome(NamedTuple):
    """What a check found, over all its seeds.

    Attributes:
        check: the claim.
        seeds: those that ran, in the order in which they were given.
        discrepancy: of each of them, fields ``[seeds]`` on the CPU.
        seconds: how long it took.
        skipped: why it did not run, or None. Then nothing is known, and `passed` is None.
    """

    check: Check
    seeds: list[int]
    discrepancy: Discrepancy
    seconds: float
    skipped: str | None = None

    @property
    def ratios(self) -> Tensor:
        """Each seed's error over what is allowed: at most 1, or the claim is broken."""
        return ratio(self.discrepancy.error, self.discrepancy.allowed)

    @property
    def worst(self) -> int | None:
        """The position of the seed with the largest ratio."""
        return int(self.ratios.argmax()) if self.seeds else None

    @property
    def worst_seed(self) -> int | None:
        """The seed with the largest ratio."""
        return None if self.worst is None else self.seeds[self.worst]

    @property
    def passed(self) -> bool | None:
        """Whether every seed's error is allowed; None if the check was skipped."""
        return bool((self.ratios <= 1).all()) if self.seeds else None


def run(
    checks: str | Iterable[str] | None = None,
    *,
    seeds: Iterable[SupportsIndex] = range(1000),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    engine: str = "auto",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Outcome]:
    """Runs checks over seeds.

    Args:
        checks: names among `CHECKS`; by default all.
        seeds: integers from 0 to 2**32 − 1. A check that runs its seeds one by one takes the first of them.
        dtype: float32 or float64: what the library computes in.
        device: where.
        engine: the one that the check ``"engine"`` holds against `eager`; ``"auto"`` is the first that can run.
        on_progress: called with a check's name, how many of its seeds are done, and how many there are.

    Returns:
        One outcome for each check. A check that can't run here is skipped, with the reason.

    Raises:
        TypeError: seeds that are not integers.
        ValueError: unknown checks, no seeds or seeds out of range, another dtype.

    >>> [outcome.passed for outcome in run(["bound_holds", "bound_is_reached"], seeds=range(20), dtype=torch.float64)]
    [True, True]
    """
    chosen = _checked_names(checks)
    numbers = _checked_seeds(seeds)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"run: `dtype` must be torch.float32 or torch.float64, got {dtype}.")
    settings, place = Settings(dtype=dtype, engine=engine), torch.device(device)
    with _one_thread():
        return [_run(CHECKS[name], numbers, settings, place, on_progress) for name in chosen]


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one CPU thread: with tensors as small as these, several spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(
    check: Check,
    seeds: list[int],
    settings: Settings,
    device: torch.device,
    on_progress: Callable[[str, int, int], None] | None,
) -> Outcome:
    reason = check.why_not(settings, device)
    if reason is not None:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Outcome(check, [], Discrepancy(*[nothing] * len(Discrepancy._fields)), 0.0, reason)
    seeds = seeds[: check.most_seeds]
    begin = time.perf_counter()
    parts: list[Discrepancy] = []
    order: list[int] = []
    for kind, architecture in enumerate(check.architectures):
        group = [place for place, seed in enumerate(seeds) if seed % len(check.architectures) == kind]
        chunk = CHUNK.get(device.type, CHUNK["cpu"])
        for first in range(0, len(group), chunk):
            if on_progress is not None:
                on_progress(check.name, len(order), len(seeds))
            some = group[first : first + chunk]
            keys = vmap(random.key)(torch.tensor([seeds[place] for place in some], device=device))
            found = check(keys, settings._replace(architecture=ARCHITECTURES[architecture]))
            parts.append(Discrepancy(*(field.detach().cpu() for field in found)))
            order += some
    if on_progress is not None:
        on_progress(check.name, len(order), len(seeds))
    in_turn = torch.tensor(order).argsort()
    together = Discrepancy(*(torch.cat(fields)[in_turn] for fields in zip(*parts, strict=True)))
    return Outcome(check, seeds, together, time.perf_counter() - begin)


def _checked_names(checks: str | Iterable[str] | None) -> list[str]:
    names = list(CHECKS) if checks is None else [checks] if isinstance(checks, str) else list(dict.fromkeys(checks))
    for name in names:
        if name not in CHECKS:
            raise ValueError(f"run: `checks` must be among {list(CHECKS)}, got {name!r}.")
    return names


def _checked_seeds(seeds: Iterable[SupportsIndex]) -> list[int]:
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise TypeError(f"run: `seeds` must be an iterable of integers, such as range(1000), got {seeds!r}.") from None
    if not numbers or not all(0 <= number < 2**32 for number in numbers):
        got = "none" if not numbers else next(number for number in numbers if not 0 <= number < 2**32)
        raise ValueError(f"run: `seeds` must hold integers from 0 to 2**32 - 1, got {got}.")
    return numbers
