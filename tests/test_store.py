"""A store that is killed, damaged, full or fought over gives the same bits in the end, or says why not."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import small_sweep
import xarray
import zarr

from popart_func import sweeps
from popart_func.sweeps import StoreError, configuration, files, lanes_zarr, load, records
from popart_func.sweeps import store as store_module
from popart_func.sweeps.job import Job
from popart_func.sweeps.store import Store

pytestmark = pytest.mark.usefixtures("unchecked")

CHUNKS = 3 + 5
SUPPORT = Path(__file__).parent / "support"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[xarray.Dataset, Path]:
    path = tmp_path_factory.mktemp("uninterrupted") / "store"
    return sweeps.run(**small_sweep.arguments(store=path)), path


@pytest.fixture
def store(uninterrupted: tuple[xarray.Dataset, Path], tmp_path: Path) -> Path:
    """A finished store of one's own."""
    return Path(shutil.copytree(uninterrupted[1], tmp_path / "store"))


def last_file(store: Path, learner: str, number: int) -> Path:
    """The file of a chunk that is written last: without it, the chunk is not done."""
    return store / "lanes.zarr" / learner / "diverged_at" / "c" / str(number)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the chunks that are run, as they are."""
    seen, run = [], Job.run

    def noted(job, chunk):
        seen.append(f"{chunk.learner}-{chunk.number:05}")
        return run(job, chunk)

    monkeypatch.setattr(Job, "run", noted)
    return seen


def interrupted_after(number: int, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Runs so many chunks of the sweep, and is then interrupted from the keyboard."""
    run, done = Job.run, []

    def interrupted(job, chunk):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(chunk)
        return run(job, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweeps.run(**small_sweep.arguments(store=path))


def same_bits(one: xarray.Dataset, other: xarray.Dataset) -> bool:
    assert one.sizes == other.sizes
    return all(
        one[name].dtype == other[name].dtype and one[name].values.tobytes() == other[name].values.tobytes()
        for name in other
    )


class TestResume:
    @pytest.mark.parametrize("number", [0, 1, 5])
    def test_the_rest_is_run_and_the_result_is_the_same_to_the_bit(
        self, uninterrupted, tmp_path, monkeypatch, runs, capsys, number
    ):
        interrupted_after(number, monkeypatch, tmp_path / "store")
        runs.clear()
        resumed = sweeps.run(**small_sweep.arguments(store=tmp_path / "store", quiet=False))
        assert same_bits(resumed, uninterrupted[0])
        assert len(runs) == CHUNKS - number
        assert capsys.readouterr().err == (f"{number} of 8 chunks are done and whole.\n" if number else "")

    def test_a_store_makes_no_difference(self, uninterrupted):
        assert same_bits(sweeps.run(**small_sweep.arguments()), uninterrupted[0])

    def test_a_finished_store_is_read_and_nothing_is_run_or_written(self, uninterrupted, store, runs):
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.name != ".lock"}
        assert same_bits(sweeps.run(**small_sweep.arguments(store=store)), uninterrupted[0])
        assert runs == []
        assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.name != ".lock"} == before

    def test_auto_is_the_engine_that_the_store_was_begun_with(self, store):
        assert sweeps.run(**small_sweep.arguments(store=store, engine="auto")).attrs["engine"] == "eager"

    def test_an_unfinished_store_can_be_loaded(self, uninterrupted, tmp_path, monkeypatch):
        interrupted_after(4, monkeypatch, tmp_path / "store")
        part, whole = load(tmp_path / "store"), uninterrupted[0]
        assert part.attrs["complete"] == 0
        assert same_bits(part.sel(learner="sgd"), whole.sel(learner="sgd"))
        missing = part["diverged_at"].sel(learner="popart") == -2
        assert missing.sum() == 18 - 4
        assert part["curve"].sel(learner="popart").where(missing).isnull().all()
        done = part["final"].sel(learner="popart").where(~missing)
        assert done.equals(whole["final"].sel(learner="popart").where(~missing))
        assert same_bits(load(uninterrupted[1]), whole)

    def test_a_lane_that_was_not_run_is_not_one_that_diverged(self, tmp_path, monkeypatch):
        """Whatever is kept: `done` and `diverged_at` tell them apart, and what stands in their place is documented."""
        record = {
            "error": records.last(5),
            "above": records.Record(records.error, lambda series: (series > 50).sum(), None, "how often"),
            "ever": records.Record(records.error, lambda series: (series > 50).any(), None, "whether at all"),
            "turned": records.Record(records.error, lambda series: series[0] * 1j, None, "complex"),
        }
        whole = sweeps.run(**small_sweep.arguments(record=record, store=tmp_path / "store"))
        assert whole["done"].dtype == bool
        assert whole["done"].all()
        assert load(tmp_path / "store").equals(whole)
        last_file(tmp_path / "store", "sgd", 2).unlink()
        part = load(tmp_path / "store")
        not_run = ~part["done"]
        assert part["done"].dims == part["diverged_at"].dims
        assert not_run.sum() == 2  # one lane, at both step sizes, which SGD does not take
        lost, kept = part.where(not_run, drop=True), part.where(part["done"])
        assert (lost["diverged_at"] == -2).all()
        assert lost["error"].isnull().all()
        assert lost["turned"].isnull().all()
        assert (lost["above"] == 0).all()
        assert (lost["ever"] == 0).all()
        assert kept.equals(whole.where(part["done"]))
        assert (kept["diverged_at"].sel(learning_rate=small_sweep.TOO_LARGE).min()) >= 0


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x04
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("name", ["curve/c/1/0", "final/c/1", "diverged_at/c/1"])
    def test_a_flipped_byte_in_a_chunk(self, uninterrupted, store, runs, capsys, name):
        flip(store / "lanes.zarr" / "popart" / name)
        part = load(store)
        assert (part["diverged_at"].sel(learner="popart") == -2).sum() == 4
        mended = sweeps.run(**small_sweep.arguments(store=store, quiet=False))
        assert same_bits(mended, uninterrupted[0])
        assert runs == ["popart-00001"]
        assert capsys.readouterr().err == (
            "7 of 8 chunks are done and whole.\nDamaged, to be run again: popart-00001.\n"
        )

    def test_any_flipped_byte_and_any_cut(self, uninterrupted, store):
        """In a file of floats and in that of the marks: each byte, those of the checksum too, and each length."""
        whole = load(store)
        for name in ("sgd/curve/c/2/0", "sgd/diverged_at/c/2"):
            path = store / "lanes.zarr" / name
            content = path.read_bytes()
            damaged = [
                content[:place] + bytes([byte ^ 0x04]) + content[place + 1 :] for place, byte in enumerate(content)
            ]
            for bad in (*damaged, *(content[:length] for length in range(len(content))), content + b"0"):
                path.write_bytes(bad)
                part = load(store)
                assert (~part["done"]).sum() == 1 * 2, "one lane, at both step sizes, which SGD does not take"
                assert same_bits(part.where(part["done"]), whole.where(part["done"]))
            path.write_bytes(content)
        assert same_bits(load(store), whole)

    def test_a_flipped_byte_is_seen_by_everyone_who_opens_the_array(self, store):
        flip(store / "lanes.zarr" / "popart" / "curve" / "c" / "1" / "0")
        with (
            xarray.open_zarr(store / "lanes.zarr", group="popart") as lanes,
            pytest.raises(ValueError, match="checksum do not match"),
        ):
            lanes["curve"].load()

    def test_a_cut_and_a_missing_file(self, uninterrupted, store, runs, capsys):
        os.truncate(store / "lanes.zarr" / "sgd" / "curve" / "c" / "0" / "0", 10)
        (store / "lanes.zarr" / "popart" / "final" / "c" / "4").unlink()
        last_file(store, "popart", 3).unlink()
        assert same_bits(sweeps.run(**small_sweep.arguments(store=store, quiet=False)), uninterrupted[0])
        assert runs == ["sgd-00000", "popart-00003", "popart-00004"]
        assert capsys.readouterr().err == (
            "5 of 8 chunks are done and whole.\nDamaged, to be run again: sgd-00000, popart-00004.\n"
            "Begun but not done, to be run again: 1.\n"
        )

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("lanes.zarr/zarr.json", 0.5),
            ("lanes.zarr/popart/zarr.json", 0.5),
            ("lanes.zarr/popart/curve/zarr.json", 0.5),
            ("lanes.zarr/sgd/seed/c/0", 0.5),
            ("labels.json", 0.02),
            ("labels.json", 0.5),
            ("labels.json", 0.95),
        ],
    )
    def test_damaged_labels_are_written_again(self, uninterrupted, store, runs, capsys, name, place):
        flip(store / name, place)
        with pytest.raises(StoreError, match="labels are not there or damaged: run the same sweep again"):
            load(store)
        assert same_bits(sweeps.run(**small_sweep.arguments(store=store, quiet=False)), uninterrupted[0])
        assert "The labels were damaged: they are written again." in capsys.readouterr().err
        assert runs == []
        for path in (store / "lanes.zarr").rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (uninterrupted[1] / path.relative_to(store)).read_bytes(), path

    @pytest.mark.parametrize("place", [0.02, 0.5, 0.95, "cut", "empty", "lost"])
    def test_a_damaged_configuration_is_mended_from_its_copy(self, uninterrupted, store, runs, capsys, place):
        path = store / "configuration.json"
        whole = files.read_sealed(path)
        if isinstance(place, float):
            flip(path, place)
        elif place == "lost":
            path.unlink()
        else:
            os.truncate(path, 100 if place == "cut" else 0)
        assert same_bits(load(store), uninterrupted[0])
        assert load(store).attrs == load(uninterrupted[1]).attrs
        other = small_sweep.arguments(store=store, seeds=range(2), engine="auto")
        with pytest.raises(StoreError, match="holds another sweep"):
            sweeps.run(**other)
        mended = sweeps.run(**small_sweep.arguments(store=store, quiet=False, engine="auto"))
        assert same_bits(mended, uninterrupted[0])
        assert runs == []
        assert files.read_sealed(path) == whole
        assert "configuration.json was damaged: it is written again.\n" in capsys.readouterr().err

    @pytest.mark.parametrize("other", ["labels.json", "lanes.zarr/zarr.json"])
    def test_a_configuration_that_is_damaged_like_its_copy_is_refused(self, store, runs, other):
        flip(store / "configuration.json")
        flip(store / other)
        for use in (lambda: load(store), lambda: sweeps.run(**small_sweep.arguments(store=store))):
            with pytest.raises(StoreError, match=r"configuration\.json is damaged, and lanes\.zarr has no whole copy"):
                use()
        assert runs == []

    def test_no_sweep_at_all(self, tmp_path):
        with pytest.raises(StoreError, match=r"configuration\.json is not there: no sweep"):
            load(tmp_path)


