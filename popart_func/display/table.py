"""Tables on a terminal: one style for every command.

Numbers stand on the right, words on the left, one rule under the header and one between sections. rich is imported when
a table is made, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["make_table", "print_table"]


def make_table(
    columns: Sequence[str],
    sections: Iterable[Iterable[Sequence[str]]],
    *,
    words: Collection[str] = (),
    wrapped: str | None = None,
    title: str | None = None,
    notes: Iterable[str] = (),
    width: int | None = None,
) -> Group:
    """Lays out a table with a title above it and notes below it.

    Args:
        columns: the header.
        sections: groups of rows, one cell for each column; a rule separates two sections.
        words: the columns that stand on the left.
        wrapped: a column of words that takes the room that is left, on as many lines as it needs.
        title: one line.
        notes: one line each.
        width: of the table; by default what its cells need.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, width=width)
    for name in columns:
        if name == wrapped:
            table.add_column(name, ratio=1)
        else:
            table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    return Group(*([] if title is None else [title]), table, *notes)


def print_table(table: Group, width: int | None = None) -> None:
    """Prints a table to stdout.

    Args:
        table: as `make_table` returns it.
        width: of the terminal; by default its own, or 80 columns where there is none.
    """
    from rich.console import Console

    Console(width=width).print(table, highlight=False)
