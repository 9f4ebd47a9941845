"""Finds the C++ compiler of this machine, which the engines native and inductor need."""

from __future__ import annotations

import functools
import os
import shlex
import shutil

__all__ = ["compiler", "why_no_compiler"]


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: ``$CXX``, which may have arguments, else g++, else clang++; None without one."""
    try:
        return _find(os.environ.get("CXX"), os.environ.get("PATH"))
    except FileNotFoundError:
        return None


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _find(os.environ.get("CXX"), os.environ.get("PATH"))
    except FileNotFoundError as reason:
        return str(reason)
    return None


@functools.cache
def _find(asked: str | None, path: str | None) -> tuple[str, ...]:
    """Finds the compiler once, since searching takes as long as a short run.

    A miss raises, so that it is not cached: a compiler may be installed at any time.

    Raises:
        FileNotFoundError: there is none; the message says why, and what to do.
    """
    if asked:
        return _asked_for(asked, path)
    for name in ("g++", "clang++"):
        program = shutil.which(name, path=path)
        if program is not None:
            return (program,)
    raise FileNotFoundError("no C++ compiler was found: install g++ or clang++, or set CXX to one.")


def _asked_for(asked: str, path: str | None) -> tuple[str, ...]:
    """The command that ``$CXX`` names."""
    try:
        words = shlex.split(asked)
    except ValueError as error:  # quotes without their other half
        words, why = [], f"can't be read as a command ({error})"
    else:
        why = "was not found" if words else "is blank"
    program = shutil.which(words[0], path=path) if words else None
    if program is not None:
        return (program, *words[1:])
    if words and os.path.isdir(words[0]):
        why = "is a directory"
    elif words and os.path.exists(words[0]):
        why = "may not be executed"
    raise FileNotFoundError(f"CXX is {asked!r}, which {why}: set it to a C++ compiler, or unset it.")
