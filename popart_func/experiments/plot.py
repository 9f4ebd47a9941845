"""The paper's Figure 1a, and what the engines cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import xarray
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from popart_func.experiments.bench import Cost
from popart_func.experiments.regression import LABELS, WINDOW
from popart_func.experiments.statistics import percentiles

__all__ = ["costs", "figure"]

# Okabe and Ito's colours, which the colour-blind can tell apart. Proposition 3 puts normalized SGD right on top of
# Pop-Art: its line is thin and dark inside a broad light one, so that both are seen.
_STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#D55E00", "linewidth": 1.0, "zorder": 3},
    "art": {"color": "#009E73", "linewidth": 1.0, "zorder": 4},
    "popart": {"color": "#56B4E9", "linewidth": 3.4, "zorder": 5},
    "normalized_sgd": {"color": "#00304D", "linewidth": 0.8, "zorder": 6},
}


def figure(dataset: xarray.Dataset, path: str | Path | IO[bytes]) -> Figure:
    """Draws the median and the 10th to 90th percentile of the smoothed error over seeds, per algorithm, on a log axis.

    Args:
        dataset: as `regression.reproduce` returns it; only ``rmse`` is read.
        path: where to write; the suffix says the format, such as ``"figure.png"``. An open file gets a PNG.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        ValueError: the dataset has no ``rmse`` (algorithm, seed, sample).
    """
    if "rmse" not in dataset or set(dataset["rmse"].dims) != {"algorithm", "seed", "sample"}:
        raise ValueError(
            f"figure: `dataset` must have a variable 'rmse' (algorithm, seed, sample), got {dict(dataset.sizes)} with "
            f"{list(dataset.data_vars)}."
        )
    canvas = _canvas((9.0, 5.5))
    axes = canvas.add_subplot()
    for algorithm in dataset["algorithm"].values:
        over_seeds = percentiles(dataset["rmse"].sel(algorithm=algorithm))
        # A log axis shows neither infinity nor zero: such points are left out of the line.
        shown = {name: values.where(np.isfinite(values) & (values > 0)) for name, values in over_seeds.items()}
        style = _STYLES.get(algorithm, {})
        sample = dataset["sample"].values
        axes.plot(sample, shown["median"], label=LABELS.get(algorithm, algorithm), **style)
        axes.fill_between(
            sample, shown["p10"], shown["p90"], alpha=0.2, linewidth=0, color=style.get("color"), zorder=2
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, int(dataset["sample"][-1]) + WINDOW)
    axes.set_xlabel("number of samples")
    axes.set_ylabel("RMSE of the unnormalized prediction")
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    seeds = dataset.sizes["seed"]
    axes.set_title(
        f"Median and 10th to 90th percentile over {seeds} seed{'s' * (seeds != 1)}, moving average of {WINDOW}",
        fontsize="medium",
        loc="left",
    )
    legend = canvas.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="large")
    for line in legend.get_lines():
        line.set_linewidth(2 * line.get_linewidth())
    canvas.savefig(path)
    return canvas


_AXES = {
    "lanes": "lanes",
    "steps": "steps",
    "width": "hidden width",
    "depth": "hidden layers",
}
_ENGINE_STYLES = {"native": ("#0072B2", "o"), "inductor": ("#D55E00", "s"), "eager": ("#009E73", "^")}


def costs(results: Iterable[Cost], path: str | Path | IO[bytes]) -> Figure:
    """Draws what a lane-step costs against lanes, steps, width and depth, one panel each, both axes logarithmic.

    Args:
        results: as `bench.costs` returns them.
        path: where to write.

    Raises:
        ValueError: there are no results.
    """
    results = list(results)
    if not results:
        raise ValueError("costs: `results` must hold at least one cost, got none.")
    varied = [name for name in _AXES if any(cost.varied == name for cost in results)]
    canvas = _canvas((3.2 * len(varied) + 0.8, 3.8))
    panels = canvas.subplots(1, len(varied), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, varied, strict=True):
        for engine in dict.fromkeys(cost.engine for cost in results):
            points = [
                (cost.value, cost.ns_per_lane_step) for cost in results if (cost.engine, cost.varied) == (engine, name)
            ]
            color, marker = _ENGINE_STYLES.get(engine, ("#555555", "x"))
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.2, label=engine)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(_AXES[name])
        axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        values = sorted({cost.value for cost in results if cost.varied == name})
        decades = [10**power for power in range(9) if values[0] <= 10**power <= values[-1]]
        axes.set_xticks(values if values[-1] < 1000 else decades)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("ns per lane-step")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    canvas.savefig(path)
    return canvas


def _canvas(size: tuple[float, float]) -> Figure:
    canvas = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas
