from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray

from popart_func.sweeps import _runs
from popart_func.sweeps.statistics import (
    best_setting,
    bootstrap_interval,
    interquartile_mean,
    median,
    percentiles,
    probability_of_improvement,
)

# What rliable 1.2.0 gives on `scores()` with 50,000 resamples (5,000 for the probability): estimate, low, high. Its
# bootstrap is not run here: it needs arch 7, which does not run with pandas 3. Its estimates are, where it is there.
RLIABLE = {
    "aggregate_iqm": (2.24137931, 1.57931034, 3.20344828),
    "aggregate_median": (3.0, 1.9, 4.34545454),
    "probability_of_improvement": (0.45555556, 0.33838384, 0.57174242),
}


def scores() -> tuple[xarray.DataArray, xarray.DataArray]:
    """Eleven runs and nine runs of two algorithms on five tasks; rounded, so that some are ties."""
    random, scale = np.random.default_rng(3), np.array([1, 10, 0.1, 3, 5])
    runs = random.lognormal(size=(11, 5)) * scale, random.lognormal(0.4, size=(9, 5)) * scale
    x, y = (xarray.DataArray(np.round(values, 1), dims=("seed", "task")) for values in runs)
    return x, y


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
    with pytest.raises(ValueError, match=r"percentiles: `dim` must be among \['sample'\], got 'seed'\."):
        percentiles(xarray.DataArray([1.0], dims="sample"))


# -------------------- the interquartile mean and the median


@pytest.mark.parametrize("runs", [1, 3, 4, 7, 50])
def test_the_interquartile_mean_is_scipys_trimmed_mean(runs: int) -> None:
    values = np.random.default_rng(runs).lognormal(size=(3, runs, 2))
    found = interquartile_mean(xarray.DataArray(values, dims=("sample", "seed", "task"), coords={"sample": [5, 6, 7]}))
    assert found.dims == ("sample", "task")
    assert found["sample"].values.tolist() == [5, 6, 7]
    np.testing.assert_allclose(found, scipy.stats.trim_mean(values, 0.25, axis=1), rtol=1e-14)


@pytest.mark.parametrize("statistic", [interquartile_mean, median])
def test_over_two_dimensions_all_their_runs_are_taken_together(statistic) -> None:
    x, _ = scores()
    flat = xarray.DataArray(x.values.ravel(), dims="seed")
    assert float(statistic(x, ["seed", "task"])) == float(statistic(x.T, ("task", "seed"))) == float(statistic(flat))


@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_a_quarter_may_diverge_before_the_interquartile_mean_does(worst: float) -> None:
    runs = xarray.DataArray(np.arange(50.0), dims="seed")
    assert float(interquartile_mean(runs.where(runs < 38, worst))) == float(interquartile_mean(runs)) == 24.5
    assert float(interquartile_mean(runs.where(runs < 37, worst))) == np.inf


def test_a_diverged_run_is_not_left_out() -> None:
    runs = xarray.DataArray([np.nan, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], dims="seed")
    assert float(interquartile_mean(runs)) == 4.5
    assert float(median(runs)) == 4.5


def test_scores_may_call_a_diverged_run_the_worst() -> None:
    runs = xarray.DataArray([1.0, 2.0, 4.0, np.nan], dims="seed").fillna(-np.inf)
    assert float(interquartile_mean(runs)) == 1.5


def test_statistics_leave_their_input_alone() -> None:
    x, y = scores()
    x[0, 0] = np.nan
    before = x.copy(deep=True), y.copy(deep=True)
    interquartile_mean(x)
    median(x)
    bootstrap_interval(x, resamples=5)
    probability_of_improvement(x, y, resamples=5)
    xarray.testing.assert_identical(before[0], x)
    xarray.testing.assert_identical(before[1], y)


# -------------------- intervals


