"""Heat maps of a grid of settings: where an error is least, and where runs diverge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from popart_func.display.canvas import (
    PLAIN_NUMBERS,
    Destination,
    label_of,
    name_of,
    new_canvas,
    number,
    plural,
    value_of,
)
from popart_func.sweeps._runs import check_runs
from popart_func.sweeps.statistics import best_setting, interquartile_mean

__all__ = ["heat_map"]

_INCHES = 0.32
"""The side of a cell."""

_DECADES = 3
"""How far above the best mean the colours go."""

_COLORS, _MIDDLE = "viridis_r", "#21918C"
"""The colours, and the one in their middle."""

_MARKS: dict[str, dict[str, Any]] = {
    "best setting": {"facecolor": "none", "edgecolor": "#D55E00", "linewidth": 2.2, "clip_on": False, "zorder": 3},
    "a quarter of the runs or fewer diverged": {
        "facecolor": "none",
        "edgecolor": "white",
        "hatch": "////",
        "linewidth": 0,
    },
    "more than a quarter diverged": {"facecolor": "#DDDDDD", "edgecolor": "#999999", "hatch": "xxxx", "linewidth": 0},
}


def heat_map(
    error: xarray.DataArray | Mapping[str, xarray.DataArray],
    path: Destination,
    over: str = "seed",
    x: str = "step_size",
    y: str = "learning_rate",
    *,
    label: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draws a heat map: the interquartile mean of an error over runs, for each setting of two hyper-parameters.

    Smaller is better: give the negative of a return. Colours are logarithmic, or linear where a mean is negative. The
    best setting has a frame; above the panel stand its mean, the 95 % bootstrap interval of that (`best_setting`) and
    its hyper-parameters. A cell is hatched where up to a quarter of its runs have diverged, grey and crossed where more
    have, so that the mean is infinite. Logarithmic colours end three decades above the best mean; worse cells have the
    last colour.

    Args:
        error: an array with the dimensions ``over``, ``x``, ``y`` and at most one more, such as ``algorithm``, with a
            panel for each of its coordinates. Or panels by name, which may lack ``x`` or ``y``. An axis along which
            nothing in a panel changes, since its algorithm takes no such hyper-parameter, is drawn as one cell.
        path: where to write; the suffix says the format, such as ``"grid.png"``. An open file gets a PNG.
        over: the dimension of the runs.
        x: the dimension across.
        y: the dimension upwards.
        label: the name of the error beside the colours; by default the array's ``long_name`` or name.
        labels: what to call a panel that has a name, such as ``{"popart": "Pop-Art"}``.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        TypeError: the error is not real numbers.
        ValueError: it has other dimensions or no runs.
    """
    given = _panels(error, over, x, y, labels or {})
    panels = {name: _grid(panel, over, x, y) for name, panel in given.items()}
    means = {name: interquartile_mean(panel, over) for name, panel in panels.items()}
    norm, ticks, extend = _colors(means.values())
    # A single column is drawn broader, so that there is room for what stands above it.
    columns = [max(mean.sizes[x], 4) for mean in means.values()]
    rows = max(mean.sizes[y] for mean in means.values())
    canvas = new_canvas((1.6 + sum(0.8 + _INCHES * width for width in columns), 2.2 + _INCHES * max(rows, 5)))
    all_axes = canvas.subplots(1, len(panels), squeeze=False, width_ratios=columns)[0]
    marks = set()
    for axes, name in zip(all_axes, panels, strict=True):
        marks |= _draw_cells(axes, panels[name], means[name], norm, over)
        _label_axes(axes, means[name], x, y)
        axes.set_title(_title(name, panels[name], over), fontsize="small", loc="left")
    all_axes[0].set_ylabel(name_of(y))
    some = next(iter(given.values()))
    label = label or str(some.attrs.get("long_name") or name_of(str(some.name or "error")))
    if any(bool(np.isfinite(mean).any()) for mean in means.values()):
        colors = ScalarMappable(norm, _COLORS)
        bar = canvas.colorbar(
            colors, ax=all_axes.tolist(), extend=extend, pad=0.01, aspect=25, ticks=ticks, format=PLAIN_NUMBERS
        )
        bar.set_label(f"{label}\n(interquartile mean over {plural(some.sizes[over], name_of(over))})", fontsize="small")
        bar.ax.minorticks_off()
    handles = {text: Patch(**style) for text, style in _MARKS.items() if text in marks}
    for patch in handles.values():
        if patch.get_hatch() == "////":
            patch.set_facecolor(_MIDDLE)
    canvas.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize="small",
        handleheight=1.4,
    )
    canvas.savefig(path)
    return canvas


