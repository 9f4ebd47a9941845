"""Outcomes for people and for programs: a table, JSON, and progress on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from popart_func.verify import Outcome

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["as_json", "progress", "table"]

WIDTH = 100
"""Columns of the table."""


def as_json(outcomes: Sequence[Outcome], **settings: Any) -> dict[str, Any]:
    """Plain numbers: the settings, and for each check its claim, the largest errors over its seeds, and the verdict.

    A number that is not finite, of a check that failed, becomes None, which JSON can say.

    Args:
        outcomes: as `verify.run` returns them.
        **settings: written beside the checks, such as ``dtype="float32"``.
    """
    return {**settings, "checks": [_entry(outcome) for outcome in outcomes]}


def _entry(outcome: Outcome) -> dict[str, Any]:
    check, worst = outcome.check, outcome.worst
    entry: dict[str, Any] = {
        "name": check.name,
        "claim": check.claim,
        "source": check.source,
        "seeds": len(outcome.seeds),
        **dict.fromkeys(("max_abs", "max_rel", "max_ulp", "error", "allowed", "ratio")),
        "worst_seed": outcome.worst_seed,
        "passed": outcome.passed,
        "skipped": outcome.skipped,
        "seconds": round(outcome.seconds, 3),
    }
    if worst is not None:
        found = outcome.discrepancy
        entry |= {name: _number(float(getattr(found, name).amax())) for name in ("max_abs", "max_rel", "max_ulp")}
        entry |= {name: _number(float(getattr(found, name)[worst])) for name in ("error", "allowed")}
        entry["ratio"] = _number(float(outcome.ratios[worst]))
    return entry


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(outcomes: Sequence[Outcome]) -> Group:
    """A table of at most `WIDTH` columns, what its words mean, and how to see a failure again."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, collapse_padding=True, width=WIDTH)
    rows.add_column("check", no_wrap=True)
    rows.add_column("claim (source)", ratio=1)
    for name in ("seeds", "worst", "error", "allowed"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("verdict", no_wrap=True)
    for outcome in outcomes:
        check, worst = outcome.check, outcome.worst
        numbers = [""] * 4
        if worst is not None:
            error, allowed = float(outcome.discrepancy.error[worst]), float(outcome.discrepancy.allowed[worst])
            seed = str(outcome.worst_seed) if error else ""
            numbers = [
                f"{len(outcome.seeds):,}",
                seed,
                f"{error:.1e}" if error else "exact",
                f"{allowed:.1e}" if allowed else "0",
            ]
        verdict = {True: "passed", False: "FAILED", None: "skipped"}[outcome.passed]
        rows.add_row(check.name, f"{check.claim} ({check.source})", *numbers, verdict)
    notes = [
        "worst: the seed whose error is nearest to what is allowed, or furthest above it",
        "error: its largest difference, relative to the terms added up, or to a bound computed beside them",
        "allowed: what rounding can make of that; one rounding, where the bound counts them all",
        "of networks it is no bound but an estimate, found by disturbing the computation",
    ]
    notes += [f"skipped {outcome.check.name}: {outcome.skipped}" for outcome in outcomes if outcome.skipped]
    notes += [
        f"again: popart-func verify --check {outcome.check.name} --seed {outcome.worst_seed}"
        for outcome in outcomes
        if outcome.passed is False
    ]
    return Group(rows, *notes, _summary(outcomes))


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts = {
        word: sum(outcome.passed is passed for outcome in outcomes)
        for word, passed in (("passed", True), ("FAILED", False), ("skipped", None))
    }
    seconds = sum(outcome.seconds for outcome in outcomes)
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) + f" in {seconds:.0f} s"


@contextmanager
def progress(names: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """One bar over all checks on stderr, if that is a terminal; yields what `verify.run` calls."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        MofNCompleteColumn(),
        TextColumn("checks"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=len(names))

        def on_progress(name: str, done: int, seeds: int) -> None:
            at = names.index(name) + done / seeds
            bar.update(task, completed=int(at), description=f"{name}, {done:,} of {seeds:,} seeds")

        yield on_progress
