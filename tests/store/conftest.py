"""A finished store, and the chunks that are run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_sweep
import xarray

from popart_func import sweeps
from popart_func.sweeps.job import Job


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[xarray.Dataset, Path]:
    path = tmp_path_factory.mktemp("uninterrupted") / "store"
    return sweeps.run(**small_sweep.arguments(store=path)), path


@pytest.fixture
def store(uninterrupted: tuple[xarray.Dataset, Path], tmp_path: Path) -> Path:
    """A finished store of one's own."""
    return Path(shutil.copytree(uninterrupted[1], tmp_path / "store"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the chunks that are run, as they are."""
    seen, run = [], Job.run

    def noted(job, chunk):
        seen.append(f"{chunk.learner}-{chunk.number:05}")
        return run(job, chunk)

    monkeypatch.setattr(Job, "run", noted)
    return seen
