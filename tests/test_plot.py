from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import xarray
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from popart_func.display.canvas import number, value_of
from popart_func.experiments.names import LABELS, STYLES
from popart_func.experiments.plot import figure
from popart_func.sweeps.plot import curves, heat_map
from popart_func.sweeps.statistics import bootstrap_interval, interquartile_mean


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figure, Path]:
    path = tmp_path_factory.mktemp("plot") / "figure.png"
    return figure(synthetic.dataset(), path), path


def _extent(artist: object) -> Bbox:
    return artist.get_window_extent()  # type: ignore[attr-defined]


def test_writes_a_png(drawn: tuple[Figure, Path]) -> None:
    assert drawn[1].read_bytes().startswith(b"\x89PNG")


def test_axes_are_labelled_and_the_error_is_logarithmic(drawn: tuple[Figure, Path]) -> None:
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "RMSE of the unnormalized prediction"
    assert axes.get_xlabel() == "number of samples"


def test_shows_median_and_band_of_each_algorithm(drawn: tuple[Figure, Path]) -> None:
    (axes,) = drawn[0].axes
    result = synthetic.dataset()
    assert [line.get_label() for line in axes.lines] == ["SGD", "ART", "Pop-Art", "normalized SGD"]
    assert len({line.get_color() for line in axes.lines}) == 4
    assert len(axes.collections) == 4
    for line, curve in zip(axes.lines, result["rmse"].median("seed").values, strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve, rtol=1e-6)


def test_the_spikes_are_within_the_axes(drawn: tuple[Figure, Path]) -> None:
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[1] > float(synthetic.dataset()["rmse"].max())


def test_the_legend_covers_nothing_and_no_labels_overlap(drawn: tuple[Figure, Path]) -> None:
    (axes,) = drawn[0].axes
    (legend,) = drawn[0].legends
    assert not _extent(legend).overlaps(_extent(axes))
    assert not _extent(legend).overlaps(_extent(axes.title))
    whole = drawn[0].bbox
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        extents = [_extent(label) for label in labels if label.get_text()]
        shown = [extent for extent in extents if extent.overlaps(whole) and extent.width]
        for position, extent in enumerate(shown):
            assert not any(extent.overlaps(other) for other in shown[position + 1 :])
    for text in (axes.xaxis.label, axes.yaxis.label, legend):
        extent = _extent(text)
        assert whole.x0 <= extent.x0 <= extent.x1 <= whole.x1
        assert whole.y0 <= extent.y0 <= extent.y1 <= whole.y1


def test_diverged_seeds_leave_a_gap_and_no_warning(tmp_path: Path) -> None:
    result = synthetic.dataset(algorithms=["sgd", "popart"])
    result["rmse"].values[0, :, 3000:] = np.nan
    before = result.copy(deep=True)
    (axes,) = figure(result, tmp_path / "figure.png").axes
    assert np.isnan(axes.lines[0].get_ydata()[3000:]).all()
    assert before.identical(result)


def test_one_seed_and_one_algorithm(tmp_path: Path) -> None:
    (axes,) = figure(synthetic.dataset([7], ["art"]), tmp_path / "figure.png").axes
    assert axes.get_title(loc="left").startswith("Median and 10th to 90th percentile over 1 seed,")


def test_needs_the_curves(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"figure: `dataset` must have a variable 'rmse' \(algorithm, seed, sample\), got"
    ):
        figure(synthetic.dataset().drop_vars("rmse"), tmp_path / "figure.png")


def test_leaves_pyplot_alone() -> None:
    code = "import sys; from popart_func.experiments import plot; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------- curves


def _waves(**sizes: int) -> xarray.DataArray:
    """Curves around 10 and more, of some seeds and samples and whatever else is asked for."""
    shape = {"seed": 9, "sample": 20, **sizes}
    values = np.random.default_rng(0).lognormal(2.3, 0.4, size=tuple(shape.values()))
    values *= 1 + np.arange(values.size).reshape(values.shape) % max(shape.get("algorithm", 1), 1)
    return xarray.DataArray(values, dims=list(shape), name="absolute_error")


