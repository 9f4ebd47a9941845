"""C++ for both targets: the types of elements, literals, and the header files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from popart_func.engines.native.expressions import Buffer, Const

__all__ = ["C_TYPES", "HEADERS", "header", "literal", "memory_type", "special_header"]

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
"""The dtypes that the engine has, and their types in C++."""


HEADERS = ("cpu/kernel.hpp", "cpu/elements.hpp", "cpu/threads.hpp", "cuda/kernel.hpp", "arithmetic.hpp", "special.hpp")
"""The header files, which are the same in every kernel; the last one is left out where it is not needed."""


def memory_type(buffer: Buffer) -> str:
    """The C++ type of a buffer's elements in memory: bytes for bools, since tensors hold them so."""
    return "uint8_t" if buffer.dtype == torch.bool else C_TYPES[buffer.dtype]


def literal(const: Const) -> str:
    """A number as C++, exact to the bit."""
    ctype = C_TYPES[const.dtype]
    value = const.value
    if const.dtype == torch.bool:
        return "true" if value else "false"
    if const.dtype.is_floating_point:
        value = float(value)
        text = "NOT_A_NUMBER" if math.isnan(value) else f"{'-' * (value < 0)}INF" if math.isinf(value) else value.hex()
        return f"{ctype}({text})"
    # The least int64 has no literal in C++: there ``-x`` is the negation of ``x``, which is out of range.
    return f"{ctype}({int(value) + 1}LL - 1)" if int(value) < 0 else f"{ctype}({int(value)}LL)"


def header(name: str) -> str:
    """The text of a header file of this package, such as ``"cpu/kernel.hpp"``."""
    return (Path(__file__).parent / name).read_text()


def special_header(lines: Iterable[str]) -> str:
    """The text of special.hpp if one of the lines calls a function of it, else nothing: it takes long to compile."""
    return header("special.hpp") if any("special::" in line for line in lines) else ""
