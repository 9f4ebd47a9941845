"""Curves over time with bands."""

from __future__ import annotations

import itertools
from io import BytesIO
from pathlib import Path
from typing import IO, Literal

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from popart_func.display.canvas import (
    PLAIN_NUMBERS,
    STYLES,
    label_of,
    legend_above,
    name_of,
    new_canvas,
    plural,
    tidy,
)
from popart_func.sweeps._checks import check_names
from popart_func.sweeps._labelled import check_dims
from popart_func.sweeps.statistics import bootstrap_interval, percentiles

__all__ = ["curves", "draw_bands", "set_title"]


def curves(
    values: xarray.DataArray,
    path: str | Path | IO[bytes] | BytesIO,
    over: str = "seed",
    along: str = "sample",
    *,
    band: Literal["interval", "percentiles"] = "interval",
    resamples: int = 500,
    log: bool = True,
) -> Figure:
    """Draws what many runs say over time: a line with a band for every coordinate of the dimensions that remain.

    The axes are called what the array and its coordinates are: their ``long_name``, else their name.

    Args:
        values: an array with the dimensions ``over``, ``along`` and any others, such as ``algorithm``.
        path: where to write, the suffix says the format, such as ``"curves.png"``. An open file gets a PNG.
        over: the dimension of the runs.
        along: the dimension of time.
        band: ``"interval"`` for the interquartile mean and, at every point, its 95 % bootstrap interval;
            ``"percentiles"`` for the median and the 10th to 90th percentile.
        resamples: of the interval. With 500 and 50 runs a point takes half a millisecond.
        log: a logarithmic axis, on which zero and less leave a gap. Infinity always does.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: as `statistics.bootstrap_interval`.
    """
    check_names("curves", "band", band, ["interval", "percentiles"])
    check_dims("curves", "over", values, over)
    check_dims("curves", "along", values, along, but=over)
    if band == "interval":
        ends = bootstrap_interval(values, over=over, resamples=resamples)
        title = "Interquartile mean and its 95 % interval"
    else:
        ends, title = percentiles(values, over), "Median and 10th to 90th percentile"
    canvas, axes = draw_bands(ends, along, log)
    axes.set_xlabel(str(values[along].attrs.get("long_name", name_of(along))))
    axes.set_ylabel(str(values.attrs.get("long_name", name_of(str(values.name or "value")))))
    set_title(axes, f"{title} over {plural(values.sizes[over], name_of(over))}")
    canvas.savefig(path)
    return canvas


def draw_bands(ends: xarray.Dataset, along: str, log: bool) -> tuple[Figure, Axes]:
    """Lines and bands of three variables: the middle, the lower end and the upper end."""
    canvas = new_canvas((9.0, 5.5))
    axes = canvas.add_subplot()
    rest = [dim for dim in ends.sizes if dim != along]
    for coordinates in itertools.product(*(ends[dim].values.tolist() for dim in rest)):
        line = ends.sel(dict(zip(rest, coordinates, strict=True)))
        middle, low, high = (end.where(np.isfinite(end) & ((end > 0) | (not log))) for end in line.values())
        label = ", ".join(label_of(str(dim), value) for dim, value in zip(rest, coordinates, strict=True))
        style = {"linewidth": 1.2, **(STYLES.get(coordinates[0], {}) if len(rest) == 1 else {})}
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


def set_title(axes: Axes, title: str) -> None:
    """Sets a small title on the left."""
    axes.set_title(title, fontsize="medium", loc="left")