class TestKilled:
    def test_at_20_random_moments(self, uninterrupted, tmp_path, seed):
        """Nothing is lost that was done, and the result has the bits of the run that was let alone."""
        command = [sys.executable, SUPPORT / "killed_sweeps.py", tmp_path / "store", "20", str(seed)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        done = json.loads(found.stdout)
        assert len(done) == 20
        assert max(done) > 0, "some of them got somewhere"
        killed = sweeps.run(**small_sweep.arguments(seeds=range(20), store=tmp_path / "store"))
        assert same_bits(killed, sweeps.run(**small_sweep.arguments(seeds=range(20))))

    def test_files_are_on_the_disk_before_they_count_as_done(self, tmp_path, monkeypatch):
        """As after a loss of power: in the order of events, a chunk is flushed before its last file appears."""
        events, sources = [], {}
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor):
            events.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def noted_replace(source, target):
            events.append(("appeared", str(target)))
            sources[str(target)] = str(source)
            replace(source, target)

        write = Store.write

        def noted_write(store, chunk, results):
            write(store, chunk, results)
            events.append(("written", chunk))

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        monkeypatch.setattr(Store, "write", noted_write)
        sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))
        store = tmp_path / "store"

        def flushed(start, stop):
            return {path for event, path in events[start:stop] if event == "flushed"}

        def with_directories(path):
            """A file, and the directories whose entries lead to it."""
            return {str(path), *(str(parent) for parent in path.parents if parent.is_relative_to(store))}

        written = [place for place, (event, _) in enumerate(events) if event == "written"]
        assert len(written) == CHUNKS
        for place in written:
            chunk = events[place][1]
            last = last_file(store, chunk.learner, chunk.number)
            group, number = store / "lanes.zarr" / chunk.learner, str(chunk.number)
            appeared = events.index(("appeared", str(last)))
            for other in (group / "final" / "c" / number, group / "curve" / "c" / number / "0"):
                assert with_directories(other) <= flushed(events.index(("appeared", str(other))), appeared)
            assert with_directories(last) <= flushed(appeared, place)
        for name in ("configuration.json", "labels.json"):
            appeared = events.index(("appeared", str(store / name)))
            assert sources[str(store / name)] in flushed(0, appeared)
            assert str(store) in flushed(appeared, written[0])
        labels = [store / name for name in json.loads((store / "labels.json").read_text())["files"]]
        assert len(labels) > 10
        assert set().union(*map(with_directories, labels)) <= flushed(0, appeared)

    def test_leftovers_of_a_write_are_removed(self, uninterrupted, store):
        for leftover in (store / ".partial-x" / "zarr.json", store / "lanes.zarr" / "sgd" / "c.abc.partial"):
            leftover.parent.mkdir(exist_ok=True)
            leftover.touch()
        (store / ".partial-y").touch()
        sweeps.run(**small_sweep.arguments(store=store))
        assert {path.relative_to(store) for path in store.rglob("*")} == {
            path.relative_to(uninterrupted[1]) for path in uninterrupted[1].rglob("*")
        }

    def test_leftovers_in_leftovers_are_removed(self, store, runs):
        """Killed while zarr wrote one of the labels aside."""
        (store / ".partial-labels" / "sgd").mkdir(parents=True)
        (store / ".partial-labels" / "sgd" / "zarr.json.0123.partial").touch()
        sweeps.run(**small_sweep.arguments(store=store))
        assert not list(store.rglob("*partial*"))
        assert runs == []


