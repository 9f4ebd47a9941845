"""A finished sweep grows in its directory: with more seeds, values or steps it equals one run, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest
import small_sweep
import torch
import xarray

from popart_func import sweeps
from popart_func.sweeps import load
from popart_func.sweeps.job import Job
from popart_func.sweeps.records import every, last

pytestmark = pytest.mark.usefixtures("unchecked")

LARGER = {"seeds": [7, 0, 1, 2, 3], "learning_rate": (0.01, 0.05, 0.3), "step_size": (0.1, 0.5)}
STAGES = [
    {"seeds": [0, 2], "learning_rate": (0.3,), "step_size": (0.5,)},
    {"seeds": [0, 2, 7], "learning_rate": (0.3, 0.01), "step_size": (0.5,)},
    {"seeds": [0, 1, 2, 3, 7], "learning_rate": (0.3, 0.01), "step_size": (0.1, 0.5)},
    LARGER,
]


@pytest.fixture(scope="module")
def at_once() -> xarray.Dataset:
    return sweeps.run(**small_sweep.arguments(**LARGER))


@pytest.fixture
def ran(monkeypatch) -> list[Any]:
    """The chunks that run."""
    chunks, run = [], Job.run

    def noted(job: Job, chunk: Any) -> Any:
        chunks.append(chunk)
        return run(job, chunk)

    monkeypatch.setattr(Job, "run", noted)
    return chunks


def test_step_by_step_equals_at_once(at_once, tmp_path, ran, capsys):
    for stage in STAGES:
        found = sweeps.run(**small_sweep.arguments(store=tmp_path / "store", quiet=False, **stage))
        alone = at_once.sel(seed=stage["seeds"], learning_rate=list(stage["learning_rate"]))
        assert found.equals(alone.sel(step_size=list(stage["step_size"])))
        assert load(tmp_path / "store").equals(found)
    # In chunks of 2, as the first grid has: 1 + 1, then 3 + 3, 5 + 10 and 8 + 15, of which the full ones stay.
    assert len(ran) == 23
    messages = capsys.readouterr().err
    assert "The sweep grows from 4 to 12 lanes." in messages
    assert "damaged" not in messages
    ran.clear()
    assert sweeps.run(**small_sweep.arguments(store=tmp_path / "store", **LARGER)).equals(at_once)
    assert ran == []

    # Another program reads the lanes by their labels.
    lanes = xarray.open_zarr(tmp_path / "store" / "lanes.zarr", group="popart")
    grid = lanes.set_index(lane=["learning_rate", "step_size", "seed"]).unstack("lane")
    expected = at_once.sel(learner="popart").sortby(["learning_rate", "step_size", "seed"])
    np.testing.assert_array_equal(grid["final"].transpose(*expected["final"].dims), expected["final"])


def test_a_chunk_that_held_all_lanes_keeps_its_size(tmp_path, ran):
    small = {"seeds": range(2), "learning_rate": (0.3,), "step_size": (0.1, 0.5), "chunk_size": 100}
    large = {**small, "seeds": range(5)}
    for stage in (small, large, large):
        found = sweeps.run(**small_sweep.arguments(store=tmp_path / "store", **stage))
    assert len(ran) == 2 + 4, "SGD's chunk of 2 lanes runs again with 4, and three chunks are new"
    assert found.equals(sweeps.run(**small_sweep.arguments(**{**large, "chunk_size": 4})))


@pytest.mark.parametrize("shared", [True, False])
def test_with_more_steps_all_lanes_run_again(tmp_path, ran, capsys, shared):
    def arguments(steps: int, **changes: Any) -> dict[str, Any]:
        data = small_sweep.arguments()["data"]

        def longer(seed: int) -> Any:
            return optree.tree_map(lambda *parts: torch.cat(parts)[:steps], *(data(seed + 9 * k) for k in range(3)))

        # The files of `final` have the same shape for any number of steps.
        record = {"final": last(5)} if shared else {"final": last(5), "curve": every(3)}
        given = longer(0) if shared else longer
        return small_sweep.arguments(range(2), (0.01,), data=given, record=record, quiet=False, **changes)

    expected = sweeps.run(**arguments(25))
    ran.clear()
    sweeps.run(**arguments(10, store=tmp_path / "store"))
    once = len(ran)
    assert sweeps.run(**arguments(25, store=tmp_path / "store")).equals(expected)
    assert len(ran) == 2 * once
    assert "The sweep grows from 10 to 25 steps: all lanes run again." in capsys.readouterr().err
    with pytest.raises(sweeps.StoreError, match="steps: 25 there, 10 here"):
        sweeps.run(**arguments(10, store=tmp_path / "store"))


def test_what_computes_something_else_does_not_grow(tmp_path):
    sweeps.run(**small_sweep.arguments(store=tmp_path / "store", **STAGES[0]))
    arguments = small_sweep.arguments(store=tmp_path / "store", **LARGER)
    init, data = arguments["init"], arguments["data"]
    for changes in (
        {"init": lambda seed: init(seed + 1)},
        {"data": lambda seed: data(seed + 1)},
        {"record": {"final": last(4), "curve": every(3)}},
        {"lanes": sweeps.lanes(range(1, 9), learning_rate=(0.3, 0.01), step_size=(0.5,))},
    ):
        with pytest.raises(sweeps.StoreError, match="holds another sweep"):
            sweeps.run(**{**arguments, **changes})
    assert load(tmp_path / "store").attrs["complete"]


def test_a_grown_sweep_keeps_the_schedule_that_it_began_with(tmp_path):
    def found(seeds: int, **changes: Any) -> xarray.Dataset:
        arguments = small_sweep.arguments(range(seeds), (0.3,), **changes)
        return sweeps.run(**{**arguments, "make_learner": arguments["make_learner"]["popart"]})

    found(2, store=tmp_path, engine="native:elements")
    grown = found(3, store=tmp_path, engine="native")
    assert grown.attrs["engine"] == "native:elements"
    assert grown.equals(found(3, engine="native:elements"))
