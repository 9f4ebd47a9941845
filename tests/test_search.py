"""The paper's grid: what a setting is judged by, and the command."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray

from popart_func.cli import main
from popart_func.experiments import regression, search, search_report
from popart_func.experiments.names import HALF_DECADES
from popart_func.sweeps import load
from popart_func.sweeps.job import Job
from popart_func.sweeps.statistics import bootstrap_interval

RATE, STEP_SIZE = 10**-2.5, 10**-0.5
WORDS = [
    *("--algorithms", "art", "popart"),
    *("--learning-rates", "0.0001", "0.0031622776601683795", "1"),
    *("--step-sizes", "0.31622776601683794", "1"),
    *("--seeds", "4"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real thing, small."""
    out = tmp_path_factory.mktemp("search") / "sweep"
    assert main(["sweep", *WORDS, "--engine", "native", "--out", str(out)]) == 0
    return out


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("run")

    monkeypatch.setattr(Job, "run", run)


class TestSweepGrid:
    def test_the_grid_is_the_papers(self):
        assert len(HALF_DECADES) == 11
        np.testing.assert_allclose(np.log10(HALF_DECADES), np.arange(-5, 0.5, 0.5), atol=1e-12)
        for rate, step_size in regression.SETTINGS.values():
            assert rate in HALF_DECADES
            assert step_size is None or step_size in HALF_DECADES

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"algorithms": ["adam"]}, ValueError, "`algorithms` must be among .*, got 'adam'"),
            ({"algorithms": None}, TypeError, "`algorithms` must be names among .*, got None"),
            ({"learning_rates": [0.0]}, ValueError, r"`learning_rates` must be > 0, got 0\.0"),
            ({"step_sizes": [0.5, 2]}, ValueError, r"`step_sizes` must be > 0 and <= 1, got 2\.0"),
            ({"step_sizes": ["0.5"]}, TypeError, "`step_sizes` must be an iterable of numbers"),
        ],
    )
    def test_bad_arguments(self, changes, error, message):
        with pytest.raises(error, match=f"^sweep_grid: {message}"):
            search.sweep_grid(**changes)

    def test_a_lane_is_the_run_that_reproduce_makes(self, finished):
        expected = regression.reproduce(range(4), algorithms=["popart"], engine="native")["rmse"].isel(algorithm=0)
        lane = load(finished).sel(learner="popart", learning_rate=RATE, step_size=STEP_SIZE)
        np.testing.assert_allclose(lane["rmse"], expected[:, ::50], rtol=1e-5, atol=0)
        assert (lane["sample"] == expected["sample"][::50]).all()

    def test_errors_are_those_before_and_after_the_statistics_saw_the_sample(self, finished):
        """POP keeps the prediction. ART alone with a step size of 1 puts it onto the target: nothing is learned."""
        grid = load(finished).sel(learning_rate=RATE)
        popart, art = grid.sel(learner="popart"), grid.sel(learner="art", step_size=1)
        np.testing.assert_array_equal(popart["final_error"], popart["recorded_error"])
        assert (art["recorded_error"] < 0.1).all()
        assert (art["final_error"] > 100).all()

    def test_what_diverged_is_told(self, finished):
        grid = load(finished)
        assert (grid["diverged_at"].sel(learner="popart", learning_rate=1) >= 0).all()
        assert (grid["diverged_at"].sel(learning_rate=1e-4) == -1).all()


def synthetic(algorithm: str = "popart", best: tuple[int, int] = (3, 2)) -> xarray.Dataset:
    """Errors of 100 and more, and of about 10 at one place of a grid; one learning rate diverges."""
    random = np.random.default_rng(0)
    rates, step_sizes = (1e-4, 10**-3.5, 10**-2.5, 0.1, 1.0), (1e-4, 0.1, STEP_SIZE)
    errors = 100 + 10 * random.random((1, 5, 3, 20))
    errors[0, best[0], best[1]] -= 90
    diverged = np.full(errors.shape, -1)
    diverged[0, 4] = 17
    axes = ("learner", "learning_rate", "step_size", "seed")
    named = dict.fromkeys(("final_error", "mean_error", "recorded_error"), (axes, errors))
    coordinates = {"learner": [algorithm], "learning_rate": list(rates), "step_size": list(step_sizes)}
    attributes = {"engine": "native", "device": "cpu", "dtype": "float32", "configuration_sha256": "0"}
    return xarray.Dataset({**named, "diverged_at": (axes, diverged)}, {**coordinates, "seed": range(20)}, attributes)


