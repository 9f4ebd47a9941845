"""Checks of what an experiment is asked to do: everything that can be known is, before anything is computed."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import torch

from popart_func._checks import check_count

__all__ = [
    "check_count_of",
    "check_device",
    "check_distinct",
    "check_function",
    "check_names",
    "check_seeds",
    "listed_names",
]


def check_seeds(caller: str, seeds: Iterable[SupportsIndex], name: str = "seeds") -> list[int]:
    """The seeds as a list, if they are distinct integers that numpy takes as seeds."""
    try:
        checked = [_index(seed) for seed in seeds]
    except TypeError:
        got = repr(seeds)
        raise TypeError(f"{caller}: `{name}` must be an iterable of integers, such as range(50), got {got}.") from None
    if not checked:
        raise ValueError(f"{caller}: `{name}` must hold at least one seed, got none.")
    for seed in checked:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{caller}: `{name}` must be at least 0 and below 2**32, got {seed}.")
    check_distinct(caller, name, checked)
    return checked


def check_count_of(caller: str, name: str, value: SupportsIndex) -> int:
    """The value as Python's own integer, if it is an integer, numpy's too, of at least 1."""
    try:
        whole = _index(value)
    except TypeError:
        whole = value  # type: ignore[assignment]
    check_count(caller, name, whole)
    return whole


def check_function(caller: str, name: str, function: Callable[..., Any], *takes: str) -> None:
    """Raises unless something can be called with so many arguments, as far as its signature says."""
    expected = f"{caller}: `{name}` must be a function of ({', '.join(takes)})"
    if not callable(function):
        raise TypeError(f"{expected}, got {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some of those written in C do not tell theirs
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise TypeError(f"{expected}, got one of {signature}: {error}.") from None


def listed_names(caller: str, argument: str, names: Iterable[str], expected: str, some: str) -> list[str]:
    """The names as a list, if there are some. One string is one name."""
    try:
        found = [names] if isinstance(names, str) else list(names)
    except TypeError:
        raise TypeError(f"{caller}: `{argument}` must be {expected}, got {names!r}.") from None
    if not found:
        raise ValueError(f"{caller}: `{argument}` must hold at least one {some}, got none.")
    return found


def check_names(caller: str, argument: str, names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The names as a list, if there are some, all known and distinct. One string is one name."""
    checked = listed_names(caller, argument, names, f"names among {list(known)}", f"of {list(known)}")
    for name in checked:
        if name not in known:
            raise ValueError(f"{caller}: `{argument}` must be among {list(known)}, got {name!r}.")
    check_distinct(caller, argument, checked)
    return checked


def check_device(caller: str, device: torch.device | str) -> torch.device:
    """The device, if a tensor can be put on it and read back here."""
    if not isinstance(device, torch.device | str):
        raise TypeError(f"{caller}: `device` must be a torch.device or the name of one, got {type(device).__name__}.")
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"{caller}: `device` must be one that works here, got {str(device)!r}: {reason}.") from None
    return torch.device(device)


def check_distinct(caller: str, argument: str, values: Sequence[object]) -> None:
    """Raises if a value comes twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{caller}: `{argument}` must be distinct, got {value!r} more than once.")
        seen.add(value)


def _index(value: SupportsIndex) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is no number here")
    return operator.index(value)
