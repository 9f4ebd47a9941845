"""Curves over time with bands."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from popart_func.display.canvas import (
    PLAIN_NUMBERS,
    Destination,
    label_of,
    legend_above,
    name_of,
    new_canvas,
    plural,
    set_title,
    tidy,
)
from popart_func.sweeps._checks import as_names
from popart_func.sweeps._runs import as_dims
from popart_func.sweeps.statistics import bootstrap_interval, percentiles

__all__ = ["curves", "draw_bands"]


def curves(
    values: xarray.DataArray,
    path: Destination,
    over: str = "seed",
    along: str = "sample",
    *,
    band: Literal["interval", "percentiles"] = "interval",
    resamples: int = 500,
    log: bool = True,
    labels: Mapping[str, str] | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """Draws curves over time: a line with a band for every coordinate of the dimensions that are neither runs nor time.

    The axes are labelled with the ``long_name`` of the array and its time coordinate, else with their names.

    Args:
        values: an array with the dimensions ``over``, ``along`` and any others, such as ``algorithm``.
        path: where to write; the suffix says the format, such as ``"curves.png"``. An open file gets a PNG.
        over: the dimension of the runs.
        along: the dimension of time.
        band: ``"interval"`` for the interquartile mean and, at every point, its 95 % bootstrap interval;
            ``"percentiles"`` for the median and the 10th to 90th percentile.
        resamples: the number of the interval's draws. With 500 draws of 50 runs a point takes half a millisecond.
        log: draw a logarithmic axis, where zero and less leave a gap. Infinity leaves a gap on any axis.
        labels: what to call a coordinate that is a name, such as ``{"popart": "Pop-Art"}``.
        styles: matplotlib's properties of the line of such a coordinate, where it alone says which line it is.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        TypeError, ValueError: as `statistics.bootstrap_interval`.
    """
    as_names("curves", "band", band, ["interval", "percentiles"])
    as_dims("curves", "over", values, over)
    as_dims("curves", "along", values, along, but=over)
    if band == "interval":
        ends = bootstrap_interval(values, over=over, resamples=resamples)
        title = "Interquartile mean and its 95 % interval"
    else:
        ends, title = percentiles(values, over), "Median and 10th to 90th percentile"
    canvas, axes = draw_bands(ends, along, log=log, labels=labels or {}, styles=styles or {})
    axes.set_xlabel(str(values[along].attrs.get("long_name", name_of(along))))
    axes.set_ylabel(str(values.attrs.get("long_name", name_of(str(values.name or "value")))))
    set_title(axes, f"{title} over {plural(values.sizes[over], name_of(over))}")
    canvas.savefig(path)
    return canvas


def draw_bands(
    ends: xarray.Dataset,
    along: str,
    *,
    log: bool,
    labels: Mapping[str, str],
    styles: Mapping[str, Mapping[str, Any]],
) -> tuple[Figure, Axes]:
    """Draws a line and a band for every coordinate of the dimensions that are not time.

    Args:
        ends: three variables in this order: the line, the lower and the upper end of the band.
        along: the dimension of time.
        log: as in `curves`.
        labels: as in `curves`.
        styles: as in `curves`.
    """
    canvas = new_canvas((9.0, 5.5))
    axes = canvas.add_subplot()
    rest = [dim for dim in ends.sizes if dim != along]
    for coordinates in itertools.product(*(ends[dim].values.tolist() for dim in rest)):
        line = ends.sel(dict(zip(rest, coordinates, strict=True)))
        middle, low, high = (end.where(np.isfinite(end) & ((end > 0) | (not log))) for end in line.values())
        label = ", ".join(label_of(str(dim), value, labels) for dim, value in zip(rest, coordinates, strict=True))
        style = {"linewidth": 1.2, **(styles.get(coordinates[0], {}) if len(rest) == 1 else {})}
        (drawn,) = axes.plot(ends[along].values, middle, label=label, **style)
        axes.fill_between(ends[along].values, low, high, alpha=0.2, linewidth=0, color=drawn.get_color(), zorder=2)
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.margins(x=0)
    tidy(axes)
    if rest:
        legend_above(canvas)
    return canvas, axes
