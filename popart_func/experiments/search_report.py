"""What a search for hyper-parameters found: a table, a summary and a picture in the sweep's directory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from popart_func.experiments import search
from popart_func.experiments.regression import LABELS
from popart_func.experiments.search import FINAL, cells, judge
from popart_func.sweeps.files import write_atomically
from popart_func.sweeps.plot import heat_map
from popart_func.sweeps.store import CONFIGURATION, StoreError

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["check_new", "speed", "summary", "table", "write"]

SUMMARY, PICTURE = "summary.json", "heat_map.png"
BY = ("final_error", "mean_error", "recorded_error")


def check_new(directory: str | Path) -> None:
    """Raises if there is a sweep in the directory.

    Raises:
        StoreError: there is.
    """
    if (Path(directory).expanduser() / CONFIGURATION).exists():
        raise StoreError(f"{directory} holds a sweep: name another directory, or go on with it with --resume.")


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """Each algorithm judged by each error, see `search.judge`, as plain data.

    ``{"algorithms": {name: {"final_error": {...}, "mean_error": {...}, "recorded_error": {...}}}, "seeds": 50, ...}``

    Args:
        dataset: as `search.sweep_grid` returns it.
    """
    return {
        "algorithms": {
            str(name): {by: judge(dataset, str(name), by) for by in BY} for name in dataset["learner"].values
        },
        "seeds": dataset.sizes["seed"],
        **{name: dataset.attrs[name] for name in ("engine", "device", "dtype", "configuration_sha256")},
    }


def write(dataset: xarray.Dataset, directory: str | Path) -> tuple[dict[str, Any], list[Path]]:
    """Writes ``summary.json`` and ``heat_map.png`` into a sweep's directory, unless they are there.

    Returns:
        The summary, and what was written.
    """
    directory = Path(directory).expanduser()
    found, written = summary(dataset), []
    if not (directory / SUMMARY).exists():
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        write_atomically(directory / SUMMARY, text.encode())
        written.append(directory / SUMMARY)
    if not (directory / PICTURE).exists():
        panels = {LABELS[name]: cells(dataset, name) for name in map(str, dataset["learner"].values)}
        picture = io.BytesIO()
        heat_map(panels, picture, label=f"final error: mean |f(x) - y| over the last {FINAL} samples")
        write_atomically(directory / PICTURE, picture.getvalue())
        written.append(directory / PICTURE)
    return found, written


def table(found: dict[str, Any]) -> Group:
    """The best settings and the paper's, for a terminal of 80 columns.

    Args:
        found: as `summary` returns it.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table

    lines = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("algorithm", "setting", "rate", "step size", "final error", "diverged"):
        lines.add_column(name, justify="left" if name in ("algorithm", "setting") else "right", no_wrap=True)
    for name, judged in found["algorithms"].items():
        best, paper = judged["final_error"]["best"], judged["final_error"]["paper"]
        same = paper is not None and _setting(best) == _setting(paper)
        rows = (
            {"best, paper's": best} if same else {"best": best} if paper is None else {"best": best, "paper's": paper}
        )
        for label, row in rows.items():
            lines.add_row(
                LABELS[name] if row is best else "",
                label,
                *map(_power, _setting(row)),
                f"{_short(row['estimate'])} ({_short(row['low'])}-{_short(row['high'])})",
                str(row["diverged"]),
                end_section=row is list(rows.values())[-1],
            )
    lanes = sum(judged["final_error"]["lanes"] for judged in found["algorithms"].values())
    diverged = sum(judged["final_error"]["diverged_lanes"] for judged in found["algorithms"].values())
    return Group(
        f"Best of {lanes:,} lanes on {found['engine']} ({found['device']}), {diverged:,} of which diverged",
        lines,
        "final error: mean |f(x) - y| over the last 1000 samples, before each is seen;",
        f"interquartile mean over {found['seeds']} seeds (95 % bootstrap interval)",
    )


def speed(dataset: xarray.Dataset, measure: Callable[[], float] = search.reference_seconds) -> str | None:
    """What this run did, and, where that was the whole sweep, how long one module per seed would take.

    Of a part, nobody knows how long the whole takes: the start takes as long for one chunk as for all. None where
    nothing was run.

    Args:
        dataset: as `search.sweep_grid` returns it.
        measure: gives the seconds that a lane-step takes in the reference style.
    """
    lane_steps, whole, seconds = (dataset.attrs[name] for name in ("lane_steps", "all_lane_steps", "seconds"))
    if not lane_steps:
        return None
    if lane_steps < whole:
        part = f"{lane_steps / 1e6:.1f} of {whole / 1e6:.1f} million lane-steps"
        return f"run now: {part}, in {seconds:.1f} s; the others were there"
    reference = measure()
    there = lane_steps * reference
    took = f"{there / 3600:.1f} hours" if there >= 3600 else f"{there / 60:.1f} minutes"
    return (
        f"{lane_steps / 1e6:.1f} million lane-steps in {seconds:.1f} s, {lane_steps / seconds / 1e6:.2g} million/s, "
        f"all included\none module per seed: {reference * 1e6:.0f} us a lane-step, {took}, "
        f"{there / seconds:,.0f} times as long"
    )


def _setting(row: dict[str, Any]) -> list[float | None]:
    return [row.get("learning_rate"), row.get("step_size")]


def _power(value: float | None) -> str:
    if value is None:
        return ""
    power = float(np.log10(value))
    return f"10^{round(2 * power) / 2:g}" if abs(2 * power - round(2 * power)) < 1e-6 else f"{value:.3g}"


def _short(value: float | None) -> str:
    return "inf" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
