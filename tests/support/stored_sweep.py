"""A finished store of a small sweep, its files, and how a sweep is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_sweep
import xarray

from popart_func import sweeps
from popart_func.sweeps.job import Job

CHUNKS = 3 + 5


SUPPORT = Path(__file__).parent


def last_file(store: Path, learner: str, number: int) -> Path:
    """The file of a chunk that is written last: without it, the chunk is not done."""
    return store / "lanes.zarr" / learner / "diverged_at" / "c" / str(number)


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
