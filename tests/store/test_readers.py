"""Others read a store as a Zarr array; reading a store that someone else made runs no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import small_sweep
import xarray
import zarr
from stored_sweep import same_bits

from popart_func import sweeps
from popart_func.sweeps import StoreError, configuration, files, load

pytestmark = pytest.mark.usefixtures("unchecked")


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