class TestFullDisk:
    def test_a_full_file_system(self, uninterrupted, tmp_path, runs):
        place = tmp_path / "small"
        place.mkdir()
        needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in uninterrupted[1].rglob("*") if path.is_file())
        mount = ["mount", "-t", "tmpfs", "-o", f"size={needed + 200_000}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("a small file system can't be mounted here: it takes root")
        try:
            (place / "ballast").write_bytes(bytes(230_000))
            with pytest.raises(
                StoreError, match=r"No space left on device.* chunks of 8 that are done are safe"
            ) as caught:
                sweeps.run(**small_sweep.arguments(store=place / "store"))
            done = [name for name in runs if last_file(place / "store", name[:-6], int(name[-5:])).exists()]
            assert f"The {len(done)} chunks of 8" in str(caught.value)
            assert len(done) > 1
            assert runs[:-1] == done
            (place / "ballast").unlink()
            runs.clear()
            assert same_bits(sweeps.run(**small_sweep.arguments(store=place / "store")), uninterrupted[0])
            assert len(runs) == CHUNKS - len(done)
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def test_a_write_that_fails(self, uninterrupted, tmp_path, runs, monkeypatch):
        """Wherever a small file system can't be had: the sixth chunk's second file fails as on a full disk."""
        flush, written = lanes_zarr.flush, []

        def failing(path):
            if path.name == "2" and "popart/final" in str(path):
                written.append(path)
                raise OSError(28, "No space left on device")
            flush(path)

        with monkeypatch.context() as patch:
            patch.setattr(lanes_zarr, "flush", failing)
            with pytest.raises(StoreError, match=r"No space left on device\. The 5 chunks of 8 that are done are safe"):
                sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))
        assert not written[0].exists()
        runs.clear()
        assert same_bits(sweeps.run(**small_sweep.arguments(store=tmp_path / "store")), uninterrupted[0])
        assert len(runs) == 3

    def test_a_disk_that_is_full_from_the_start(self, uninterrupted, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        for place, name in ((store_module, "write_sealed"), (lanes_zarr.tempfile, "mkdtemp")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, full)
                with pytest.raises(StoreError, match=r"store can't be opened: No space left on device\. All chunks"):
                    sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))
        assert same_bits(sweeps.run(**small_sweep.arguments(store=tmp_path / "store")), uninterrupted[0])

    def test_a_limit_on_the_size_of_files(self, uninterrupted, tmp_path, runs):
        """The operating system's own refusal, without root."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
            with pytest.raises(OSError, match="File too large"):
                sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert same_bits(sweeps.run(**small_sweep.arguments(store=tmp_path / "store")), uninterrupted[0])


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


class TestOthersCanRead:
    def test_xarray_reads_labelled_lanes(self, uninterrupted):
        result, path = uninterrupted
        with xarray.open_zarr(path / "lanes.zarr", group="popart") as lanes:
            assert lanes["curve"].dims == ("lane", "sample")
            by_label = lanes.load().set_index(lane=["learning_rate", "step_size", "seed"]).unstack("lane")
        for name in ("curve", "final", "diverged_at"):
            expected = result[name].sel(learner="popart", drop=True)
            np.testing.assert_array_equal(by_label[name].transpose(*expected.dims), expected)
        with xarray.open_zarr(path / "lanes.zarr", group="sgd") as lanes:
            assert "step_size" not in lanes.variables

    def test_one_learner_is_at_the_root_and_several_are_a_tree(self, uninterrupted, tmp_path):
        with xarray.open_datatree(uninterrupted[1] / "lanes.zarr", engine="zarr") as tree:
            assert sorted(tree.children) == ["popart", "sgd"]
        arguments = small_sweep.arguments(store=tmp_path / "store")
        sweeps.run(**{**arguments, "make_learner": arguments["make_learner"]["popart"]})
        with xarray.open_zarr(tmp_path / "store" / "lanes.zarr") as lanes:
            assert lanes["final"].sizes == {"lane": 18}
            assert "groups" not in lanes.attrs

    def test_it_says_what_it_is(self, uninterrupted):
        result, path = uninterrupted
        with xarray.open_zarr(path / "lanes.zarr") as root:
            said = root.attrs
            assert said.pop("groups") == ["sgd", "popart"], "where to find what the root does not have"
            assert not root.variables
        configuration = json.loads(said["configuration"])
        assert configuration["seeds"] == [0, 1, 2]
        assert configuration["hyper_parameters"] == {"learning_rate": [0.01, 0.3, 1e6], "step_size": [0.1, 0.5]}
        assert configuration["learners"] == {"sgd": ["learning_rate"], "popart": ["learning_rate", "step_size"]}
        assert configuration["versions"].keys() == {"popart_func", "torch", "processor"}
        assert said["configuration_sha256"] == files.digest(said["configuration"].encode())
        assert (said["engine"], said["device"], said["dtype"]) == ("eager", "cpu", "float32")
        assert {"created", "host"} <= said.keys()
        assert {**said, "complete": 1} == load(path).attrs
        assert said.items() <= result.attrs.items()

    def test_the_git_revision_is_noted_where_there_is_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        one_lane = {"lanes": sweeps.lanes([0], learning_rate=[0.1], step_size=[0.1])}
        assert "git_revision" not in sweeps.run(**small_sweep.arguments(**one_lane)).attrs
        git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
        with suppress(FileNotFoundError):
            subprocess.run([*git, "init", "-q"], check=True)
            subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
            revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
            assert sweeps.run(**small_sweep.arguments(**one_lane)).attrs["git_revision"] == revision.strip()
            (tmp_path / "new.py").touch()
            found = sweeps.run(**small_sweep.arguments(**one_lane)).attrs["git_revision"]
            assert found == f"{revision.strip()}-modified"

    @pytest.mark.skipif(shutil.which("git") is None, reason="no git")
    @pytest.mark.parametrize("way", ["fsmonitor", "hook", "clean", "process", "odd=name", "submodule"])
    def test_asking_git_runs_nothing_of_the_repository(self, tmp_path, monkeypatch, way):
        marker, script, repository = tmp_path / "ran", tmp_path / "script", tmp_path / "repository"
        script.write_text(f"#!/bin/sh\ntouch '{marker}'\ncat\n")
        script.chmod(0o755)

        def git(*words: str, where: Path = repository) -> None:
            command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "protocol.file.allow=always", *words]
            subprocess.run(command, cwd=where, check=True, capture_output=True)

        for made in (repository, tmp_path / "other"):
            made.mkdir()
            git("init", "-q", where=made)
            (made / "file.py").write_text("1")
            git("add", ".", where=made)
            git("commit", "-q", "-m", "one", where=made)
        if way == "fsmonitor":
            git("config", "core.fsmonitor", str(script))
        elif way == "hook":
            shutil.copy(script, repository / ".git" / "hooks" / "post-index-change")
        elif way == "submodule":
            git("submodule", "add", str(tmp_path / "other"), "inner")
            git("commit", "-q", "-m", "two")
            git("config", "core.fsmonitor", str(script), where=repository / "inner")
        else:
            kind = way if way in ("clean", "process") else "clean"
            driver = "x" if way == kind else way
            (repository / ".git" / "info" / "attributes").write_text(f"* filter={driver}\n")
            git("config", f"filter.{driver}.required", "true")
            git("config", f"filter.{driver}.{kind}", str(script))
        os.utime(repository / "file.py", (1, 1))  # so that git looks into it
        monkeypatch.chdir(repository)
        found = configuration.provenance()["git_revision"]
        assert not marker.exists()
        assert found.endswith("-modified") == (way == "odd=name")
        (repository / "file.py").write_text("2")
        assert configuration.provenance()["git_revision"].endswith("-modified")
        assert not marker.exists()
        with suppress(subprocess.CalledProcessError):
            git("status", "--porcelain")
        assert marker.exists(), "this repository does run code where git is asked plainly"

    def test_nothing_is_pickled(self, uninterrupted, monkeypatch):
        _, path = uninterrupted
        codecs, types = set(), set()
        for metadata in (path / "lanes.zarr").rglob("zarr.json"):
            content = json.loads(metadata.read_text())
            if content["node_type"] == "array":
                codecs |= {codec["name"] for codec in content["codecs"]}
                types.add(content["data_type"])
        assert codecs == {"bytes", "zstd", "crc32c"}
        assert types == {"float32", "float64", "int32", "int64"}

        def refuse(*_, **__):
            raise AssertionError("unpickled")

        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        load(path)


class Payload:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def as_numcodecs_once_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets numcodecs unpickle, as it did before 0.16.6: a store must be safe without its help."""
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)


