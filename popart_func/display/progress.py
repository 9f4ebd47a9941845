"""A bar on a terminal: how much is done, how fast, and how long it will take. Elsewhere nothing but messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Report", "reporting"]


class Report(NamedTuple):
    """What a long computation tells while it runs.

    Attributes:
        say: a message, one line.
        advance: how many more lane-steps are done.
    """

    say: Callable[[str], None]
    advance: Callable[[int], None]


class _Rate(ProgressColumn):
    """Lane-steps per second."""

    def render(self, task: Task) -> Text:
        """The rate of the last half minute, and at the end that of all."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 1e6:.3g} M lane-steps/s")


@contextmanager
def reporting(quiet: bool) -> Iterator[Callable[[str, int], Report]]:
    """Gives a function that starts a bar of so many lane-steps, on stderr; it is drawn only where that is a terminal.

    Args:
        quiet: neither a bar nor messages.
    """
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:

        def start(description: str, lane_steps: int) -> Report:
            task = progress.add_task(description, total=lane_steps, visible=lane_steps > 0)
            return Report(
                say=lambda message: console.print(message, highlight=False, soft_wrap=True),
                advance=lambda more: progress.advance(task, more),
            )

        yield start