class TestJudge:
    def test_the_best_setting_with_its_interval(self):
        dataset = synthetic()
        found = search.judge(dataset, "popart")
        interval = bootstrap_interval(dataset["final_error"].isel(learner=0, learning_rate=3, step_size=2))
        assert found["best"]["learning_rate"] == 0.1
        assert found["best"]["step_size"] == STEP_SIZE
        assert found["best"]["diverged"] == 0
        for name in ("estimate", "low", "high"):
            assert found["best"][name] == float(interval[name])
        assert found["as_good"] == 1
        assert found["settings"] == 15
        assert (found["diverged_lanes"], found["lanes"]) == (60, 300)

    def test_the_papers_setting_beside_it(self):
        found = search.judge(synthetic(), "popart")
        assert found["paper"]["learning_rate"] == RATE
        assert 100 < found["paper"]["estimate"] < 110
        assert found["improvement"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}
        same = search.judge(synthetic(best=(2, 2)), "popart")
        assert same["paper"] == same["best"]
        assert same["improvement"]["estimate"] == 0.5

    def test_a_grid_without_the_papers_setting(self):
        found = search.judge(synthetic().isel(learning_rate=[0, 3]), "popart")
        assert found["paper"] is None
        assert found["improvement"] is None

    def test_a_diverged_setting_is_never_the_best(self):
        dataset = synthetic()
        dataset["final_error"][0, 4] = 1e-9
        assert search.judge(dataset, "popart")["best"]["learning_rate"] == 0.1
        everything = synthetic().isel(learning_rate=[4])
        found = search.judge(everything, "popart")
        assert found["best"]["estimate"] is None
        assert found["best"]["diverged"] == 20
        json.dumps(found, allow_nan=False)

    def test_sgd_has_no_step_size(self):
        found = search.judge(synthetic("sgd"), "sgd")
        assert "step_size" not in found["best"]
        assert found["settings"] == 5
        assert found["paper"]["learning_rate"] == 10**-3.5

    def test_what_there_is_to_judge(self):
        with pytest.raises(ValueError, match=r"judge: `algorithm` must be among \['popart'\], got 'sgd'"):
            search.judge(synthetic(), "sgd")
        with pytest.raises(ValueError, match=r"judge: `by` must be among .*'final_error'.*, got 'rmsd'"):
            search.judge(synthetic(), "popart", by="rmsd")

    def test_an_unfinished_sweep_is_not_judged(self):
        """What was not run would count as diverged."""
        dataset = synthetic()
        dataset["diverged_at"][0, 0, 0, :5] = -2
        with pytest.raises(
            ValueError, match=r"of a finished sweep, got 5 of 300 lanes of 'popart' that have not been run"
        ):
            search.judge(dataset, "popart")

    def test_the_table(self):
        from rich.console import Console

        console = Console(width=80, record=True, file=io.StringIO())
        console.print(search_report.table(search_report.summary(synthetic())))
        lines = console.export_text().splitlines()
        assert lines[0] == "Best of 300 lanes on native (cpu), 60 of which diverged"
        rows = [line.split() for line in lines if "best" in line or "paper's" in line]
        assert rows[0][:4] == ["Pop-Art", "best", "10^-1", "10^-0.5"]
        assert rows[1][:3] == ["paper's", "10^-2.5", "10^-0.5"]


class TestSpeed:
    @staticmethod
    def said(lane_steps: int) -> str | None:
        dataset = xarray.Dataset(attrs={"lane_steps": lane_steps, "all_lane_steps": 1_500_000, "seconds": 2.0})
        return search_report.speed(dataset, lambda: 3e-3)

    def test_of_a_whole_sweep(self):
        assert self.said(1_500_000) == (
            "1.5 million lane-steps in 2.0 s, 0.75 million/s, all included\n"
            "one module per seed: 3000 us a lane-step, 1.2 hours, 2,250 times as long"
        )

    def test_of_a_part_there_is_no_ratio(self):
        assert self.said(500_000) == "run now: 0.5 of 1.5 million lane-steps, in 2.0 s; the others were there"

    def test_of_nothing(self):
        assert self.said(0) is None


