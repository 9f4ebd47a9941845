from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import xarray

import popart_func
from popart_func import cli
from popart_func.cli import main
from popart_func.experiments import competitors, regression
from popart_func.experiments.names import ALGORITHMS, COMPETITORS, LABELS, STYLES


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The real thing, small, in a process of its own: nothing replaced, no annotation enforced."""
    out = tmp_path_factory.mktemp("command") / "results"
    words = ["reproduce", "--seeds", "5", "--algorithms", "sgd", "popart", "--out", str(out)]
    command = [sys.executable, "-m", "popart_func", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False), out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place to run commands in that take no time."""
    monkeypatch.setattr(regression, "_run", synthetic.run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestRealRun:
    def test_succeeds_and_says_what_it_wrote(self, real_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        process, out = real_run
        assert process.returncode == 0, process.stderr
        assert "RMSE over 5 seeds: median (10th-90th percentile)" in process.stdout
        for name in ("curves.zarr", "summary.json", "figure.png"):
            assert f"wrote {out / name}" in process.stdout
            assert (out / name).exists()

    def test_each_spike_is_6500_to_7000(self, real_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        summary = json.loads((real_run[1] / "summary.json").read_text())
        for name in ("sgd", "popart"):
            median = summary["algorithms"][name]["rmse"]["median"]
            for spike in (1000, 2001, 3002, 4003):
                # A tenth of 65535, the errors of nine others, and the spread of five seeds.
                assert 6.4e3 < max(median[spike - 9 : spike + 1]) < 7.2e3

    def test_popart_is_an_order_of_magnitude_below_sgd_after_the_third_block(
        self, real_run: tuple[subprocess.CompletedProcess[str], Path]
    ) -> None:
        summary = json.loads((real_run[1] / "summary.json").read_text())["algorithms"]
        after = {name: np.median(one["rmse"]["median"][3200:3900]) for name, one in summary.items()}
        assert after["popart"] * 10 < after["sgd"]

    def test_the_curves_hold_every_seed(self, real_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
        with xarray.open_zarr(real_run[1] / "curves.zarr") as curves:
            assert curves["error"].shape == (2, 5, 5004)
            assert np.isfinite(curves["error"].values).all()
            assert curves["seed"].values.tolist() == [0, 1, 2, 3, 4]
            assert curves["algorithm"].values.tolist() == ["sgd", "popart"]


class TestReproduce:
    def test_defaults(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reproduce"]) == 0
        out, err = capsys.readouterr()
        summary = json.loads((quick / "results" / "summary.json").read_text())
        assert list(summary["algorithms"]) == ["sgd", "art", "popart", "normalized_sgd"]
        assert "RMSE over 50 seeds" in out
        assert max(len(line) for line in out.splitlines() if not line.startswith("wrote ")) <= 80
        assert err == ""

    @pytest.mark.parametrize(
        "words",
        [
            ["--algorithms", "normalized-sgd", "art"],
            ["--algorithms", "normalized_sgd", "art"],
            ["--algorithms", "normalized-sgd", "--algorithms", "art"],
            ["--algorithms", "normalized-sgd", "art", "art"],
        ],
    )
    def test_several_algorithms_after_one_flag(self, quick: Path, words: list[str]) -> None:
        assert main(["reproduce", *words, "--seeds", "2", "--out", "some"]) == 0
        summary = json.loads((quick / "some" / "summary.json").read_text())
        assert list(summary["algorithms"]) == ["normalized_sgd", "art"]

    def test_table(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reproduce", "--algorithms", "popart", "--seeds", "3"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        rmse = json.loads((quick / "results" / "summary.json").read_text())["algorithms"]["popart"]["rmse"]
        row = next(line for line in lines if line[:1] == ["900"])
        median, low, high = (rmse[name][900] for name in ("median", "p10", "p90"))
        assert row == ["900", f"{median:.0f}", f"({low:.0f}-{high:.0f})"]
        assert ["seconds", "6.00"] in lines
        assert ["compile", "2.50"] in lines
        assert ["Msteps/s", f"{3 * 5004 / 6.0 / 1e6:.3g}"] in lines

    def test_results_are_not_overwritten(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reproduce", "--seeds", "1"]) == 0
        before = (quick / "results" / "summary.json").read_bytes()
        capsys.readouterr()
        assert main(["reproduce", "--seeds", "2"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("popart-func: ")
        assert "results already holds results: name another directory, or overwrite it with --force." in err
        assert (quick / "results" / "summary.json").read_bytes() == before
        assert main(["reproduce", "--seeds", "2", "--force"]) == 0
        assert (quick / "results" / "summary.json").read_bytes() != before

    def test_refuses_before_it_computes(self, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def compute(*_: object) -> None:
            raise AssertionError("computed")

        (quick / "results").mkdir()
        (quick / "results" / "notes.txt").touch()
        monkeypatch.setattr(regression, "reproduce", compute)
        assert main(["reproduce", "--force"]) == 1

    def test_interrupted(
        self, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(regression, "_run", interrupted)
        assert main(["reproduce"]) == 130
        assert capsys.readouterr().err == "popart-func: interrupted; nothing was written.\n"
        assert list(quick.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--seeds", "0"], 'Invalid value "0" for --seeds. Must be >= 1.'),
            (["--seeds", "1.5"], 'Invalid value for --seeds: unable to convert "1.5" into int.'),
            (["--seeds", "many"], 'Invalid value for --seeds: unable to convert "many" into int.'),
            (["--algorithms", "adam"], 'Invalid value "adam" for --algorithms. Choose from: "sgd", "art", '),
            (["--algorithms"], "--algorithms requires at least 1 element. Got 0."),
            (["--engine", "steam"], 'Invalid value "steam" for --engine. Choose from: auto, '),
            (
                ["--device", "nowhere"],
                'Invalid value "nowhere" for --device. `device` must be one that works here, got ',
            ),
            (["--speed", "9"], "Unknown option: --speed"),
            (["12"], "12"),
        ],
    )
    def test_bad_values(self, quick: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
        assert main(["reproduce", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("popart-func: ")
        assert message in err
        assert err.count("\n") == 1
        assert list(quick.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["sweep", "--learning-rates", "1e-3", "1e-60"],
                '"1e-60" for --learning-rates. Must be within the range of',
            ),
            (["sweep", "--learning-rates", "1e60"], '"1e+60" for --learning-rates. Must be within the range of'),
            (["sweep", "--step-sizes", "1e-60"], '"1e-60" for --step-sizes. Must be within the range of'),
            (["sweep", "--out", "http://host/a"], "for --out. It must be a path on this machine, not a URL."),
            (["reproduce", "--out", "s3://bucket/a"], "for --out. It must be a path on this machine, not a URL."),
            (["verify", "--json", "file:///a.json"], "for --json. It must be a path on this machine, not a URL."),
            (["verify", "--plot", "http://host/a.png"], "for --plot. It must be a path on this machine, not a URL."),
            (["bench", "--json", "gs://bucket/a.json"], "for --json. It must be a path on this machine, not a URL."),
        ],
    )
    def test_bad_values_of_every_command(
        self, quick: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
    ) -> None:
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.count("\n") == 1
        assert list(quick.iterdir()) == []

    def test_an_engine_that_cannot_run(
        self, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("popart_func.engines.inductor.why_not", lambda device: "no compiler.")
        assert main(["reproduce", "--engine", "inductor"]) == 1
        assert capsys.readouterr().err.endswith("the engine 'inductor' can't run on cpu: no compiler.\n")

    def test_unexpected_errors_are_not_hidden(self, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(regression, "_run", broken)
        with pytest.raises(ValueError, match="a bug"):
            main(["reproduce"])


class TestMain:
    @pytest.mark.parametrize("words", [["--help"], ["reproduce", "--help"], []])
    def test_help(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert out.startswith("Usage: popart-func ")
        assert err == ""

    def test_every_module_is_a_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["--help"])
        listed = capsys.readouterr().out
        names = {path.stem for path in Path(cli.__file__).parent.glob("[!_]*.py")}
        assert names >= {"bench", "reproduce", "sweep", "verify"}
        for name in names:
            assert f"│ {name} " in listed

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["reproduce", "--help"])
        out = capsys.readouterr().out
        for word in (
            "--seeds",
            "--algorithms",
            "--engine",
            "--device",
            "--out",
            "--force",
            "normalized-sgd",
            "figure.png",
        ):
            assert word in out

    def test_the_algorithms_are_those_of_the_experiment(self) -> None:
        assert tuple(regression.SETTINGS) == ALGORITHMS
        assert LABELS.keys() == STYLES.keys() == set(ALGORITHMS)

    def test_the_competitors_are_those_of_the_benchmark(self) -> None:
        assert tuple(competitors.MAKERS) == COMPETITORS

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == popart_func.__version__

    def test_unknown_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["dance"]) == 2
        assert capsys.readouterr().err.startswith('popart-func: Unknown command "dance".')

    def test_help_needs_nothing_heavy(self) -> None:
        code = (
            "import sys, popart_func.cli as cli; cli.main(['reproduce', '--help']); "
            "sys.exit(bool({'xarray', 'zarr', 'matplotlib'} & sys.modules.keys()))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_a_missing_extra(self) -> None:
        code = "import sys; sys.modules['cyclopts'] = None; import popart_func.cli"
        process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert process.returncode == 1
        assert process.stderr == (
            "popart-func: popart_func.experiments needs 'cyclopts', which is not installed: "
            "pip install 'popart-func[experiments]'\n"
        )

    def test_interrupt_from_outside(self, tmp_path: Path) -> None:
        code = (
            "import signal, sys; from popart_func.experiments import regression; from popart_func.cli import main; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job in the background ignores it
            "regression._run = lambda *_: signal.raise_signal(signal.SIGINT); sys.exit(main(['reproduce']))"
        )
        process = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert process.returncode == 130
        assert process.stderr == "popart-func: interrupted; nothing was written.\n"
        assert list(tmp_path.iterdir()) == []
