"""Checks of arguments. ``check_...`` raises or returns nothing; ``as_...`` returns the argument in its checked form.

Every message begins with the function that the user called, which is the first argument here.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch

from popart_func._checks import check_count

__all__ = [
    "as_count",
    "as_device",
    "as_identifiers",
    "as_names",
    "as_numbers",
    "as_seeds",
    "check_distinct",
    "check_function",
]


def check_function(caller: str, name: str, function: Callable[..., Any], *takes: str) -> None:
    """Raises unless the function can be called with these positional arguments, as far as its signature says."""
    expected = f"{caller}: `{name}` must be a function of ({', '.join(takes)})"
    if not callable(function):
        raise TypeError(f"{expected}, got {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise TypeError(f"{expected}, got one of {signature}: {error}.") from None


def check_distinct(caller: str, name: str, values: Sequence[object]) -> None:
    """Raises if a value comes twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{caller}: `{name}` must be distinct, got {value!r} more than once.")
        seen.add(value)


def as_count(caller: str, name: str, value: SupportsIndex) -> int:
    """An integer of at least 1, of Python or of numpy, as Python's own."""
    try:
        whole = _as_index(value)
    except TypeError:
        whole = value  # type: ignore[assignment]
    check_count(caller, name, whole)
    return whole


def as_seeds(caller: str, seeds: Iterable[SupportsIndex], name: str = "seeds") -> list[int]:
    """Seeds as a list: one or more distinct integers in [0, 2**32), the range of numpy's seeds."""
    try:
        listed = [_as_index(seed) for seed in seeds]
    except TypeError:
        got = repr(seeds)
        raise TypeError(f"{caller}: `{name}` must be an iterable of integers, such as range(50), got {got}.") from None
    if not listed:
        raise ValueError(f"{caller}: `{name}` must hold at least one seed, got none.")
    for seed in listed:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{caller}: `{name}` must be at least 0 and below 2**32, got {seed}.")
    check_distinct(caller, name, listed)
    return listed


def as_numbers(caller: str, name: str, values: Iterable[SupportsFloat]) -> list[float]:
    """Numbers as a list of floats: one or more, real, finite and distinct."""
    try:
        given = list(values)
        if isinstance(values, str | bytes) or not all(map(_is_number, given)):
            raise TypeError
    except TypeError:
        raise TypeError(f"{caller}: `{name}` must be an iterable of numbers, got {values!r}.") from None
    if not given:
        raise ValueError(f"{caller}: `{name}` must hold at least one value, got none.")
    numbers = [_as_float(value) for value in given]
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{caller}: `{name}` must be finite, got {number}.")
    check_distinct(caller, name, numbers)
    return numbers


def as_names(caller: str, name: str, names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Names as a list: one or more, all known, distinct. One string is one name."""
    listed = _as_list(caller, name, names, f"names among {list(known)}", f"of {list(known)}")
    for one in listed:
        if one not in known:
            raise ValueError(f"{caller}: `{name}` must be among {list(known)}, got {one!r}.")
    check_distinct(caller, name, listed)
    return listed


def as_identifiers(caller: str, name: str, names: Iterable[str]) -> list[str]:
    """Names as a list: one or more, distinct, each an identifier and so fit to name a file. One string is one name."""
    listed = _as_list(caller, name, names, "an iterable of names", "name")
    for one in listed:
        if not isinstance(one, str):
            raise TypeError(f"{caller}: the names in `{name}` must be strings, got {one!r}.")
        if not one.isidentifier():
            raise ValueError(f"{caller}: the names in `{name}` must be identifiers, got {one!r}.")
    check_distinct(caller, name, listed)
    return listed


def as_device(caller: str, device: torch.device | str) -> torch.device:
    """A device on which a tensor can be made and read back."""
    if not isinstance(device, torch.device | str):
        raise TypeError(f"{caller}: `device` must be a torch.device or the name of one, got {type(device).__name__}.")
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(f"{caller}: `device` must be one that works here, got {str(device)!r}: {reason}.") from None
    return torch.device(device)


def _as_list(caller: str, name: str, names: Iterable[str], expected: str, noun: str) -> list[str]:
    try:
        listed = [names] if isinstance(names, str) else list(names)
    except TypeError:
        raise TypeError(f"{caller}: `{name}` must be {expected}, got {names!r}.") from None
    if not listed:
        raise ValueError(f"{caller}: `{name}` must hold at least one {noun}, got none.")
    return listed


def _as_index(value: SupportsIndex) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is no number here")
    return operator.index(value)


def _is_number(value: Any) -> bool:
    # numpy's bool_ and a tensor of bools have a dtype that names them.
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    scalar = getattr(value, "ndim", 0) == 0
    return isinstance(value, SupportsFloat) and not isinstance(value, str) and scalar and not boolean


def _as_float(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits
        return math.inf
