"""The paper's Figure 1a: the error of each algorithm over the stream."""

from __future__ import annotations

import xarray
from matplotlib.figure import Figure

from popart_func.display.canvas import Destination, plural, set_title
from popart_func.experiments.names import LABELS, STYLES
from popart_func.experiments.regression import WINDOW
from popart_func.sweeps.plot.curves import draw_bands
from popart_func.sweeps.statistics import percentiles

__all__ = ["figure"]


def figure(dataset: xarray.Dataset, path: Destination) -> Figure:
    """Draws Figure 1a: per algorithm the median and 10th to 90th percentile over seeds of the smoothed error.

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
    canvas, axes = draw_bands(percentiles(dataset["rmse"]), "sample", log=True, labels=LABELS, styles=STYLES)
    axes.set_xlim(0, int(dataset["sample"][-1]) + WINDOW)
    axes.set_xlabel("number of samples")
    axes.set_ylabel("RMSE of the unnormalized prediction")
    set_title(
        axes,
        f"Median and 10th to 90th percentile over {plural(dataset.sizes['seed'], 'seed')}, moving average of {WINDOW}",
    )
    canvas.savefig(path)
    return canvas
