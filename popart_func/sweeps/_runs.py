"""Runs along a dimension of a labelled array (xarray): checks, percentiles, and the bootstrap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy.stats
import xarray

from popart_func._checks import check_count, check_scalar
from popart_func.sweeps._checks import as_names

__all__ = ["as_dims", "as_runs", "bootstrap", "check_runs", "percentiles_of"]

_CHUNK = 2**23
"""How many drawn numbers are in memory at a time: 64 MiB of them."""


def as_dims(
    caller: str, argument: str, values: xarray.DataArray, dims: str | Iterable[str], *, but: str | None = None
) -> list[str]:
    """Dimensions as a list: one or more, distinct, all of the array's own, and not the one named by ``but``."""
    return as_names(caller, argument, dims, [str(dim) for dim in values.dims if dim != but])


def check_runs(caller: str, argument: str, values: xarray.DataArray, over: Sequence[str], *, least: int) -> None:
    """Raises unless an array holds real numbers, and at least so many along each dimension of its runs."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{caller}: `{argument}` must be real numbers, got dtype {values.dtype}.")
    for dim in over:
        if values.sizes[dim] < least:
            raise ValueError(
                f"{caller}: `{argument}` must have at least {least} run{'s' * (least > 1)} along {dim!r}, "
                f"got {values.sizes[dim]}."
            )


def as_runs(values: xarray.DataArray) -> xarray.DataArray:
    """Values in float64, infinity for runs that have diverged (NaN)."""
    return values.astype(np.float64).fillna(np.inf)


def percentiles_of(runs: np.ndarray, ranks: Sequence[int | float]) -> np.ndarray:
    """Percentiles of the last axis, interpolated, ``[rank, ...]``."""
    ordered = np.sort(runs, axis=-1)
    positions = np.array(ranks) / 100 * (runs.shape[-1] - 1)
    below, above = (np.moveaxis(ordered[..., end(positions).astype(int)], -1, 0) for end in (np.floor, np.ceil))
    weight = (positions % 1).reshape(-1, *[1] * (runs.ndim - 1))
    with np.errstate(invalid="ignore"):
        step = above - below
        between = np.where(weight < 0.5, below + step * weight, above - step * (1 - weight))
    # numpy.percentile returns `between`, which is NaN next to infinity even if the percentile falls on a finite value.
    return np.where(below == above, below, np.where(np.isinf(above), above, between))


def bootstrap(
    caller: str,
    samples: Sequence[xarray.DataArray],
    core: list[str],
    aggregate: Callable[..., np.ndarray],
    confidence: float,
    resamples: int,
    seed: int,
) -> xarray.Dataset:
    """Estimate and interval of a statistic of one sample, or of several that are drawn independently.

    Args:
        caller: the function that the user called.
        samples: the labelled arrays.
        core: the dimensions to aggregate: the strata's, and the runs' last.
        aggregate: from arrays ``[value, draw, stratum, run]``, one for each sample, to ``[value, draw]``.
        confidence: the share of the bootstrap distribution inside the interval.
        resamples: the number of draws.
        seed: the seed of the draws.
    """
    check_scalar(caller, "confidence", confidence, above=0, below=1)
    check_count(caller, "resamples", resamples)

    def intervals(*arrays: np.ndarray) -> np.ndarray:
        """From ``[..., *strata, run]`` to ``[..., end]``."""
        lead = np.broadcast_shapes(*(array.shape[: -len(core)] for array in arrays))
        tails = [array.shape[-len(core) :] for array in arrays]
        flat = [
            np.broadcast_to(array, lead + tail).reshape(-1, math.prod(tail[:-1]), tail[-1])
            for array, tail in zip(arrays, tails, strict=True)
        ]
        # Every chunk has the same draws, so a value does not depend on the number of others.
        numbers = resamples * flat[0].shape[1] * math.prod(tail[-1] for tail in tails)
        size = max(1, _CHUNK // numbers)
        chunks = [[array[start : start + size] for array in flat] for start in range(0, len(flat[0]), size)]
        ends = [_estimate_and_interval(chunk, aggregate, confidence, resamples, seed) for chunk in chunks]
        return np.concatenate(ends).reshape(*lead, 3)

    ends = xarray.apply_ufunc(
        intervals,
        *(as_runs(sample) for sample in samples),
        input_core_dims=[core] * len(samples),
        output_core_dims=[["_end"]],
        exclude_dims={core[-1]},
        join="exact",
    )
    names = ("estimate", "low", "high")
    attributes = {"confidence": confidence, "resamples": resamples}
    return xarray.Dataset({name: ends.isel(_end=end) for end, name in enumerate(names)}, attrs=attributes)


def _estimate_and_interval(
    samples: list[np.ndarray], aggregate: Callable[..., np.ndarray], confidence: float, resamples: int, seed: int
) -> np.ndarray:
    """From ``[value, stratum, run]`` to ``[value, end]``."""
    strata = samples[0].shape[1]

    def aggregate_drawn(*drawn: np.ndarray, axis: int) -> np.ndarray:
        by_sample = [drawn[first : first + strata] for first in range(0, len(drawn), strata)]
        return aggregate(*(np.stack(of_strata, axis=-2) for of_strata in by_sample))

    # scipy also summarises the distribution, and warns of differences of infinities there; that summary is not used.
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        distribution = scipy.stats.bootstrap(
            [sample[:, stratum] for sample in samples for stratum in range(strata)],
            aggregate_drawn,
            n_resamples=resamples,
            vectorized=True,
            axis=-1,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    estimate = aggregate(*(sample[:, None] for sample in samples))[:, 0]
    ends = percentiles_of(distribution, [50 * (1 - confidence), 50 * (1 + confidence)])
    return np.stack([estimate, *ends], axis=-1)