def _panels(
    error: xarray.DataArray | Mapping[str, xarray.DataArray], over: str, x: str, y: str, labels: Mapping[str, str]
) -> dict[str, xarray.DataArray]:
    """The panels by their titles, checked."""
    if isinstance(error, Mapping):
        panels = {value_of(name, labels): panel for name, panel in error.items()}
    else:
        rest = [str(dim) for dim in error.dims if dim not in (over, x, y)]
        coordinates = error[rest[0]].values.tolist() if len(rest) == 1 else []
        panels = {label_of(rest[0], value, labels): error.isel({rest[0]: i}) for i, value in enumerate(coordinates)}
        panels = panels or {"": error}
    if not panels:
        raise ValueError("heat_map: `error` must hold at least one panel, got none.")
    for name, panel in panels.items():
        if over not in panel.dims or not set(panel.dims) <= {over, x, y}:
            where = f" in {name!r}" if name else ", and at most one more"
            raise ValueError(
                f"heat_map: `error` must have the dimensions {[over, x, y]}{where}, got {list(panel.dims)}. "
                f"Choose what to draw, such as `error.isel(sample=-1)`."
            )
        check_runs("heat_map", "error", panel, [over], least=1)
    return panels


def _grid(panel: xarray.DataArray, over: str, x: str, y: str) -> xarray.DataArray:
    """A panel as ``[over, y, x]`` in ascending order; an axis along which nothing changes gets one cell, unlabelled."""
    for dim in (x, y):
        if dim in panel.dims and panel.sizes[dim] > 1 and bool(panel.notnull().any()):
            first = panel.isel({dim: 0}, drop=True)
            if bool(((panel == first) | (panel.isnull() & first.isnull())).all()):
                panel = first
        panel = panel.sortby(dim) if dim in panel.dims else panel.expand_dims(dim)
    return panel.transpose(over, y, x)


def _colors(means: Iterable[xarray.DataArray]) -> tuple[Normalize, Locator, str]:
    """The scale of the colours of all panels, the places of its numbers, and whether some mean lies beyond it."""
    values = np.concatenate([mean.values.ravel() for mean in means])
    values = values[np.isfinite(values)]
    if (values < 0).any():
        least, most = float(values.min()), float(values.max())
        return Normalize(least, most if most > least else least + 1), MaxNLocator(6, steps=[1, 2, 5, 10]), "neither"
    values = values[values > 0]
    least, most = (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)
    top = min(most, least * 10**_DECADES)
    top = top if top > least else 10 * least
    return LogNorm(least, top), _ticks(least, top), "max" if top < most else "neither"


def _ticks(least: float, most: float) -> Locator:
    """The places of the numbers beside the colours: two or more, however narrow or broad the range."""
    decades = np.log10(most / least)
    if decades < 0.7:
        return MaxNLocator(6, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 3, 5) if decades < 1.5 else (1, 2, 5) if decades < 2.5 else (1,))


def _draw_cells(axes: Axes, panel: xarray.DataArray, mean: xarray.DataArray, norm: Normalize, over: str) -> set[str]:
    """Draws the cells; returns the marks that were needed."""
    values = mean.values
    finite, diverged = np.isfinite(values), ~np.isfinite(panel.values).all(axis=0)
    # Zero, which has no logarithm, has the first colour.
    shown = np.where(finite, np.maximum(values, norm.vmin or 0), np.nan)
    axes.imshow(shown, norm=norm, cmap=_COLORS, origin="lower", aspect="auto")
    best = finite & (np.arange(values.size).reshape(values.shape) == values.argmin())
    used = set()
    for text, cells in zip(_MARKS, (best, finite & diverged, ~finite), strict=True):
        for row, column in np.argwhere(cells):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_MARKS[text]))
            used.add(text)
    return used


def _label_axes(axes: Axes, mean: xarray.DataArray, x: str, y: str) -> None:
    for dim, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if dim not in mean.coords:
            axis.set_ticks([])
            continue
        axis.set_ticks(range(mean.sizes[dim]), [value_of(value, {}) for value in mean[dim].values.tolist()])
        axis.set_tick_params(length=2, labelsize="small", labelrotation=90 if dim == x else 0)
    axes.set_xlabel(name_of(x) if x in mean.coords else f"no {name_of(x)}")


def _title(name: str, panel: xarray.DataArray, over: str) -> str:
    """The panel's name, the least mean with its interval, and the setting that has it."""
    best = best_setting(panel, over)
    if not np.isfinite(best["estimate"]):
        return f"{name}\nall diverged\n"
    estimate, low, high = (number(float(best[end])) for end in ("estimate", "low", "high"))
    interval = "" if panel.sizes[over] == 1 else f" ({low} to {high})"
    setting = ", ".join(label_of(dim, best[dim].item(), {}) for dim in map(str, panel.dims) if dim in best.coords)
    return f"{name}\n{estimate}{interval}\n{setting}"
