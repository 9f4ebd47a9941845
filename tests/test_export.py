"""A sweep's lanes as runs of trackers, of TensorBoard and of marl-eval."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_sweep
import xarray

from popart_func import sweeps
from popart_func.sweeps import export
from popart_func.sweeps.records import every, last

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def found() -> xarray.Dataset:
    record = {"final": last(5), "curve": every(4), "scale": every(5, of=lambda state, info: state.params["0.weight"])}
    grid = {"seeds": [3, 5], "learning_rate": (0.01, 0.3), "step_size": (0.1, 0.5)}
    dataset = sweeps.run(**small_sweep.arguments(record=record, **grid))
    done = dataset["done"].copy()
    done.loc[{"learner": "popart", "seed": 5, "learning_rate": 0.3}] = False
    return dataset.assign(done=done)


def test_each_lane_that_has_run_is_one_run(found):
    """SGD takes no step size, along which the dataset repeats its lanes."""
    runs = list(export.as_runs(found))
    assert len(runs) == len({run.name for run in runs}) == 4 + 6
    assert runs[4].settings == {"learner": "popart", "learning_rate": 0.01, "step_size": 0.1, "seed": 3}
    one = runs[1]
    assert one.name == "sgd learning_rate=0.01 seed=5"
    assert one.settings == {"learner": "sgd", "learning_rate": 0.01, "seed": 5}
    lane = found.sel(one.settings).isel(step_size=0)
    samples, values = one.curves["curve"]
    assert samples.tolist() == [0, 4, 8]
    np.testing.assert_array_equal(values, lane["curve"])
    assert one.curves["scale_1"][0].tolist() == [0, 5]
    np.testing.assert_array_equal(one.curves["scale_1"][1], lane["scale"][:, 0, 1])
    assert one.results == {"final": lane["final"].item(), "diverged_at": -1}


def test_other_datasets_are_refused(found):
    for other in (found[["final"]], found.drop_attrs()):
        with pytest.raises(ValueError, match="as_runs: `dataset` must be a sweep's, with 'done', 'diverged_at'"):
            list(export.as_runs(other))
    with pytest.raises(TypeError, match=r"as_runs: `dataset` must be an xarray\.Dataset, got str"):
        list(export.as_runs("sweep"))


def test_of_one_learner_no_name_is_needed(found):
    runs = list(export.as_runs(found.sel(learner="popart", step_size=0.5)))
    assert [run.name for run in runs] == [
        "learning_rate=0.01 seed=3", "learning_rate=0.01 seed=5", "learning_rate=0.3 seed=3",
    ]  # fmt: skip


def test_a_tracker_gets_every_run_and_every_sample(found):
    calls: list[Any] = []

    def init(**options: Any) -> Any:
        calls.append(options)
        return SimpleNamespace(
            log=lambda values, step=None: calls.append((step, values)), finish=lambda: calls.append("finished")
        )

    export.to_tracker(found, SimpleNamespace(init=init), "mine", group="all")
    lane = found.isel(learner=0, learning_rate=0, step_size=0, seed=0)
    assert calls[0]["project"] == "mine"
    assert calls[0]["config"]["seed"] == 3
    assert calls[0]["group"] == "all"
    assert [call[0] for call in calls[1:6]] == [0, 4, 5, 8, None]
    assert calls[2][1] == {"curve": lane["curve"].item(1)}
    assert calls[5][1] == {"final": lane["final"].item(), "diverged_at": -1}
    assert calls.count("finished") == 10


def test_marl_eval(found, tmp_path):
    export.to_marl_eval(found, tmp_path / "all.json", environment="numbers", task="bits")
    algorithms = json.loads((tmp_path / "all.json").read_text())["numbers"]["bits"]
    assert {name: list(runs) for name, runs in algorithms.items()} == {
        "sgd learning_rate=0.01": ["seed_3", "seed_5"],
        "sgd learning_rate=0.3": ["seed_3", "seed_5"],
        "popart learning_rate=0.01 step_size=0.1": ["seed_3", "seed_5"],
        "popart learning_rate=0.01 step_size=0.5": ["seed_3", "seed_5"],
        "popart learning_rate=0.3 step_size=0.1": ["seed_3"],
        "popart learning_rate=0.3 step_size=0.5": ["seed_3"],
    }
    run = algorithms["sgd learning_rate=0.01"]["seed_5"]
    curve = found["curve"].isel(learner=0, learning_rate=0, step_size=0, seed=1)
    assert run["step_1"] == {"step_count": 4, "curve": [curve.item(1)]}
    assert run["absolute_metrics"]["curve"] == [curve.item(2)]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(found, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    export.to_tensorboard(found.isel(learner=[0], learning_rate=[0], seed=[0]), tmp_path)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder)).Reload().Scalars("curve")
    assert [event.step for event in events] == [0, 4, 8]
    np.testing.assert_allclose([event.value for event in events], found["curve"][0, 0, 0, 0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(found, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which trackio reads when it is imported
    tracker = pytest.importorskip(name, reason=f"needs {name}")
    export.to_tracker(found.isel(learner=[0], learning_rate=[0]), tracker, "mine")
    assert any(path.stat().st_size > 1000 for path in tmp_path.rglob("*") if path.is_file())