def assert_near(interval: xarray.Dataset, expected: tuple[float, float, float]) -> None:
    """The estimate is exact. An end of 20,000 draws has a standard error of √(0.025 · 0.975 / 20,000) = 0.0011 by the
    density there, which for a normal distribution is 0.23 by the interval's width: 0.5 % of it. Six are allowed."""
    estimate, low, high = expected
    assert float(interval["estimate"]) == pytest.approx(estimate, rel=1e-8)
    assert float(interval["low"]) == pytest.approx(low, abs=0.03 * (high - low))
    assert float(interval["high"]) == pytest.approx(high, abs=0.03 * (high - low))


def test_the_stratified_interval_is_rliables() -> None:
    x, _ = scores()
    assert_near(bootstrap_interval(x, stratify="task", resamples=20000), RLIABLE["aggregate_iqm"])


def test_any_statistic_has_an_interval() -> None:
    x, _ = scores()
    interval = bootstrap_interval(
        x, lambda values, over: values.mean("seed").median("task"), stratify=["task"], resamples=20000
    )
    assert_near(interval, RLIABLE["aggregate_median"])


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    """Of 400 samples of 40 runs; the bootstrap's own shortfall is 1 to 2 %, three standard errors are 4.5 %."""
    runs = xarray.DataArray(np.random.default_rng(5).normal(7.0, 2.0, size=(400, 40)), dims=("value", "seed"))
    interval = bootstrap_interval(runs, lambda values, over: values.mean(over), confidence=0.9, resamples=500)
    covered = ((interval["low"] < 7) & (interval["high"] > 7)).mean()
    assert 0.84 < float(covered) < 0.945


def test_strata_are_drawn_independently() -> None:
    """Two tasks with the same runs: drawn together, their sum would vary by √2 more."""
    runs = np.random.default_rng(1).normal(size=30)
    both = xarray.DataArray(np.stack([runs, runs]), dims=("task", "seed"))
    mean = {"statistic": lambda values, over: values.mean(over), "resamples": 4000}
    apart, together = bootstrap_interval(both, stratify="task", **mean), bootstrap_interval(both[0], **mean)
    ratio = (together["high"] - together["low"]) / (apart["high"] - apart["low"])
    assert float(ratio) == pytest.approx(np.sqrt(2), rel=0.1)


def test_the_interval_keeps_the_other_dimensions_in_order() -> None:
    values = xarray.DataArray(
        np.random.default_rng(2).normal(size=(2, 9, 3, 4)),
        dims=("algorithm", "seed", "task", "sample"),
        coords={"algorithm": ["sgd", "popart"], "sample": [10, 20, 30, 40]},
    )
    interval = bootstrap_interval(values, stratify="task", resamples=50)
    assert interval["low"].dims == ("algorithm", "sample")
    assert interval["algorithm"].values.tolist() == ["sgd", "popart"]
    xarray.testing.assert_allclose(interval["estimate"], interquartile_mean(values, ["seed", "task"]))
    alone = bootstrap_interval(values.sel(algorithm="popart", sample=30), stratify="task", resamples=50)
    assert float(alone["high"]) == float(interval["high"].sel(algorithm="popart", sample=30))


def test_the_interval_does_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    values = xarray.DataArray(np.random.default_rng(2).normal(size=(7, 12)), dims=("sample", "seed"))
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr(_runs, "_CHUNK", 2400)
    xarray.testing.assert_identical(bootstrap_interval(values, resamples=100), whole)


def test_the_seed_decides_the_draws() -> None:
    x, _ = scores()
    xarray.testing.assert_identical(bootstrap_interval(x, resamples=50), bootstrap_interval(x, resamples=50))
    assert not bootstrap_interval(x, resamples=50, seed=1).identical(bootstrap_interval(x, resamples=50))


def test_an_end_among_diverged_runs_is_infinite() -> None:
    """With 2001 draws the ends fall on draws, where interpolation has a weight of zero."""
    runs = np.random.default_rng(0).normal(10.0, 1.0, size=(3, 40))
    runs[1, :8] = np.nan  # A fifth: the estimate is finite, some draws are not.
    runs[2, :] = np.inf
    interval = bootstrap_interval(xarray.DataArray(runs, dims=("value", "seed")), resamples=2001)
    assert np.isfinite(interval["estimate"]).values.tolist() == [True, True, False]
    assert np.isfinite(interval["low"]).values.tolist() == [True, True, False]
    assert interval["high"].values.tolist()[1:] == [np.inf, np.inf]
    assert np.isfinite(float(interval["high"][0]))


