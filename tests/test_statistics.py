from __future__ import annotations

import numpy as np
import pytest
import xarray

from popart_func.experiments.statistics import percentiles


def test_by_hand() -> None:
    values = xarray.DataArray(
        np.arange(11.0)[None] * [[1.0], [2.0]], dims=("sample", "seed"), coords={"sample": [5, 6]}
    )
    over_seeds = percentiles(values)
    assert over_seeds["median"].values.tolist() == [5.0, 10.0]
    assert over_seeds["p10"].values.tolist() == [1.0, 2.0]
    assert over_seeds["p90"].values.tolist() == [9.0, 18.0]
    assert over_seeds["sample"].values.tolist() == [5, 6]


def test_the_order_of_the_dimensions_does_not_matter() -> None:
    values = xarray.DataArray(np.random.default_rng(0).normal(size=(4, 7)), dims=("seed", "sample"))
    xarray.testing.assert_identical(percentiles(values), percentiles(values.T))


def test_a_diverged_seed_counts_as_infinitely_bad() -> None:
    values = xarray.DataArray([1.0, 2.0, np.nan, np.inf, 3.0], dims="seed")
    over_seeds = percentiles(values)
    assert float(over_seeds["median"]) == 3.0
    assert float(over_seeds["p90"]) == np.inf
    assert float(percentiles(xarray.DataArray([1.0, np.nan, np.nan], dims="seed"))["median"]) == np.inf


def test_is_computed_in_float64() -> None:
    values = xarray.DataArray(np.float32([2**24, 2**24 + 2]), dims="seed")
    assert float(percentiles(values)["median"]) == 2**24 + 1


def test_unknown_dimension() -> None:
    with pytest.raises(ValueError, match=r"percentiles: `dim` must be one of \['sample'\], got 'seed'\."):
        percentiles(xarray.DataArray([1.0], dims="sample"))
