from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import synthetic
import xarray

from popart_func.experiments import results


@pytest.fixture(scope="module")
def dataset() -> xarray.Dataset:
    return synthetic.dataset()


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


class TestSummary:
    def test_form(self, dataset: xarray.Dataset) -> None:
        found = results.summary(dataset)
        assert list(found) == ["algorithms"]
        assert list(found["algorithms"]) == ["sgd", "art", "popart", "normalized_sgd"]
        for name, one in found["algorithms"].items():
            assert list(one) == ["learning_rate", "step_size", "seconds", "rmse"]
            assert list(one["rmse"]) == ["sample", "median", "p10", "p90"]
            assert one["rmse"]["sample"] == list(range(4995))
            for curve in ("median", "p10", "p90"):
                assert len(one["rmse"][curve]) == 4995
                assert all(type(value) is float and math.isfinite(value) for value in one["rmse"][curve])
            assert one["step_size"] is None if name == "sgd" else type(one["step_size"]) is float
            assert one["seconds"] == 6.0
        assert found["algorithms"]["popart"]["learning_rate"] == 10**-2.5
        assert found["algorithms"]["art"]["step_size"] == 1e-4

    def test_curves(self, dataset: xarray.Dataset) -> None:
        rmse = results.summary(dataset)["algorithms"]["art"]["rmse"]
        values = dataset["rmse"].sel(algorithm="art", sample=1000).values.astype(float)
        assert [rmse[name][1000] for name in ("median", "p10", "p90")] == list(np.percentile(values, [50, 10, 90]))

    def test_what_is_not_finite_is_null(self, dataset: xarray.Dataset) -> None:
        diverged = dataset.copy(deep=True)
        diverged["rmse"].values[0, :, 7] = [np.nan, np.inf, np.nan]
        diverged["rmse"].values[0, :, 8] = [1.0, 2.0, np.nan]
        rmse = results.summary(diverged)["algorithms"]["sgd"]["rmse"]
        assert [rmse[name][7] for name in ("median", "p10", "p90")] == [None, None, None]
        assert rmse["median"][8] == 2.0
        assert rmse["p90"][8] is None
        json.dumps(rmse, allow_nan=False)


class TestWrite:
    def test_writes_three_files_that_read_back(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        paths = results.write(dataset, tmp_path / "deep" / "results")
        assert paths == [tmp_path / "deep" / "results" / name for name in ("curves.zarr", "summary.json", "figure.png")]
        assert _names(tmp_path / "deep") == {"results"}
        assert _names(tmp_path / "deep" / "results") == set(results.FILES)
        with xarray.open_zarr(paths[0]) as curves:
            assert curves.load().identical(dataset)
        assert json.loads(paths[1].read_text()) == results.summary(dataset)
        assert paths[2].read_bytes().startswith(b"\x89PNG")

    def test_permissions_are_the_usual_ones(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        (tmp_path / "usual").mkdir()
        results.write(dataset, tmp_path / "results")
        assert stat.S_IMODE((tmp_path / "results").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)

    def test_an_empty_directory_is_filled(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        (tmp_path / "results").mkdir()
        results.write(dataset, tmp_path / "results")
        assert _names(tmp_path / "results") == set(results.FILES)

    def test_results_are_not_overwritten(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "summary.json").write_text("precious")
        with pytest.raises(
            FileExistsError, match=r"results already holds results: name another directory, or overwrite"
        ):
            results.write(dataset, tmp_path / "results")
        assert (tmp_path / "results" / "summary.json").read_text() == "precious"

    def test_force_replaces_results(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        results.write(dataset, tmp_path / "results")
        (tmp_path / "results" / "figure.png").unlink()
        results.write(dataset.isel(algorithm=[2]), tmp_path / "results", force=True)
        assert _names(tmp_path) == {"results"}
        assert _names(tmp_path / "results") == set(results.FILES)
        assert list(json.loads((tmp_path / "results" / "summary.json").read_text())["algorithms"]) == ["popart"]

    def test_force_follows_a_link(self, dataset: xarray.Dataset, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "results").symlink_to(tmp_path / "run")
        results.write(dataset, tmp_path / "results", force=True)
        assert (tmp_path / "results").is_symlink()
        assert _names(tmp_path / "run") == set(results.FILES)

    @pytest.mark.parametrize("exception", [KeyboardInterrupt, OSError])
    @pytest.mark.parametrize("existing", [False, True])
    def test_an_interrupted_run_leaves_what_was_there(
        self,
        dataset: xarray.Dataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        exception: type[BaseException],
        existing: bool,
    ) -> None:
        if existing:
            results.write(dataset.isel(algorithm=[0]), tmp_path / "results")

        def interrupted(*_: object) -> None:
            raise exception

        monkeypatch.setattr(results, "figure", interrupted)
        with pytest.raises(exception):
            results.write(dataset, tmp_path / "results", force=True)
        assert _names(tmp_path) == ({"results"} if existing else set())
        if existing:
            assert list(json.loads((tmp_path / "results" / "summary.json").read_text())["algorithms"]) == ["sgd"]

    def test_a_failed_exchange_puts_the_old_back(
        self, dataset: xarray.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results.write(dataset.isel(algorithm=[0]), tmp_path / "results")
        rename = Path.rename

        def failing(path: Path, target: Path) -> Path:
            if path.suffix == ".partial":
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            results.write(dataset, tmp_path / "results", force=True)
        assert _names(tmp_path) == {"results"}
        assert list(json.loads((tmp_path / "results" / "summary.json").read_text())["algorithms"]) == ["sgd"]


class TestAsDirectory:
    @pytest.mark.parametrize("force", [False, True])
    def test_nothing_foreign_is_ever_replaced(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "summary.json").touch()
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(
            FileExistsError, match=r"holds 'thesis\.tex', which is not part of a result, so it is never"
        ):
            results.as_directory(tmp_path, force=force)

    def test_a_file_is_no_directory(self, tmp_path: Path) -> None:
        (tmp_path / "results").touch()
        with pytest.raises(FileExistsError, match=r"results is a file, not a directory for results\."):
            results.as_directory(tmp_path / "results", force=True)
        with pytest.raises(NotADirectoryError, match=r"can't be made: .*results is not a directory\."):
            results.as_directory(tmp_path / "results" / "deeper")

    def test_the_current_directory_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path} is the current directory")):
            results.as_directory(".", force=True)

    def test_a_place_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(PermissionError, match=r"can't be made: .* is not writable \(Permission denied\)\."):
            results.as_directory(tmp_path / "results")

    def test_leaves_no_trace(self, tmp_path: Path) -> None:
        assert results.as_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        assert _names(tmp_path) == set()

    def test_a_tilde_is_the_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert results.as_directory("~/results") == tmp_path / "results"
