"""Report of outcomes: a table on a terminal, plain data for JSON, and a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from popart_func.display.progress import show_progress
from popart_func.display.table import make_table
from popart_func.verify import Outcome

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["as_json", "progress", "table"]

WIDTH = 100
"""The table's width in characters."""


def as_json(outcomes: Sequence[Outcome], **settings: Any) -> dict[str, Any]:
    """Outcomes as plain data: the settings, and for each check its claim, its largest errors over seeds, its verdict.

    JSON has no number that is not finite; it becomes None.

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
    """A table of outcomes, `WIDTH` characters wide, with an explanation of its words and how to repeat a failure."""
    rows = []
    for outcome in outcomes:
        check, worst = outcome.check, outcome.worst
        numbers = [""] * 4
        if worst is not None:
            error, allowed = float(outcome.discrepancy.error[worst]), float(outcome.discrepancy.allowed[worst])
            numbers = [
                f"{len(outcome.seeds):,}",
                str(outcome.worst_seed) if error else "",
                f"{error:.1e}" if error else "exact",
                f"{allowed:.1e}" if allowed else "0",
            ]
        verdict = {True: "passed", False: "FAILED", None: "skipped"}[outcome.passed]
        rows.append((check.name, f"{check.claim} ({check.source})", *numbers, verdict))
    notes = [
        "worst: the seed whose error is nearest to what is allowed, or furthest above it",
        "error: its largest difference, relative to the terms added up, or to a bound computed beside them",
        "allowed: the error that rounding can cause; one rounding, where the bound counts them all",
        "for networks it is an estimate rather than a bound, found by disturbing the computation",
    ]
    notes += [f"skipped {outcome.check.name}: {outcome.skipped}" for outcome in outcomes if outcome.skipped]
    notes += [
        f"again: popart-func verify --check {outcome.check.name} --seed {outcome.worst_seed}"
        for outcome in outcomes
        if outcome.passed is False
    ]
    return make_table(
        ("check", "claim (source)", "seeds", "worst", "error", "allowed", "verdict"),
        [rows],
        words=("check", "verdict"),
        wrapped="claim (source)",
        notes=[*notes, _summary(outcomes)],
        width=WIDTH,
    )


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts = {
        word: sum(outcome.passed is passed for outcome in outcomes)
        for word, passed in (("passed", True), ("FAILED", False), ("skipped", None))
    }
    seconds = sum(outcome.seconds for outcome in outcomes)
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) + f" in {seconds:.0f} s"


@contextmanager
def progress(names: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
    """Shows one bar over all checks; yields the ``on_progress`` that `verify.run` calls."""
    with show_progress("checks", transient=True) as shown:

        def on_progress(name: str, done: int, seeds: int) -> None:
            at = int(names.index(name) + done / seeds)
            shown.show("checks", at, len(names), f"{name}, {done:,} of {seeds:,} seeds")

        yield on_progress
