"""Progress on stderr: bars on a terminal, one for each task; elsewhere, as in a job's log, a line now and then.

Messages appear everywhere. rich is imported when a display starts, so that importing this module costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "show_progress"]

SECONDS = 30.0
"""The least time between two lines where there is no terminal; what takes less than that writes none."""


class Progress:
    """A display of bars and messages, as `show_progress` gives it."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._begun = self._told = time.monotonic()

    def show(self, name: str, done: int, total: int, description: str | None = None) -> None:
        """Moves a task's bar to ``done`` of ``total`` units; the first call makes the bar.

        Args:
            name: the task's.
            done: the number of units that are done.
            total: the number of all units.
            description: the text beside the bar; by default the name.
        """
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        self._bars.update(self._tasks[name], completed=done, description=description or name)
        now = time.monotonic()
        if self._bars.disable and now - self._told >= SECONDS:
            self._told = now
            self.say(f"{description or name}: {done / total:.0%} after {now - self._begun:.0f} s")

    def say(self, message: str) -> None:
        """Prints a message of one line."""
        self._bars.console.print(message, highlight=False, soft_wrap=True)


@contextmanager
def show_progress(
    unit: str, *, rate: int | None = None, quiet: bool = False, transient: bool = False
) -> Iterator[Progress]:
    """Shows bars until the block ends.

    Args:
        unit: the name of what is counted, such as ``"samples"``.
        rate: show the speed instead of the count, divided by this number, such as 10**6 for ``"M lane-steps"``.
        quiet: show neither bars nor messages.
        transient: remove the bars at the end.
    """
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Done(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            if rate is None:
                return Text(f"{task.completed:,.0f} of {task.total:,.0f} {unit}")
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed / rate:.3g} {unit}/s")

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
        yield Progress(bars)
