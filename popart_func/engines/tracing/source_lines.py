"""Lines of the user's code, and the errors that name them."""

from __future__ import annotations

import linecache
from pathlib import Path
from types import FrameType

import torch

import popart_func

__all__ = ["Line", "TraceError", "depends_on_values", "described", "reads_values", "user_line"]

Line = tuple[str, int]
"""A file and a line in it."""

_LIBRARIES = ("<", *(str(Path(str(module.__file__)).parent) for module in (linecache, torch, popart_func)))
_is_library: dict[str, bool] = {}


class TraceError(TypeError):
    """A function can't be a graph: what it does depends on values. The message says where, and what to do instead."""


def user_line(frame: FrameType | None) -> Line | None:
    """The innermost line, from a frame on, that belongs to neither Python nor a library, this one included."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _is_library:
            _is_library[name] = name.startswith(_LIBRARIES) or "site-packages" in name
        if not _is_library[name]:
            return name, frame.f_lineno
        frame = frame.f_back
    return None


def described(line: Line | None) -> str:
    """``file:line: `source` ``."""
    if line is None:
        return "a line that is not known"
    return f"{line[0]}:{line[1]}: `{linecache.getline(*line).strip()}`"


def depends_on_values(line: Line | None) -> TraceError:
    """A shape does."""
    return TraceError(
        f"step: a shape depends on values in {described(line)}: instead of selecting use torch.where, or multiply by a "
        f"mask."
    )


def reads_values(line: Line | None) -> TraceError:
    """Python code does."""
    return TraceError(
        f"step: the value of a tensor is read in {described(line)}: a step is traced once for all values. Instead of a "
        f"branch use torch.where; instead of .item(), int() or float() keep the 0-d tensor."
    )