def test_curves_are_interquartile_means_with_their_intervals(tmp_path: Path) -> None:
    values = _waves(algorithm=2).assign_coords(algorithm=["sgd", "popart"], sample=np.arange(100, 120))
    (axes,) = curves(values, tmp_path / "curves.png", resamples=50, labels=LABELS, styles=STYLES).axes
    assert [line.get_label() for line in axes.lines] == ["SGD", "Pop-Art"]
    assert [line.get_color() for line in axes.lines] == [STYLES[name]["color"] for name in ("sgd", "popart")]
    interval = bootstrap_interval(values, resamples=50)
    for name, line, band in zip(values["algorithm"].values, axes.lines, axes.collections, strict=True):
        one = interval.sel(algorithm=name)
        np.testing.assert_array_equal(line.get_xdata(), values["sample"])
        np.testing.assert_allclose(line.get_ydata(), one["estimate"])
        drawn = np.concatenate([path.vertices for path in band.get_paths()])
        assert {*np.round(one["low"].values, 9), *np.round(one["high"].values, 9)} <= {*np.round(drawn[:, 1], 9)}
    assert axes.get_title(loc="left") == "Interquartile mean and its 95 % interval over 9 seeds"
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_yscale()) == ("absolute error", "sample", "log")


def test_curves_of_percentiles_on_a_linear_axis(tmp_path: Path) -> None:
    values = _waves() - 20
    values[:, 3:5] = np.nan
    values = values.assign_coords(sample=("sample", np.arange(20), {"long_name": "training steps"}))
    drawn = curves(values, tmp_path / "curves.png", band="percentiles", log=False)
    (axes,) = drawn.axes
    assert np.isnan(axes.lines[0].get_ydata()).nonzero()[0].tolist() == [3, 4]
    assert (axes.lines[0].get_ydata()[:3] < 0).any()
    assert (axes.get_yscale(), axes.get_xlabel()) == ("linear", "training steps")
    assert not drawn.legends


def test_many_curves_have_a_legend_that_fits(tmp_path: Path) -> None:
    values = _waves(step_size=2, learning_rate=3).assign_coords(
        step_size=[0.1, 10**-0.5], learning_rate=[1e-3, 2.5e-3, 1e-2]
    )
    drawn = curves(values, tmp_path / "curves.png", resamples=5)
    (legend,) = drawn.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == [r"$\beta$ = $10^{-1}$, $\alpha$ = $10^{-3}$", r"$\beta$ = $10^{-1}$, $\alpha$ = 0.0025"]
    assert len(labels) == 6
    assert drawn.bbox.x0 <= _extent(legend).x0 < _extent(legend).x1 <= drawn.bbox.x1
    assert not _extent(legend).overlaps(_extent(drawn.axes[0]))


def test_curves_need_time_and_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"curves: `along` must be among \['sample'\], got 'seed'\."):
        curves(_waves(), tmp_path / "curves.png", along="seed")
    with pytest.raises(ValueError, match=r"curves: `over` must be among \['seed', 'sample'\], got 'run'\."):
        curves(_waves(), tmp_path / "curves.png", over="run")


# -------------------- heat maps

POWERS = 10.0 ** np.arange(-3, 0.1, 0.5)


def _errors() -> xarray.DataArray:
    """Four learners on a grid of 7 by 7, the first without a step size, with diverged runs at large learning rates."""
    rate, step = np.meshgrid(np.log10(POWERS), np.log10(POWERS), indexing="ij")
    level = [100 * np.exp((rate + 2) ** 2 + least * (step + 1.5) ** 2) for least in (0, 1, 2, 3)]
    noise = np.random.default_rng(0).lognormal(sigma=0.2, size=(4, 7, 7, 8))
    error = xarray.DataArray(
        np.stack(level)[..., None] * noise,
        {"learner": ["sgd", "art", "popart", "mine"], "learning_rate": POWERS, "step_size": POWERS},
        ("learner", "learning_rate", "step_size", "seed"),
        name="final_error",
    )
    error[0] = error[0].values[:, :1]
    error[:3, 5, :, :2] = np.nan
    error[:, 6, :, :3] = np.inf
    return error


