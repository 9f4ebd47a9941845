"""What all figures have in common: a canvas without pyplot, axes without clutter, words and numbers for labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = [
    "PLAIN_NUMBERS",
    "Destination",
    "label_of",
    "legend_above",
    "name_of",
    "new_canvas",
    "number",
    "plural",
    "set_title",
    "tidy",
    "value_of",
]

Destination = str | Path | IO[bytes] | BytesIO
"""Where a figure is written: a path, whose suffix says the format, or an open file, which gets a PNG."""

PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.10g}")
"""Formats ticks as ``1,000`` rather than ``10^3``."""

_SYMBOLS = {"learning_rate": r"$\alpha$", "step_size": r"$\beta$"}


def new_canvas(size: tuple[float, float]) -> Figure:
    """A figure of a size in inches, drawn without pyplot: nothing to close."""
    canvas = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Draws a faint grid, and no frame at the top and on the right."""
    axes.grid(True, axis=grid, which="major", linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def set_title(axes: Axes, title: str) -> None:
    """Sets a small title on the left."""
    axes.set_title(title, fontsize="medium", loc="left")


def legend_above(canvas: Figure) -> None:
    """Puts a legend over the axes, in as many columns as have room."""
    for columns in (4, 3, 2, 1):
        legend = canvas.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize="large")
        if columns == 1 or legend.get_window_extent().width < 0.98 * canvas.bbox.width:
            break
        legend.remove()
    for line in legend.get_lines():
        line.set_linewidth(2 * line.get_linewidth())


def name_of(dim: str) -> str:
    """A dimension's name in words, with its symbol."""
    return f"{dim.replace('_', ' ')} {_SYMBOLS.get(dim, '')}".rstrip()


def label_of(dim: str, value: Any, labels: Mapping[str, str]) -> str:
    """A coordinate as ``dimension = value``; a name stands alone."""
    text = value_of(value, labels)
    return text if isinstance(value, str) else f"{_SYMBOLS.get(dim, name_of(dim))} = {text}"


def value_of(value: Any, labels: Mapping[str, str]) -> str:
    """A coordinate as text: a name by its label, a whole or half power of ten as a power, anything else as it is.

    Args:
        value: the coordinate.
        labels: what to call a name; a name without a label has its underscores replaced by spaces.
    """
    if isinstance(value, str):
        return labels.get(value, value.replace("_", " "))
    if not isinstance(value, float):
        return str(value)
    exponent = round(2 * math.log10(value)) / 2 if 0 < value < math.inf else math.nan
    # float32 keeps seven digits of a power.
    return f"$10^{{{exponent:g}}}$" if math.isclose(value, 10.0**exponent, rel_tol=1e-6) else f"{value:g}"


def number(value: float) -> str:
    """A number with at least three significant digits, and no exponent where it can be helped."""
    if not 1e-3 <= abs(value) < 1e6:  # also zero, NaN and infinity
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def plural(count: int, name: str) -> str:
    """A count with its noun: ``1 seed``, ``50 seeds``."""
    return f"{count:,} {name}{'s' * (count != 1)}"
