"""A figure of the errors of all seeds, check by check, beside what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from popart_func.display.canvas import Destination, new_canvas, plural, tidy
from popart_func.verify import Outcome

__all__ = ["errors"]

LEAST, MOST = 1e-5, 1e1
"""Ends of the axis; what lies beyond is drawn at them."""

BINS = 96
"""The number of bars of a check's histogram."""

_INSIDE, _OUTSIDE, _EXACT, _LIMIT = "#0072B2", "#D55E00", "#56B4E9", "#333333"


def errors(outcomes: Sequence[Outcome], path: Destination, *, setting: str = "") -> Figure:
    """Draws a histogram over seeds of error / allowed for each check, on a logarithmic axis with the limit at 1.

    A logarithmic axis has no place for zero: the share of seeds whose two computations agree to the bit is a bar on the
    left. A dot marks the largest error of a check.

    Args:
        outcomes: as `verify.run` returns them; skipped ones are left out.
        path: where to write; the suffix says the format. An open file gets a PNG.
        setting: what the checks ran on, for the title, such as ``"float32 on cpu"``.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        ValueError: every check was skipped.
    """
    ran = [outcome for outcome in outcomes if outcome.seeds]
    if not ran:
        raise ValueError("errors: `outcomes` must hold at least one check that ran, got none.")
    canvas = new_canvas((9.5, 1.6 + 0.27 * len(ran)))
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
        tidy(panel, "x")
        panel.tick_params(axis="y", length=0)
        panel.hlines(np.arange(len(ran)) - 0.35, 0, 1, transform=panel.get_yaxis_transform(), color="#dddddd", lw=0.6)
    seeds = max(len(outcome.seeds) for outcome in ran)
    number = plural(seeds, "seed") + ", " * bool(setting) + setting
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
