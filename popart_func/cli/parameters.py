"""What the commands' options have in common: their types, and what makes a value a bad one."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from popart_func.engines import ENGINES
from popart_func.sweeps import _checks

__all__ = [
    "ENGINE_NAMES",
    "Algorithm",
    "Algorithms",
    "Device",
    "Engine",
    "File",
    "Picture",
    "check_among",
    "check_engine",
    "whole_number",
    "words",
]

ENGINE_NAMES = ("auto", *ENGINES)


class Algorithm(enum.Enum):
    """The four algorithms of `experiments.regression`, which takes long to import."""

    sgd = "sgd"
    art = "art"
    popart = "popart"
    normalized_sgd = "normalized_sgd"


def whole_number(least: int, most: int | None = None) -> Parameter:
    """A whole number within bounds; left to itself, cyclopts rounds 1.5."""
    return Parameter(converter=_whole, validator=Number(gte=least, lte=most))


def words(**options: Any) -> Parameter:
    """One or more words after the option."""
    return Parameter(consume_multiple=(1, None), negative=(), **options)


def check_among(names: Sequence[str] | None, choices: Collection[str]) -> None:
    """Raises unless every name is one of the choices."""
    if not set(names or ()) <= set(choices):
        raise ValueError(f"Choose from: {', '.join(choices)}.")


def check_engine(_: Any, name: str) -> None:
    """Raises unless it is an engine's name, or "auto"."""
    check_among([name], ENGINE_NAMES)


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


def _check_device(_: Any, name: str) -> None:
    try:
        _checks.check_device("", name)
    except ValueError as error:  # without the function's name: on a command line nobody called one
        raise ValueError(str(error).partition(": ")[2]) from None


def _check_file(_: Any, path: Path | None) -> None:
    """That a file can be written there: before the work, not after it."""
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder.")
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}.")


def _check_picture(_: Any, path: Path | None) -> None:
    _check_file(_, path)
    if path is not None and path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"A picture ends in .png, .pdf or .svg, got {path.name}.")


def _names(algorithms: tuple[Algorithm, ...]) -> str:
    return " ".join(algorithm.value.replace("_", "-") for algorithm in algorithms)


Algorithms = Annotated[tuple[Algorithm, ...], words(show_default=_names)]
Device = Annotated[str, Parameter(validator=_check_device)]
Engine = Annotated[str, Parameter(validator=check_engine, help=f"What runs it: {', '.join(ENGINE_NAMES)}.")]
File = Annotated[Path | None, Parameter(validator=_check_file)]
Picture = Annotated[Path | None, Parameter(validator=_check_picture)]
