"""Loop nests as C++ functions of the pointers that they read and write, so that equal nests are compiled once.

A network of 64 layers of 10 has 260 loop nests, 12 of which differ. The compiler inlines what is called only once.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Functions"]


class Functions:
    """The functions of a kernel's loop nests."""

    def __init__(self) -> None:
        self._names: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}

    def name(self, parameters: Sequence[str], body: Sequence[str]) -> str:
        """The name of the function with these parameters, in C++, and these lines between its braces."""
        return self._names.setdefault((tuple(parameters), tuple(body)), f"nest{len(self._names)}")

    def lines(self) -> list[str]:
        """The C++ of all functions."""
        return [
            line
            for (parameters, body), name in self._names.items()
            for line in (f"static void {name}({', '.join(parameters)}) {{", *(f"  {line}" for line in body), "}")
        ]