# -------------------- the best setting


def test_the_best_setting_has_the_least_interquartile_mean() -> None:
    error = xarray.DataArray(
        np.random.default_rng(4).lognormal(size=(3, 4, 10)) + np.arange(3)[::-1, None, None],
        {"learning_rate": [0.1, 0.2, 0.3], "step_size": [1.0, 2.0, 3.0, 4.0]},
        ("learning_rate", "step_size", "seed"),
    )
    error[2, 1] = -1  # The least, but for the third of its runs that diverged.
    error[2, 1, :3] = np.nan
    best = best_setting(error, confidence=0.9)
    means = interquartile_mean(error)
    assert float(best["estimate"]) == float(means.min())
    chosen = error.sel(learning_rate=best["learning_rate"], step_size=best["step_size"])
    xarray.testing.assert_identical(best, bootstrap_interval(chosen, confidence=0.9))


def test_a_single_run_has_a_best_setting_and_no_interval() -> None:
    best = best_setting(xarray.DataArray([[3.0], [2.0]], {"step_size": [0.1, 0.2]}, ("step_size", "seed")))
    assert (float(best["step_size"]), float(best["estimate"])) == (0.2, 2.0)
    assert np.isnan([float(best["low"]), float(best["high"])]).all()


# -------------------- the probability of improvement


def test_the_probability_of_improvement_is_mann_whitneys_u() -> None:
    x, y = scores()
    found = probability_of_improvement(x, y, better="larger", resamples=10)["estimate"]
    u = scipy.stats.mannwhitneyu(x.values, y.values).statistic
    np.testing.assert_allclose(found, u / (11 * 9), rtol=1e-14)
    np.testing.assert_allclose(probability_of_improvement(x, y, resamples=10)["estimate"], 1 - found, rtol=1e-14)


def test_the_probability_of_improvement_and_its_interval_are_rliables() -> None:
    x, y = scores()
    interval = probability_of_improvement(x, y, stratify="task", better="larger", resamples=20000)
    assert_near(interval, RLIABLE["probability_of_improvement"])


def test_estimates_are_those_of_rliables_own_functions() -> None:
    """``pip install --no-deps rliable`` is enough for it."""
    rliable = pytest.importorskip("rliable.metrics", reason="needs rliable")
    for runs in range(4, 30):
        random = np.random.default_rng(runs)
        x, y = (xarray.DataArray(random.lognormal(size=(runs + i, 3)), dims=("seed", "task")) for i in (0, 2))
        found = interquartile_mean(x, over=("seed", "task"))
        np.testing.assert_allclose(found, rliable.aggregate_iqm(x.values), rtol=1e-13)
        np.testing.assert_allclose(median(x.mean("seed"), over="task"), rliable.aggregate_median(x.values), rtol=1e-13)
        better = probability_of_improvement(x, y, stratify="task", better="larger", resamples=2)["estimate"]
        np.testing.assert_allclose(better, rliable.probability_of_improvement(x.values, y.values), rtol=1e-13)


def test_a_diverged_run_is_the_worst_for_errors_and_for_scores() -> None:
    diverged, good = (xarray.DataArray(runs, dims="seed") for runs in ([np.nan, np.nan], [1.0, 2.0, 3.0]))
    for better in ("smaller", "larger"):
        assert float(probability_of_improvement(good, diverged, better=better)["estimate"]) == 1
        assert float(probability_of_improvement(diverged, good, better=better)["estimate"]) == 0
        assert float(probability_of_improvement(diverged, diverged, better=better)["low"]) == 0.5


