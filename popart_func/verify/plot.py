"""Where the errors of all seeds lie, check by check, below what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from popart_func.verify import Outcome

__all__ = ["errors"]

LEAST, MOST = 1e-5, 1e1
"""Ends of the axis; what lies beyond is drawn at them."""

BINS = 96

_INSIDE, _OUTSIDE, _EXACT, _LIMIT = "#0072B2", "#D55E00", "#56B4E9", "#333333"


def errors(outcomes: Sequence[Outcome], path: str | Path | IO[bytes] | BytesIO, *, setting: str = "") -> Figure:
    """Draws each check's distribution over seeds of error / allowed, on a log axis with the limit at 1.

    A log axis has no place for zero: seeds whose two computations agree to the bit are a bar at its left, as long as
    their share. The largest error of a check is marked.

    Args:
        outcomes: as `verify.run` returns them; skipped ones are left out.
        path: where to write; the suffix says the format. An open file gets a PNG.
        setting: where the errors come from, for the title, such as ``"float32 on cpu"``.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        ValueError: nothing ran.
    """
    ran = [outcome for outcome in outcomes if outcome.seeds]
    if not ran:
        raise ValueError("errors: `outcomes` must hold at least one check that ran, got none.")
    canvas = Figure(figsize=(9.5, 1.6 + 0.27 * len(ran)), dpi=160, layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(canvas)
    exact, axes = canvas.subplots(1, 2, sharey=True, width_ratios=[1, 6])
    for row, outcome in enumerate(ran):
        _draw_row(exact, axes, len(ran) - 1 - row, outcome)
    exact.set_yticks(range(len(ran)), [outcome.check.name for outcome in reversed(ran)], fontsize="small")
    exact.set_ylim(-0.6, len(ran) - 0.4)
    exact.set_xlim(0, 1)
    exact.set_xticks([0, 0.5, 1], ["0", "50", "100"])
    exact.set_xlabel("no error at all\n% of seeds")
    axes.set_xscale("log")
    axes.set_xlim(LEAST, MOST)
    axes.set_xlabel("error / allowed\nthe other seeds, each check's to its own height")
    axes.axvline(1, color=_LIMIT, linewidth=1.0)
    axes.annotate(
        "allowed",
        (1, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize="small",
    )
    for panel in (exact, axes):
        panel.grid(True, axis="x", linewidth=0.4, alpha=0.4)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.set_axisbelow(True)
        panel.hlines(np.arange(len(ran)) - 0.35, 0, 1, transform=panel.get_yaxis_transform(), color="#dddddd", lw=0.6)
    seeds = max(len(outcome.seeds) for outcome in ran)
    number = f"{seeds:,} seed{'s' * (seeds != 1)}{', ' * bool(setting)}{setting}"
    canvas.suptitle(f"Each check's errors over {number}; a dot is the worst", fontsize="medium")
    canvas.savefig(path)
    return canvas


def _draw_row(exact: Axes, axes: Axes, place: int, outcome: Outcome) -> None:
    ratios = outcome.ratios.numpy()
    inexact = np.clip(ratios[ratios > 0], LEAST, MOST)
    exact.barh(place - 0.05, 1 - len(inexact) / len(ratios), height=0.6, color=_EXACT)
    if not len(inexact):
        return
    counts, edges = np.histogram(inexact, bins=np.geomspace(LEAST, MOST, BINS + 1))
    heights = 0.85 * counts / counts.max()
    base = place - 0.35
    axes.stairs(
        base + heights, edges, baseline=base, fill=True, color=_INSIDE if outcome.passed else _OUTSIDE, alpha=0.75
    )
    worst = inexact.max()
    color = _LIMIT if outcome.passed else _OUTSIDE
    axes.plot(worst, base + 0.15, marker="o", markersize=4, color=color, markeredgecolor="white", markeredgewidth=0.6)
