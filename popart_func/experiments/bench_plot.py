"""A figure of what the engines cost."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from popart_func.display.canvas import PLAIN_NUMBERS, Destination, legend_above, new_canvas, tidy
from popart_func.experiments.engine_costs import Cost

__all__ = ["costs"]

_AXES = {"lanes": "lanes", "steps": "steps", "width": "hidden width", "depth": "hidden layers"}
_ENGINE_STYLES = {"native": ("#0072B2", "o"), "inductor": ("#D55E00", "s"), "eager": ("#009E73", "^")}


def costs(results: Iterable[Cost], path: Destination) -> Figure:
    """Draws the cost of a lane-step against lanes, steps, width and depth: one panel each, both axes logarithmic.

    Args:
        results: as `engine_costs.costs` returns them.
        path: where to write; the suffix says the format, such as ``"costs.png"``. An open file gets a PNG.

    Returns:
        The figure, drawn without pyplot: nothing to close.

    Raises:
        ValueError: there are no results.
    """
    results = list(results)
    if not results:
        raise ValueError("costs: `results` must hold at least one cost, got none.")
    varied = [name for name in _AXES if any(cost.varied == name for cost in results)]
    engines = list(dict.fromkeys(cost.engine for cost in results))
    canvas = new_canvas((3.2 * len(varied) + 0.8, 3.8))
    panels = canvas.subplots(1, len(varied), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, varied, strict=True):
        for engine in engines:
            points = [
                (cost.value, cost.ns_per_lane_step) for cost in results if (cost.engine, cost.varied) == (engine, name)
            ]
            color, marker = _ENGINE_STYLES.get(engine, ("#555555", "x"))
            label = engine if axes is panels[0] else None  # once in the legend
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.2, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(_AXES[name])
        tidy(axes)
        values = sorted({cost.value for cost in results if cost.varied == name})
        decades = [10**power for power in range(9) if values[0] <= 10**power <= values[-1]]
        axes.set_xticks(values if values[-1] < 1000 else decades)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        )
        axes.yaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("ns per lane-step")
    legend_above(canvas)
    canvas.savefig(path)
    return canvas
