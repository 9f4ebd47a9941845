from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from popart_func.experiments.plot import figure


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
    code = "import sys, popart_func.experiments.plot; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
