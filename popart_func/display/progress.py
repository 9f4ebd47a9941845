"""Progress on a terminal: one bar for each task, and messages beside them, on stderr.

The bars are drawn only where stderr is a terminal; messages appear everywhere. rich is imported when a display starts,
so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["Bar", "Progress", "show_progress"]


class Bar(NamedTuple):
    """One task's bar.

    Attributes:
        advance: ``advance(more)``: so many more units are done.
        update: ``update(done, description)``: so many units are done in all; the description replaces the old one.
    """

    advance: Callable[[int | float], None]
    update: Callable[[int | float, str], None]


class Progress(NamedTuple):
    """A display of bars and messages.

    Attributes:
        start: ``start(description, total)`` adds a bar of so many units.
        say: prints a message of one line.
    """

    start: Callable[[str, int | float], Bar]
    say: Callable[[str], None]


@contextmanager
def show_progress(
    unit: str, *, scale: int = 1, rate: bool = False, quiet: bool = False, transient: bool = False
) -> Iterator[Progress]:
    """Shows bars until the block ends.

    Args:
        unit: what is counted, such as ``"samples"``.
        scale: how many of what is counted make one unit, such as 10**6 where the unit is ``"M lane-steps"``.
        rate: also show how many units a second are done.
        quiet: show neither bars nor messages.
        transient: remove the bars at the end.
    """
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Done(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            done, total = (f"{value / scale:,.{int(scale > 1)}f}" for value in (task.completed, task.total or 0))
            speed = task.finished_speed or task.speed
            shown = f", {speed / scale:.3g} {unit}/s" if rate and speed is not None else ""
            return Text(f"{done} of {total} {unit}{shown}")

    console = Console(stderr=True, quiet=quiet)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        Done(),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    disabled = quiet or not console.is_terminal
    with progress.Progress(*columns, console=console, disable=disabled, transient=transient) as bars:

        def start(description: str, total: int | float) -> Bar:
            task = bars.add_task(description, total=total, visible=total > 0)
            return Bar(
                advance=lambda more: bars.advance(task, more),
                update=lambda done, description: bars.update(task, completed=done, description=description),
            )

        yield Progress(start, lambda message: console.print(message, highlight=False, soft_wrap=True))
