"""Checks of what an experiment is asked to do: everything that can be known is, before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch

__all__ = ["check_device", "check_names", "check_seeds"]


def check_seeds(caller: str, seeds: Iterable[SupportsIndex]) -> list[int]:
    """The seeds as a list, if they are distinct integers that numpy takes as seeds."""
    try:
        checked = [operator.index(seed) for seed in seeds]
    except TypeError:
        got = repr(seeds)
        raise TypeError(f"{caller}: `seeds` must be an iterable of integers, such as range(50), got {got}.") from None
    if not checked:
        raise ValueError(f"{caller}: `seeds` must hold at least one seed, got none.")
    for seed in checked:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{caller}: `seeds` must be at least 0 and below 2**32, got {seed}.")
    _check_distinct(caller, "seeds", checked)
    return checked


def check_names(caller: str, argument: str, names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The names as a list, if there are some, all known and distinct. One string is one name."""
    checked = [names] if isinstance(names, str) else list(names)
    if not checked:
        raise ValueError(f"{caller}: `{argument}` must hold at least one of {list(known)}, got none.")
    for name in checked:
        if name not in known:
            raise ValueError(f"{caller}: `{argument}` must be among {list(known)}, got {name!r}.")
    _check_distinct(caller, argument, checked)
    return checked


def check_device(caller: str, device: torch.device | str) -> torch.device:
    """The device, if a tensor can be put on it and read back here."""
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"{caller}: `device` must be one that works here, got {str(device)!r}: {reason}.") from None
    return torch.device(device)


def _check_distinct(caller: str, argument: str, values: Sequence[object]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{caller}: `{argument}` must be distinct, got {value!r} more than once.")
        seen.add(value)
