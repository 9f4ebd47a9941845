"""The C++ compiler of the machine, which two engines need."""

from __future__ import annotations

import os
import shlex
import shutil

__all__ = ["compiler", "why_no_compiler"]


def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: ``$CXX``, which may have arguments, else g++, else clang++; None without one."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for command in map(shlex.split, candidates):
        path = shutil.which(command[0]) if command else None
        if path is not None:
            return (path, *command[1:])
    return None


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    if compiler() is not None:
        return None
    if os.environ.get("CXX"):
        return f"CXX is {os.environ['CXX']!r}, which was not found: set it to a C++ compiler, or unset it."
    return "no C++ compiler was found: install g++ or clang++, or set CXX to one."
