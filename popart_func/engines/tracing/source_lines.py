"""The user's source lines: finds the line that an op comes from, and describes it in errors.

A line may belong to a file, to a cell of a notebook, to ``python -c``, or to code that was compiled under another name.
"""

from __future__ import annotations

import linecache
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch

__all__ = ["Line", "TraceError", "depends_on_values", "describe_line", "error_line", "reads_values", "user_line"]

Line = tuple[str, int]
"""A file, as Python names it in tracebacks, and a line in it."""

_LIBRARIES = (
    *(str(Path(str(module.__file__)).parent) for module in (linecache, torch)),
    str(Path(__file__).parents[2]),  # this one
)
# Code that is generated: by Python's import system, beartype, torch.fx, attrs, and NumPy. What else is in brackets is
# the user's: <string> of python -c, <stdin>, the cells of a notebook.
_GENERATED = ("<frozen ", "<@beartype", "<eval_with_key>", "<attrs generated", "<__array_function__")
_is_library: dict[str, bool] = {}


class TraceError(TypeError):
    """A function can't be a graph: what it does depends on values. The message says where, and what to do instead."""


def user_line(frame: FrameType | None) -> Line | None:
    """The innermost line, from a frame outwards, that belongs to neither Python nor a library, this one included."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not _belongs_to_a_library(name, frame):
            return name, frame.f_lineno
        frame = frame.f_back
    return None


def error_line(error: BaseException) -> Line | None:
    """The innermost line of an error's traceback that belongs to neither Python nor a library."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next(filter(None, map(user_line, reversed(frames))), None)


def _belongs_to_a_library(name: str, frame: FrameType) -> bool:
    if name.startswith("<"):
        if name.startswith(_GENERATED):
            return True
        name = frame.f_globals.get("__file__") or ""  # the methods of a dataclass are in <string>, wherever it is
    if name not in _is_library:
        _is_library[name] = name.startswith(_LIBRARIES) or "site-packages" in name
    return _is_library[name]


def describe_line(line: Line | None) -> str:
    """``file:line: `source` ``; without the source where Python does not have it."""
    if line is None:
        return "a line that is not known"
    source = linecache.getline(*line).strip()
    return f"{_file_or_cell(line[0])}:{line[1]}" + (f": `{source}`" if source else "")


def _file_or_cell(file: str) -> str:
    """The name of a file; of a notebook's cell ``Cell In[3]``, as IPython's own tracebacks name it."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    cell = shell.compile.format_code_name(file) if shell is not None else None
    return " ".join(cell) if cell else file


def depends_on_values(caller: str, line: Line | None) -> TraceError:
    """The error for a shape that depends on values."""
    return TraceError(
        f"{caller}: a shape depends on values in {describe_line(line)}: instead of selecting use torch.where, or "
        f"multiply by a mask."
    )


def reads_values(caller: str, line: Line | None) -> TraceError:
    """The error for Python code that reads the value of a tensor, as a branch does."""
    return TraceError(
        f"{caller}: the value of a tensor is read in {describe_line(line)}: one step runs for all values. "
        f"Instead of a branch use torch.where; instead of .item(), int() or float() keep the 0-d tensor."
    )
