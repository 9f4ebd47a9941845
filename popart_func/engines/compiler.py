"""Finds the C++ compiler of this machine, which the engines native and inductor need."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil

__all__ = ["compiler", "why_no_compiler"]


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: ``$CXX``, which may have arguments, else g++, else clang++; None without one."""
    with contextlib.suppress(FileNotFoundError):
        return _find(os.environ.get("CXX"), os.environ.get("PATH"))
    return None


@functools.cache
def _find(asked: str | None, path: str | None) -> tuple[str, ...]:
    """Finds the compiler once, since searching takes as long as a short run.

    A miss raises, so that it is not cached: a compiler may be installed at any time.
    """
    for command in map(shlex.split, [asked] if asked else ["g++", "clang++"]):
        program = shutil.which(command[0], path=path) if command else None
        if program is not None:
            return (program, *command[1:])
    raise FileNotFoundError


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    if compiler() is not None:
        return None
    if os.environ.get("CXX"):
        return f"CXX is {os.environ['CXX']!r}, which was not found: set it to a C++ compiler, or unset it."
    return "no C++ compiler was found: install g++ or clang++, or set CXX to one."
