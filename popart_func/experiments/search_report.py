"""Report of a search for hyper-parameters: a table, and a summary and a heat map in the sweep's directory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from popart_func.display.table import make_table
from popart_func.experiments import search
from popart_func.experiments.names import LABELS
from popart_func.experiments.search import FINAL, cells, judge
from popart_func.sweeps.configuration import CONFIGURATION, StoreError
from popart_func.sweeps.files import write_atomically
from popart_func.sweeps.plot import heat_map

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["check_new", "speed", "summary", "table", "write"]

SUMMARY, PICTURE = "summary.json", "heat_map.png"
BY = ("final_error", "mean_error", "recorded_error")


def check_new(directory: str | Path) -> None:
    """Raises if the directory holds a sweep.

    Raises:
        StoreError: it does.
    """
    if (Path(directory).expanduser() / CONFIGURATION).exists():
        raise StoreError(f"{directory} holds a sweep: name another directory, or go on with it with --resume.")


def summary(dataset: xarray.Dataset) -> dict[str, Any]:
    """Every algorithm judged by every error with `search.judge`, as plain data.

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

    Args:
        dataset: as `search.sweep_grid` returns it.
        directory: the sweep's.

    Returns:
        The summary, and the paths that were written.
    """
    directory = Path(directory).expanduser()
    found, written = summary(dataset), []
    if not (directory / SUMMARY).exists():
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        write_atomically(directory / SUMMARY, text.encode())
        written.append(directory / SUMMARY)
    if not (directory / PICTURE).exists():
        panels = {name: cells(dataset, name) for name in map(str, dataset["learner"].values)}
        picture = io.BytesIO()
        label = f"final error: mean |f(x) - y| over the last {FINAL} samples"
        heat_map(panels, picture, label=label, labels=LABELS)
        write_atomically(directory / PICTURE, picture.getvalue())
        written.append(directory / PICTURE)
    return found, written


def table(found: dict[str, Any]) -> Group:
    """A table of the best settings and the paper's, for a terminal of 80 columns.

    Args:
        found: as `summary` returns it.
    """
    sections = []
    for name, judged in found["algorithms"].items():
        best, paper = judged["final_error"]["best"], judged["final_error"]["paper"]
        if paper is None:
            rows = {"best": best}
        elif _setting(best) == _setting(paper):
            rows = {"best, paper's": best}
        else:
            rows = {"best": best, "paper's": paper}
        sections.append(
            [
                (
                    LABELS[name] if row is best else "",
                    label,
                    *map(_power, _setting(row)),
                    f"{_short(row['estimate'])} ({_short(row['low'])}-{_short(row['high'])})",
                    str(row["diverged"]),
                )
                for label, row in rows.items()
            ]
        )
    lanes = sum(judged["final_error"]["lanes"] for judged in found["algorithms"].values())
    diverged = sum(judged["final_error"]["diverged_lanes"] for judged in found["algorithms"].values())
    return make_table(
        ("algorithm", "setting", "rate", "step size", "final error", "diverged"),
        sections,
        words=("algorithm", "setting"),
        title=f"Best of {lanes:,} lanes on {found['engine']} ({found['device']}), {diverged:,} of which diverged",
        notes=[
            "final error: mean |f(x) - y| over the last 1000 samples, before each is seen;",
            f"interquartile mean over {found['seeds']} seeds (95 % bootstrap interval)",
        ],
    )


def speed(dataset: xarray.Dataset, measure: Callable[[], float] = search.reference_seconds) -> str | None:
    """The speed of this run and, if it ran the whole sweep, how long one module per seed would take.

    A part is not compared: its start takes as long as the start of a whole sweep.

    Args:
        dataset: as `search.sweep_grid` returns it.
        measure: returns the seconds that a lane-step takes in the reference style.

    Returns:
        One or two lines; None where nothing ran.
    """
    lane_steps, whole, seconds = (dataset.attrs[name] for name in ("lane_steps", "all_lane_steps", "seconds"))
    if not lane_steps:
        return None
    if lane_steps < whole:
        part = f"{lane_steps / 1e6:.1f} of {whole / 1e6:.1f} million lane-steps"
        return f"run now: {part}, in {seconds:.1f} s; the others were there"
    reference = measure()
    by_module = lane_steps * reference
    took = f"{by_module / 3600:.1f} hours" if by_module >= 3600 else f"{by_module / 60:.1f} minutes"
    return (
        f"{lane_steps / 1e6:.1f} million lane-steps in {seconds:.1f} s, {lane_steps / seconds / 1e6:.2g} million/s, "
        f"all included\none module per seed: {reference * 1e6:.0f} us a lane-step, {took}, "
        f"{by_module / seconds:,.0f} times as long"
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
