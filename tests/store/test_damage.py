"""A store that is damaged, cannot be read, or has a full disk: nothing wrong is given back."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import small_sweep
import xarray
from stored_sweep import CHUNKS, last_file, same_bits

from popart_func import sweeps
from popart_func.sweeps import StoreError, files, lanes_zarr, load
from popart_func.sweeps import store as store_module

pytestmark = pytest.mark.usefixtures("unchecked")


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