class TestCommand:
    def test_writes_a_summary_and_a_picture(self, finished, capsys):
        found = json.loads((finished / "summary.json").read_text())
        assert list(found["algorithms"]) == ["art", "popart"]
        popart = found["algorithms"]["popart"]["final_error"]
        assert (popart["best"]["learning_rate"], popart["best"]["step_size"]) == (RATE, STEP_SIZE)
        assert popart["best"] == popart["paper"]
        assert all(math.isfinite(popart["best"][name]) for name in ("estimate", "low", "high"))
        assert found["seeds"] == 4
        assert (finished / "heat_map.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.usefixtures("never_run")
    def test_a_finished_directory_is_only_printed(self, finished, capsys):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"}
        assert main(["sweep", *WORDS, "--out", str(finished)]) == 0
        out, err = capsys.readouterr()
        assert "Pop-Art   best, paper's 10^-2.5   10^-0.5" in out
        assert "wrote" not in out
        assert "million" not in out
        assert max(map(len, out.splitlines())) <= 80
        assert err == "2 of 2 chunks are done and whole.\n"
        assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != ".lock"} == before

    @pytest.mark.usefixtures("never_run")
    def test_what_is_named_twice_counts_once(self, finished, capsys):
        """As the help says."""
        assert main(["sweep", *WORDS, "--step-sizes", "1", "--learning-rates", "1", "--out", str(finished)]) == 0
        assert main(["sweep", "--help"]) == 0
        told = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "What is named twice counts once, here and below." in told
        assert "How many seeds, from 2 on, since intervals are over seeds." in told

    @pytest.mark.usefixtures("never_run")
    def test_a_smaller_grid_is_refused(self, finished, capsys):
        assert main(["sweep", *WORDS[:-1], "3", "--out", str(finished)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "holds another sweep: name another directory, or ask for the same.\n" in err
        assert "seeds: [0, 1, 2, 3] there, [0, 1, 2] here" in err

    @pytest.mark.usefixtures("never_run")
    def test_no_resume_refuses_a_directory_that_holds_a_sweep(self, finished, capsys):
        assert main(["sweep", *WORDS, "--no-resume", "--out", str(finished)]) == 1
        assert "holds a sweep: name another directory, or go on with it with --resume." in capsys.readouterr().err
        assert main(["sweep", *WORDS, "--resume", "--out", str(finished)]) == 0

    def test_interrupted_and_resumed(self, finished, tmp_path, monkeypatch, capsys):
        shutil.copytree(finished, tmp_path / "sweep")
        (tmp_path / "sweep" / "lanes.zarr" / "popart" / "diverged_at" / "c" / "0").unlink()
        (tmp_path / "sweep" / "summary.json").unlink()

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        words = ["sweep", *WORDS, "--out", str(tmp_path / "sweep")]
        with monkeypatch.context() as patch:
            patch.setattr(Job, "run", interrupted)
            assert main(words) == 130
        err = capsys.readouterr().err
        assert err.endswith(
            f"popart-func: interrupted; the same command goes on with what is done, in {tmp_path / 'sweep'}.\n"
        )
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert "run now: 0.1 of 0.2 million lane-steps, in " in out
        assert "times as long" not in out, "of a part it would say nothing"
        assert f"wrote {tmp_path / 'sweep' / 'summary.json'}" in out
        assert (tmp_path / "sweep" / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
        assert load(tmp_path / "sweep").identical(load(finished))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--seeds", "1"], 'Invalid value "1" for --seeds. Must be >= 2.'),
            (["--chunk", "0"], 'Invalid value "0" for --chunk. Must be >= 1.'),
            (["--chunk", "1.5"], 'Invalid value for --chunk: unable to convert "1.5" into int.'),
            (["--workers", "0"], "Choose a number of processes, at least 1, or ray, or ray://host:port."),
            (["--workers", "horses"], 'Invalid value "horses" for --workers.'),
            (["--workers", "ray://"], 'Invalid value "ray://" for --workers.'),
            (["--step-sizes", "2"], "Must be <= 1."),
            (["--learning-rates", "0"], "Must be > 0."),
            (["--learning-rates", "fast"], 'unable to convert "fast" into float.'),
            (["--learning-rates", "inf"], "Must be < inf."),
            (["--engine", "steam"], "Choose from: auto, "),
            (["--device", "nowhere"], "`device` must be one that works here, got "),
            (["--algorithms", "adam"], 'Choose from: "sgd", "art", '),
        ],
    )
    def test_bad_values(self, tmp_path, monkeypatch, capsys, words, message):
        monkeypatch.chdir(tmp_path)
        assert main(["sweep", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("popart-func: ")
        assert message in err
        assert list(tmp_path.iterdir()) == []


def test_the_reference_is_timed_behind_its_first_step(monkeypatch):
    """A first step imports what the optimizer needs, which takes longer than the samples that are timed."""
    lengths = []
    monkeypatch.setattr(search.competitors, "reference", lambda params, stream: lambda: lengths.append(len(stream)))
    assert search.reference_seconds(20) >= 0
    assert lengths == [1, 20]