def seal_labels(store: Path) -> None:
    """Recomputes the checksums of all labels, as anyone can."""
    labels = [*(store / "lanes.zarr").rglob("zarr.json"), *(store / "lanes.zarr").rglob(".z*")]
    checksums = {path.relative_to(store).as_posix(): files.digest(path.read_bytes()) for path in labels}
    files.write_sealed(store / "labels.json", {"files": checksums})


def pickled_array(array: Path, payload: Payload) -> None:
    """Puts an array of Zarr's format 2, whose chunks are pickles, in the place of an array of results."""
    document = json.loads((array / "zarr.json").read_text())
    (array / "zarr.json").unlink()
    old = {
        "zarr_format": 2,
        "shape": document["shape"],
        "chunks": document["chunk_grid"]["configuration"]["chunk_shape"],
        "dtype": "|O",
        "compressor": None,
        "fill_value": None,
        "order": "C",
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],  # zarr looks at the first
        "dimension_separator": "/",
    }
    (array / ".zarray").write_text(json.dumps(old))
    for chunk in [path for path in (array / "c").rglob("*") if path.is_file()]:
        (array / chunk.relative_to(array / "c")).parent.mkdir(parents=True, exist_ok=True)
        (array / chunk.relative_to(array / "c")).write_bytes(pickle.dumps(payload))


