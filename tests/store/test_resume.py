"""A sweep that is interrupted or killed gives the same bits in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import small_sweep
from stored_sweep import CHUNKS, SUPPORT, interrupted_after, last_file, same_bits

from popart_func import sweeps
from popart_func.sweeps import load, records
from popart_func.sweeps.store import Store

pytestmark = pytest.mark.usefixtures("unchecked")


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
