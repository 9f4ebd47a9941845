"""What many seeds say together: the median, and the 10th and 90th percentiles."""

from __future__ import annotations

import numpy as np
import xarray

__all__ = ["PERCENTILES", "percentiles"]

PERCENTILES = {"median": 50, "p10": 10, "p90": 90}
"""The names of the percentiles."""


def percentiles(values: xarray.DataArray, dim: str = "seed") -> xarray.Dataset:
    """Median, 10th and 90th percentile along one dimension, computed in float64.

    A seed that has diverged (NaN) counts as infinitely bad, so that it can't make an algorithm look better than it is.
    A percentile that falls among such seeds is infinite.

    Args:
        values: a labelled array.
        dim: the dimension to summarise.

    Returns:
        The variables ``median``, ``p10`` and ``p90``, without that dimension.

    Raises:
        ValueError: there is no such dimension.

    >>> over_seeds = percentiles(xarray.DataArray([[0.0, 5.0, 10.0]], dims=("sample", "seed")))
    >>> float(over_seeds["median"][0]), float(over_seeds["p10"][0]), float(over_seeds["p90"][0])
    (5.0, 1.0, 9.0)
    """
    if dim not in values.dims:
        raise ValueError(f"percentiles: `dim` must be one of {list(values.dims)}, got {dim!r}.")
    plain = np.asarray(values.transpose(dim, ...).values, dtype=np.float64)
    ranks = list(PERCENTILES.values())
    plain = np.where(np.isnan(plain), np.inf, plain)
    below, above = (np.percentile(plain, ranks, axis=0, method=method) for method in ("lower", "higher"))
    with np.errstate(invalid="ignore"):
        between = np.percentile(plain, ranks, axis=0)
    # numpy interpolates next to infinity to NaN, even where a percentile falls on a finite value.
    found = np.where(below == above, below, np.where(np.isinf(above), np.inf, between))
    template = values.isel({dim: 0}, drop=True)
    return xarray.Dataset({name: template.copy(data=data) for name, data in zip(PERCENTILES, found, strict=True)})