def test_many_are_compared_with_one() -> None:
    x, y = scores()
    many = xarray.concat([x, x + 100], xarray.Variable("algorithm", ["a", "b"]))
    found = probability_of_improvement(many, y, resamples=20)
    assert found["estimate"].dims == ("algorithm", "task")
    assert (found["estimate"].sel(algorithm="b") == 0).all()
    alone = probability_of_improvement(many.sel(algorithm="a"), y, resamples=20)
    xarray.testing.assert_allclose(found.sel(algorithm="a"), alone)


def test_a_diverged_run_is_infinitely_bad_beside_minus_infinity_and_there_is_no_warning() -> None:
    """Minus infinity is what a score is that diverged, and no error can outweigh divergence."""
    mixed = xarray.DataArray([np.nan, -np.inf], dims="seed")
    assert float(interquartile_mean(mixed)) == np.inf
    assert float(median(mixed)) == np.inf
    assert float(interquartile_mean(xarray.DataArray([-np.inf, 1.0, 2.0], dims="seed"))) == -np.inf
    interval = bootstrap_interval(mixed, resamples=50)
    assert (float(interval["low"]), float(interval["estimate"]), float(interval["high"])) == (-np.inf, np.inf, np.inf)


def test_a_mean_beyond_float64_is_infinite() -> None:
    assert float(interquartile_mean(xarray.DataArray([1e308, 1.5e308], dims="seed"))) == np.inf


# -------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: interquartile_mean(x, "run"),
            r"interquartile_mean: `over` must be among \['seed', 'task'\], got 'run'\.",
        ),
        (lambda x: median(x, ()), r"median: `over` must hold at least one of \['seed', 'task'\], got none\."),
        (lambda x: median(x, ["seed", "seed"]), r"median: `over` must be distinct, got 'seed' more than once\."),
        (
            lambda x: median(x.isel(seed=slice(0))),
            r"median: `values` must have at least 1 run along 'seed', got 0\.",
        ),
        (
            lambda x: bootstrap_interval(x, over="run"),
            r"bootstrap_interval: `over` must be among \['seed', 'task'\], got 'run'\.",
        ),
        (
            lambda x: bootstrap_interval(x, stratify="seed"),
            r"bootstrap_interval: `stratify` must be among \['task'\], got 'seed'\.",
        ),
        (
            lambda x: bootstrap_interval(x.isel(seed=[0])),
            r"bootstrap_interval: `values` must have at least 2 runs along 'seed', got 1\.",
        ),
        (
            lambda x: bootstrap_interval(x, confidence=95.0),
            r"bootstrap_interval: `confidence` must be > 0 and < 1, got 95\.0\.",
        ),
        (
            lambda x: bootstrap_interval(x, resamples=0),
            r"bootstrap_interval: `resamples` must be at least 1, got 0\.",
        ),
        (
            lambda x: bootstrap_interval(x, lambda values, over: values.mean("seed"), stratify="task"),
            r"bootstrap_interval: `statistic` must aggregate \['seed', 'task'\] and keep all other dimensions, "
            r"got \['task'\]\.",
        ),
        (
            lambda x: probability_of_improvement(x, x.isel(seed=[0])),
            r"probability_of_improvement: `y` must have at least 2 runs along 'seed', got 1\.",
        ),
        (
            lambda x: probability_of_improvement(x, x.isel(task=slice(2))),
            r"probability_of_improvement: `x` and `y` must have the same coordinates but for 'seed': .*task",
        ),
    ],
)
def test_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        call(scores()[0])


@pytest.mark.usefixtures("unchecked")
def test_says_what_type_is_wrong() -> None:
    x, y = scores()
    with pytest.raises(TypeError, match=r"median: `values` must be real numbers, got dtype <U"):
        median(x.astype(str))
    with pytest.raises(TypeError, match=r"bootstrap_interval: `resamples` must be an integer, got float\."):
        bootstrap_interval(x, resamples=1e3)
    with pytest.raises(ValueError, match=r"`better` must be among \['smaller', 'larger'\], got 'lower'\."):
        probability_of_improvement(x, y, better="lower")
