"""The C++ compiler of the machine, which two engines need."""

from __future__ import annotations

import os
import shutil

__all__ = ["compiler", "why_no_compiler"]


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else g++, else clang++; None where there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def why_no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    if compiler() is None:
        return "no C++ compiler was found: install g++ or clang++, or set CXX to one."
    return None
