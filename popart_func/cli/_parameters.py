"""What commands share: types of options, validators that refuse a bad value, and the message of an interrupt."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from popart_func.engines import ENGINES
from popart_func.experiments.names import Algorithm

__all__ = [
    "ENGINE_NAMES",
    "Algorithms",
    "Device",
    "Directory",
    "Engine",
    "File",
    "Picture",
    "check_among",
    "check_engine",
    "check_float32",
    "resumable",
    "whole_number",
    "words",
]

ENGINE_NAMES = ("auto", *ENGINES)


def whole_number(least: int, most: int | None = None) -> Parameter:
    """An option that is a whole number within bounds. cyclopts alone would round 1.5."""
    return Parameter(converter=_whole, validator=Number(gte=least, lte=most))


def words(**options: Any) -> Parameter:
    """An option with one or more words after it."""
    return Parameter(consume_multiple=(1, None), negative=(), **options)


def check_among(names: Sequence[str] | None, choices: Collection[str]) -> None:
    """Raises unless every name is one of the choices."""
    if not set(names or ()) <= set(choices):
        raise ValueError(f"Choose from: {', '.join(choices)}.")


def check_engine(_: Any, name: str) -> None:
    """Raises unless the name is an engine's, or "auto"."""
    check_among([name], ENGINE_NAMES)


def check_float32(_: Any, value: float) -> None:
    """Raises if a positive number is no longer one in float32: the lanes would learn with 0 or infinity."""
    import torch

    if not 0 < torch.tensor(value, dtype=torch.float32).item() < math.inf:
        raise ValueError("Must be within the range of float32, about 1e-45 to 3e38.")


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Within it, an interrupt says that the same command goes on from what is in the directory."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on with what is done, in {out}.") from None


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


def _check_device(_: Any, name: str) -> None:
    from popart_func.sweeps._checks import as_device  # not above: the package imports xarray and zarr

    try:
        as_device("", name)
    except ValueError as error:  # without the function's name: on a command line nobody called one
        raise ValueError(str(error).partition(": ")[2]) from None


def _check_local(_: Any, path: Path | None) -> None:
    from popart_func.sweeps.files import as_directory

    try:
        as_directory("", "", "" if path is None else path)
    except ValueError:
        raise ValueError("It must be a path on this machine, not a URL.") from None


def _check_file(_: Any, path: Path | None) -> None:
    """Raises if no file can be written at a path: before the work, not after it."""
    _check_local(_, path)
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
Directory = Annotated[Path, Parameter(validator=_check_local)]
Engine = Annotated[str, Parameter(validator=check_engine, help=f"What runs it: {', '.join(ENGINE_NAMES)}.")]
File = Annotated[Path | None, Parameter(validator=_check_file)]
Picture = Annotated[Path | None, Parameter(validator=_check_picture)]
