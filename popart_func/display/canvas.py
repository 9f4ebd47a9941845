"""What the pictures have in common: a canvas without pyplot, colours, names and numbers."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from popart_func.experiments.regression import LABELS

__all__ = [
    "PLAIN_NUMBERS",
    "STYLES",
    "label_of",
    "legend_above",
    "name_of",
    "new_canvas",
    "number",
    "plural",
    "tidy",
    "value_of",
]

# Okabe and Ito's colours, which the colour-blind can tell apart. Proposition 3 puts normalized SGD right on top of
# Pop-Art: its line is thin and dark inside a broad light one, so that both are seen.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#D55E00", "linewidth": 1.0, "zorder": 3},
    "art": {"color": "#009E73", "linewidth": 1.0, "zorder": 4},
    "popart": {"color": "#56B4E9", "linewidth": 3.4, "zorder": 5},
    "normalized_sgd": {"color": "#00304D", "linewidth": 0.8, "zorder": 6},
}

PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.10g}")

_SYMBOLS = {"learning_rate": r"$\alpha$", "step_size": r"$\beta$"}


def new_canvas(size: tuple[float, float]) -> Figure:
    """A figure of a size in inches, with nothing to close."""
    canvas = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame at the top and on the right."""
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(canvas: Figure) -> None:
    """A legend over the axes, in as many columns as have room."""
    for columns in (4, 3, 2, 1):
        legend = canvas.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize="large")
        if columns == 1 or legend.get_window_extent().width < 0.98 * canvas.bbox.width:
            break
        legend.remove()
    for line in legend.get_lines():
        line.set_linewidth(2 * line.get_linewidth())


def name_of(dim: str) -> str:
    """A dimension in words, with its symbol."""
    return f"{dim.replace('_', ' ')} {_SYMBOLS.get(dim, '')}".rstrip()


def label_of(dim: str, value: Any) -> str:
    """A coordinate with its dimension, unless it is a name and speaks for itself."""
    return value_of(value) if isinstance(value, str) else f"{_SYMBOLS.get(dim, name_of(dim))} = {value_of(value)}"


def value_of(value: Any) -> str:
    """A coordinate: an algorithm by its name, a whole or half power of ten as a power, anything else as it is."""
    if isinstance(value, str):
        return LABELS.get(value, value.replace("_", " "))
    if not isinstance(value, float):
        return str(value)
    exponent = round(2 * math.log10(value)) / 2 if 0 < value < math.inf else math.nan
    # float32 keeps seven digits of a power.
    return f"$10^{{{exponent:g}}}$" if math.isclose(value, 10.0**exponent, rel_tol=1e-6) else f"{value:g}"


def number(value: float) -> str:
    """At least three significant digits, and no exponent where it can be helped."""
    if not 1e-3 <= abs(value) < 1e6:  # As for zero, NaN and infinity.
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def plural(count: int, name: str) -> str:
    """``1 seed``, ``50 seeds``."""
    return f"{count} {name}{'s' * (count != 1)}"
