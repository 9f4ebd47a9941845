"""Running checks: `run` takes checks and seeds and returns an `Outcome` for each check."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor, vmap

from popart_func import random
from popart_func.verify.check import Check, Settings
from popart_func.verify.checks import CHECKS
from popart_func.verify.discrepancy import Discrepancy, ratio
from popart_func.verify.draw import ARCHITECTURES

__all__ = ["CHUNK", "Outcome", "run"]

CHUNK = {"cpu": 1024, "cuda": 16384}
"""How many seeds run at once: enough to hide the overhead of a call, few enough to fit into a cache or into memory."""


class Outcome(NamedTuple):
    """The result of a check over all its seeds.

    Attributes:
        check: the check that ran.
        seeds: the seeds that ran, in the order in which they were given.
        discrepancy: the discrepancy of each seed, fields ``[seeds]`` on the CPU.
        seconds: the duration.
        skipped: the reason why the check did not run, or None. `passed` is None for a skipped check.
    """

    check: Check
    seeds: list[int]
    discrepancy: Discrepancy
    seconds: float
    skipped: str | None = None

    @property
    def ratios(self) -> Tensor:
        """Each seed's error divided by the allowed error; above 1 the claim is broken."""
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
        """Whether every seed's error is within the allowed error; None if the check was skipped."""
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
        checks: names of checks, keys of `CHECKS`; by default all.
        seeds: integers from 0 to 2**32 − 1. A check that runs its seeds one by one takes the first `Check.most_seeds`.
        dtype: float32 or float64, the dtype that the library computes in.
        device: the device to run on.
        engine: the engine that the check ``"engine"`` compares with eager; ``"auto"`` is the first that can run.
        on_progress: called with a check's name, the number of its seeds that are done, and the number of its seeds.

    Returns:
        One outcome for each check. A check that can't run here is skipped, with the reason.

    Raises:
        TypeError: seeds that are not integers.
        ValueError: unknown checks, no seeds, seeds out of range, or another dtype.

    >>> [outcome.passed for outcome in run(["bound_holds", "bound_is_reached"], seeds=range(20), dtype=torch.float64)]
    [True, True]
    """
    names = _checked_names(checks)
    numbers = _checked_seeds(seeds)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"run: `dtype` must be torch.float32 or torch.float64, got {dtype}.")
    settings, place = Settings(dtype=dtype, engine=engine), torch.device(device)
    with _one_thread():
        return [_run(CHECKS[name], numbers, settings, place, on_progress) for name in names]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs PyTorch on one CPU thread: on tensors this small, several threads mostly wait for each other."""
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
        empty = torch.zeros(0, dtype=torch.float64)
        return Outcome(check, [], Discrepancy(*[empty] * len(Discrepancy._fields)), 0.0, reason)
    seeds = seeds[: check.most_seeds]
    chunk = CHUNK.get(device.type, CHUNK["cpu"])
    begin = time.perf_counter()
    parts: list[Discrepancy] = []
    order: list[int] = []
    for kind, architecture in enumerate(check.architectures):
        group = [place for place, seed in enumerate(seeds) if seed % len(check.architectures) == kind]
        for first in range(0, len(group), chunk):
            if on_progress is not None:
                on_progress(check.name, len(order), len(seeds))
            places = group[first : first + chunk]
            keys = vmap(random.key)(torch.tensor([seeds[place] for place in places], device=device))
            found = check(keys, settings._replace(architecture=ARCHITECTURES[architecture]))
            parts.append(Discrepancy(*(field.detach().cpu() for field in found)))
            order += places
    if on_progress is not None:
        on_progress(check.name, len(order), len(seeds))
    in_given_order = torch.tensor(order).argsort()
    discrepancy = Discrepancy(*(torch.cat(fields)[in_given_order] for fields in zip(*parts, strict=True)))
    return Outcome(check, seeds, discrepancy, time.perf_counter() - begin)


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
