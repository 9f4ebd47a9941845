"""Who may write to a store: one sweep at a time, and the one that began it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import small_sweep
from stored_sweep import last_file, same_bits

from popart_func import sweeps
from popart_func.sweeps import StoreError, files, load, records
from popart_func.sweeps import store as store_module
from popart_func.sweeps.job import Job

pytestmark = pytest.mark.usefixtures("unchecked")


class TestWhoMayWrite:
    def test_two_processes_at_once(self, uninterrupted, store, runs):
        """The second is refused as long as the first lives, however that ends."""
        last_file(store, "sgd", 0).unlink()
        code = (
            "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
            "print('locked', flush=True); time.sleep(600)"
        )
        other = subprocess.Popen([sys.executable, "-c", code, store / ".lock"], stdout=subprocess.PIPE, text=True)
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(StoreError, match="is in use by another process: wait until it ends"):
                sweeps.run(**small_sweep.arguments(store=store))
            assert runs == []
            assert load(store).attrs["complete"] == 0, "reading is always allowed"
        finally:
            other.kill()
            other.communicate()
        assert same_bits(sweeps.run(**small_sweep.arguments(store=store)), uninterrupted[0])

    def test_a_running_sweep_holds_the_lock_and_then_lets_go(self, store, monkeypatch):
        last_file(store, "sgd", 0).unlink()
        run, refused = Job.run, []

        def nosy(job, chunk):
            with monkeypatch.context() as patch:
                patch.setattr(Job, "run", run)
                code = "import sys, filelock; filelock.FileLock(sys.argv[1]).acquire(timeout=0)"
                process = subprocess.run(
                    [sys.executable, "-c", code, store / ".lock"], check=False, capture_output=True
                )
            refused.append(b"Timeout" in process.stderr)
            return run(job, chunk)

        with monkeypatch.context() as patch:
            patch.setattr(Job, "run", nosy)
            sweeps.run(**small_sweep.arguments(store=store))
        assert refused == [True]
        with pytest.raises(StoreError, match="another sweep"):  # not: in use
            sweeps.run(**small_sweep.arguments(store=store, chunk_size=5))
        sweeps.run(**small_sweep.arguments(store=store))

    @pytest.mark.parametrize(
        ("changes", "lines"),
        [
            ({"chunk_size": 5}, ["chunk_size: 4 there, 5 here"]),
            ({"seeds": [0, 1]}, ["seeds: [0, 1, 2] there, [0, 1] here"]),
            ({"step_size": (0.1, 0.2)}, ["hyper_parameters.step_size: [0.1, 0.5] there, [0.1, 0.2] here"]),
            ({"record": {"final": small_sweep.last(6), "curve": small_sweep.every(3)}},
             ['record.final.description: "error, mean over the last 5 samples" there, "error, mean over the last 6']),
            ({"engine": "inductor"}, ['engine: "eager" there, "inductor" here']),
        ],
    )  # fmt: skip
    def test_another_sweep_is_refused_and_the_differences_are_listed(self, store, runs, changes, lines):
        with pytest.raises(
            StoreError, match="holds another sweep: name another directory, or ask for the same"
        ) as caught:
            sweeps.run(**small_sweep.arguments(store=store, **changes))
        for line in lines:
            assert line in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1 + len(lines)
        assert runs == []

    def test_long_lists_are_cut_down_to_what_differs(self):
        def line(there, here):
            (found,) = files.differences({"seeds": there}, {"seeds": here})
            return found

        assert line(list(range(50)), list(range(2, 60))) == (
            "seeds: 50 values there, 58 here, only there: 0, 1, only here: 50, 51, 52, 53, 54 and 5 more"
        )
        sevenths = [i / 7 for i in range(30)]
        assert line(sevenths, [*sevenths[:7], 1.5, *sevenths[7:]]) == (
            "seeds: 30 values there, 31 here, only here: 1.5"
        )
        assert line(list(range(50)), [*range(48), 49, 48]) == (
            "seeds: 50 values there, 50 here, the first that differs: 48 there, 49 here"
        )
        assert line(None, list(range(50))).startswith("seeds: nothing there, [0, 1, 2,")

    def test_long_texts_are_cut_down_to_where_they_part(self):
        (line,) = files.differences({"text": "a" * 200 + "b" + "c" * 200}, {"text": "a" * 200 + "d"})
        assert line == f'text: ...{"a" * 20}b{"c" * 39}... there, ...{"a" * 20}d" here'

    def test_other_functions_are_another_sweep(self, store):
        arguments = small_sweep.arguments(store=store)
        init, data, sgd = arguments["init"], arguments["data"], arguments["make_learner"]["sgd"]
        learners = {**arguments["make_learner"], "sgd": lambda learning_rate: sgd(2 * learning_rate)}
        for name, value, line in (
            ("init", lambda seed: init(seed + 1), "fingerprint.init"),
            ("data", lambda seed: tuple(leaf + 1 for leaf in data(seed)), "fingerprint.data"),
            ("make_learner", learners, "fingerprint.learner sgd"),
            ("data", lambda seed: data(seed if seed == 0 else seed + 1), "fingerprint.data"),
        ):
            with pytest.raises(StoreError, match=line):
                sweeps.run(**{**arguments, name: value})

    def test_what_a_record_keeps_is_compared_by_what_it_does(self, tmp_path):
        def arguments(keep):
            record = {"kept": records.Record(lambda state, info: info.error, keep, None, "mine")}
            return small_sweep.arguments(store=tmp_path / "kept", record=record)

        sweeps.run(**arguments(lambda series: series.amax()))
        sweeps.run(**arguments(lambda series: series.amax()))
        with pytest.raises(StoreError, match=r"fingerprint\.record kept"):
            sweeps.run(**arguments(lambda series: series.amin()))

    def test_another_version_is_another_sweep(self, store, monkeypatch):
        monkeypatch.setattr("popart_func.sweeps.job.__version__", "99")
        with pytest.raises(StoreError, match=r'versions.popart_func: ".*" there, "99" here'):
            sweeps.run(**small_sweep.arguments(store=store))

    @pytest.mark.parametrize(("number", "age"), [(1, "an older"), (3, "a newer")])
    def test_a_store_of_another_format(self, store, runs, number, age):
        content = files.read_sealed(store / "configuration.json")
        content["configuration"]["format"] = number
        files.write_sealed(store / "configuration.json", content)
        for use in (lambda: load(store), lambda: sweeps.run(**small_sweep.arguments(store=store))):
            with pytest.raises(StoreError, match=f"has format {number}, written by {age} version of popart_func; this"):
                use()
        assert runs == []

    @pytest.mark.parametrize(
        ("name", "why"), [("file", "File exists"), ("file/below", "Not a directory"), ("x" * 300, "File name too long")]
    )
    def test_a_place_that_can_be_no_directory(self, tmp_path, runs, name, why):
        (tmp_path / "file").write_text("precious")
        with pytest.raises(StoreError, match=rf"can't be a sweep's directory: {why}\. Name another one"):
            sweeps.run(**small_sweep.arguments(store=tmp_path / name))
        assert runs == []
        assert (tmp_path / "file").read_text() == "precious"

    def test_a_place_that_may_not_be_written(self, tmp_path, monkeypatch):
        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(store_module.filelock.FileLock, "acquire", refused)
        with pytest.raises(StoreError, match=r"can't be a sweep's directory: Permission denied\. Name another one"):
            sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))

    def test_a_home_and_a_relative_path(self, uninterrupted, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        sweeps.run(**small_sweep.arguments(store="~/store"))
        assert same_bits(load("store"), uninterrupted[0])

    def test_other_files_are_left_alone(self, tmp_path, runs):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(StoreError, match=r"holds 'thesis\.tex' and no sweep: name another directory"):
            sweeps.run(**small_sweep.arguments(store=tmp_path))
        assert runs == []
        assert (tmp_path / "thesis.tex").read_text() == "precious"
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"], "not even a lock is put beside them"