@pytest.fixture(scope="module")
def map_of_errors(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    path = tmp_path_factory.mktemp("plot") / "grid.png"
    drawn = heat_map(_errors(), path, labels=LABELS)
    assert path.read_bytes().startswith(b"\x89PNG")
    return drawn


def _cells(axes: Axes, hatch: str | None) -> set[tuple[float, float]]:
    """Column and row of the cells that have a mark."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch() == hatch]
    return {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in patches}


def test_the_colours_are_interquartile_means(map_of_errors: Figure) -> None:
    means = interquartile_mean(_errors())
    norm = map_of_errors.axes[1].images[0].norm
    assert norm.vmin == pytest.approx(float(means.min()))
    assert norm.vmax <= 1000 * norm.vmin
    for panel in (1, 2, 3):
        shown = map_of_errors.axes[panel].images[0].get_array()
        np.testing.assert_allclose(shown.filled(np.inf), means[panel])


def test_a_learner_without_a_step_size_is_one_column(map_of_errors: Figure) -> None:
    first = map_of_errors.axes[0]
    assert first.images[0].get_array().shape == (7, 1)
    assert first.get_xlabel() == r"no step size $\beta$"
    assert not first.get_xticks().size
    assert r"$\beta$" not in first.get_title(loc="left")


def test_the_best_setting_is_framed_and_told_with_its_interval(map_of_errors: Figure) -> None:
    assert _cells(map_of_errors.axes[0], None) == {(0, 2)}
    assert _cells(map_of_errors.axes[2], None) == {(3, 2)}
    best = bootstrap_interval(_errors().isel(learner=2, learning_rate=2, step_size=3))
    numbers = [number(float(best[end])) for end in ("estimate", "low", "high")]
    assert map_of_errors.axes[2].get_title(loc="left") == (
        f"Pop-Art\n{numbers[0]} ({numbers[1]} to {numbers[2]})\n" + r"$\alpha$ = $10^{-2}$, $\beta$ = $10^{-1.5}$"
    )


def test_diverged_cells_are_marked_by_how_many_runs_diverged(map_of_errors: Figure) -> None:
    whole_row = {(column, row) for column in range(7) for row in [6]}
    assert _cells(map_of_errors.axes[1], "xxxx") == whole_row
    assert _cells(map_of_errors.axes[1], "////") == {(column, row - 1) for column, row in whole_row}
    assert _cells(map_of_errors.axes[3], "////") == set()
    (legend,) = map_of_errors.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "best setting",
        "a quarter of the runs or fewer diverged",
        "more than a quarter diverged",
    ]


def test_the_legend_names_only_what_is_there(tmp_path: Path) -> None:
    calm = _errors().isel(learning_rate=slice(5))
    (legend,) = heat_map(calm, tmp_path / "grid.png").legends
    assert [text.get_text() for text in legend.get_texts()] == ["best setting"]


def test_ticks_are_powers_in_ascending_order(tmp_path: Path) -> None:
    axes = heat_map(_errors()[:, ::-1, ::-1], tmp_path / "grid.png").axes[1]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        texts = [label.get_text() for label in labels]
        assert texts == [f"$10^{{{power}}}$" for power in ("-3", "-2.5", "-2", "-1.5", "-1", "-0.5", "0")]
    assert _cells(axes, "xxxx") == {(column, 6) for column in range(7)}


def test_nothing_in_the_map_overlaps(map_of_errors: Figure) -> None:
    whole, (legend,) = map_of_errors.bbox, map_of_errors.legends
    panels, texts = map_of_errors.axes[:-1], [legend]
    for axes in panels:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            extents = [_extent(label) for label in labels]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(extents))
        texts += [axes._left_title, axes.xaxis.label]
    texts += [map_of_errors.axes[-1].yaxis.label, panels[0].yaxis.label]
    for position, text in enumerate(texts):
        extent = _extent(text)
        assert whole.x0 <= extent.x0 <= extent.x1 <= whole.x1
        assert whole.y0 <= extent.y0 <= extent.y1 <= whole.y1
        assert not any(extent.overlaps(_extent(other)) for other in texts[position + 1 :])
        assert not any(extent.overlaps(_extent(axes)) for axes in panels)


def test_panels_by_name_may_have_other_grids(tmp_path: Path) -> None:
    error = _errors()
    panels = {
        "sgd": error.sel(learner="sgd").isel(step_size=0, drop=True),
        "my_learner": error.sel(learner="mine").isel(learning_rate=slice(4)),
    }
    first, second, _ = heat_map(panels, tmp_path / "grid.png", label="last error").axes
    assert first.images[0].get_array().shape == (7, 1)
    assert second.images[0].get_array().shape == (4, 7)
    assert second.get_title(loc="left").startswith("my learner\n")


def test_a_map_of_nothing_but_divergence(tmp_path: Path) -> None:
    drawn = heat_map(_errors().isel(learner=1) * np.nan, tmp_path / "grid.png")
    assert len(_cells(drawn.axes[0], "xxxx")) == 49
    assert drawn.axes[0].get_title(loc="left") == "\nall diverged\n"
    assert len(drawn.axes) == 1, "no bar, for there are no colours"


@pytest.mark.parametrize("most", [23.6, 24.5, 30.0, 75.0, 150.0, 300.0, 2000.0, 1e6])
@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e5])
def test_the_colours_have_numbers_in_a_small_grid_too(tmp_path: Path, most: float, unit: float) -> None:
    error = xarray.DataArray(
        np.array([[23.5, most], [23.5, most]])[..., None] * unit,
        {"learning_rate": [0.1, 1.0], "step_size": [0.1, 1.0]},
        ("learning_rate", "step_size", "seed"),
        name="final_error",
    )
    drawn = heat_map(error, tmp_path / "grid.png")
    bar = drawn.axes[-1]
    assert bar.get_ylabel().startswith("final error\n")
    low, high = bar.get_ylim()
    numbers = [label for label in bar.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert 2 <= len(numbers) <= 8
    extents = [_extent(label) for label in numbers]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(extents))
    assert all(extent.x1 <= _extent(bar.yaxis.label).x0 for extent in extents)


def test_a_single_run_has_no_interval_and_zero_has_a_colour(tmp_path: Path) -> None:
    error = _errors().isel(learner=1, seed=[4])
    error[2, 3] = 0
    axes = heat_map(error, tmp_path / "grid.png").axes[0]
    assert axes.get_title(loc="left").startswith("\n0\n")
    assert not np.ma.getmaskarray(axes.images[0].get_array())[2, 3]


def test_negative_values_have_linear_colours(tmp_path: Path) -> None:
    """Such as the negative of a return. The least is the best; all may be equal."""
    error = _errors().isel(learner=1, seed=[4])
    error[:] = np.arange(error.size).reshape(error.shape) - 10.0
    axes = heat_map(error, tmp_path / "grid.png").axes
    assert axes[0].get_title(loc="left").startswith("\n-10.0\n")
    norm = axes[0].images[0].norm
    assert type(norm) is Normalize
    assert (norm.vmin, norm.vmax) == (-10, error.size - 11)
    np.testing.assert_array_equal(axes[0].images[0].get_array().ravel(), np.sort(error.values.ravel()))
    low, high = axes[-1].get_ylim()
    assert sum(low <= tick <= high for tick in axes[-1].get_yticks()) >= 2
    heat_map(error * 0 - 1, tmp_path / "equal.png")


def test_the_map_leaves_the_errors_alone(tmp_path: Path) -> None:
    error = _errors()
    heat_map(error, tmp_path / "grid.png")
    xarray.testing.assert_identical(error, _errors())


def test_the_map_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    with pytest.raises(
        ValueError,
        match=r"heat_map: `error` must have the dimensions \['seed', 'step_size', 'learning_rate'\], and at most one "
        r"more, got \['sample', 'learner', .*\]\. Choose what to draw, such as `error\.isel\(sample=-1\)`\.",
    ):
        heat_map(_errors().expand_dims(sample=2), path)
    with pytest.raises(ValueError, match=r"'learning_rate'\] in 'SGD', got \['learner', 'learning_rate'"):
        heat_map({"sgd": _errors()}, path, labels=LABELS)
    with pytest.raises(ValueError, match=r"heat_map: `error` must hold at least one panel, got none\."):
        heat_map({}, path)
    assert not path.exists()


# -------------------- words and numbers


def test_powers_are_written_as_powers() -> None:
    assert value_of(float(np.float32(10**-4.5)), {}) == "$10^{-4.5}$"
    assert [value_of(value, LABELS) for value in (1.0, 0.25, 0.0, -1.0, 3, "normalized_sgd", "my_own")] == [
        "$10^{0}$",
        "0.25",
        "0",
        "-1",
        "3",
        "normalized SGD",
        "my own",
    ]


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (0.01234, 1.2, 16.0, 254.4, 6768.2, 1.234e7, 0.0, np.inf)] == [
        "0.0123",
        "1.20",
        "16.0",
        "254",
        "6,768",
        "1.23e+07",
        "0",
        "inf",
    ]