class TestCrafted:
    """A store from a stranger, whose checksums all match."""

    @pytest.mark.parametrize("name", ["sgd/diverged_at", "popart/curve"])
    @pytest.mark.usefixtures("as_numcodecs_once_was")
    def test_an_array_of_pickles_is_not_read(self, uninterrupted, store, tmp_path, name, runs):
        made = tmp_path / "made"
        pickled_array(store / "lanes.zarr" / name, Payload(made))
        seal_labels(store)
        crafted = Path(shutil.copytree(store, tmp_path / "crafted")) / "lanes.zarr" / name
        with pytest.raises(StoreError, match="labels are not there or damaged"):
            load(store)
        assert same_bits(sweeps.run(**small_sweep.arguments(store=store)), uninterrupted[0])
        assert not made.exists()
        with suppress(Exception):
            zarr.open_array(crafted, mode="r", zarr_format=2)[...]
        assert made.exists(), "the crafted array does run code where it is read"

    @pytest.mark.parametrize(
        "change",
        [
            {"zarr_format": 2},
            {"node_type": "group"},
            {"data_type": "string"},
            {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}},
            {"shape": [10**6]},
            {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
            {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}]},
            {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
            {"storage_transformers": [{"name": "anything"}]},
            {"an_extension": {"must_understand": True}},
        ],
        ids=str,
    )
    def test_metadata_that_is_not_ours_is_refused_before_zarr_sees_it(self, store, change, monkeypatch):
        document = store / "lanes.zarr" / "sgd" / "final" / "zarr.json"
        document.write_text(json.dumps({**json.loads(document.read_text()), **change}))
        seal_labels(store)

        def refuse(*_, **__):
            raise AssertionError("opened")

        monkeypatch.setattr(zarr, "open_array", refuse)
        with pytest.raises(StoreError, match="labels are not there or damaged"):
            load(store)

    @pytest.mark.parametrize("dtype", ["object", "U5", "datetime64[s]"])
    def test_a_dtype_that_is_no_number_is_refused(self, store, dtype):
        content = files.read_sealed(store / "configuration.json")
        content["configuration"]["record"]["final"]["dtype"] = dtype
        files.write_sealed(store / "configuration.json", content)
        with pytest.raises(StoreError):
            load(store)


def test_a_file_that_can_not_be_read_is_an_error_of_the_store(store, monkeypatch):
    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    expected = "can't be read: Input/output error"
    for place, name, said in (
        (lanes_zarr.zarr, "open_array", expected),
        (Path, "read_bytes", expected),
        (lanes_zarr, "read_sealed", "the labels are not there or damaged"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(StoreError, match=said):
                load(store)


def test_what_can_not_be_read_back_is_no_result(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("popart_func.sweeps.sweep.load", lambda path: load(path).assign_attrs(complete=0))
        with pytest.raises(StoreError, match="can't be read back as it was written: the same call runs again"):
            sweeps.run(**small_sweep.arguments(store=tmp_path / "store"))
