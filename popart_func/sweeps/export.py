"""Export: a sweep's lanes as runs of an experiment tracker, as TensorBoard's logs, or as JSON for marl-eval.

Each takes a dataset as `run` or `load` returns it. A lane that has run is one run: its learner, hyper-parameters and
seed are its settings, what was recorded along the samples are its curves, and all else are its results. `as_runs` gives
that to an exporter of your own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray

from popart_func.sweeps.files import as_directory, write_atomically
from popart_func.sweeps.schema import DIVERGED, DONE, Schema

__all__ = ["Run", "as_runs", "to_marl_eval", "to_tensorboard", "to_tracker"]


class Run(NamedTuple):
    """One lane.

    Attributes:
        name: such as ``"popart learning_rate=0.01 seed=3"``.
        settings: its learner, the hyper-parameters that this takes, and the seed.
        curves: by name the samples, integers ``[samples]``, and the values there, ``[samples]``. A quantity of several
            entries has a curve for each, ``"name_0"``, ``"name_1"``.
        results: numbers that are no curves, such as ``diverged_at``.
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    results: dict[str, float | int]


def as_runs(dataset: xarray.Dataset) -> Iterator[Run]:
    """Gives the lanes that have run, one after the other, each once.

    Args:
        dataset: as `sweeps.run` or `sweeps.load` returns it.

    Raises:
        TypeError: the argument is no dataset.
        ValueError: the dataset is not a sweep's.
    """
    if not isinstance(dataset, xarray.Dataset):
        raise TypeError(f"as_runs: `dataset` must be an xarray.Dataset, got {type(dataset).__name__}.")
    if not {DONE, DIVERGED} <= set(dataset) or "configuration" not in dataset.attrs:
        raise ValueError(
            f"as_runs: `dataset` must be a sweep's, with {DONE!r}, {DIVERGED!r} and the attribute 'configuration', got "
            f"{list(dataset)} and the attributes {list(dataset.attrs)}."
        )
    takes = Schema.from_json(json.loads(dataset.attrs["configuration"])).lanes.takes
    axes = dataset[DONE].dims
    for place in np.ndindex(*dataset[DONE].shape):
        lane = dataset.isel(dict(zip(axes, place, strict=True)))
        own = {"learner", "seed", *takes[lane["learner"].item() if "learner" in lane.coords else ""]}
        # Along a hyper-parameter that a learner does not take, the dataset repeats its lanes.
        if not lane[DONE] or any(position and axis not in own for axis, position in zip(axes, place, strict=True)):
            continue
        settings = {str(axis): lane[axis].item() for axis in axes if axis in own}
        learner = [settings["learner"]] if "learner" in settings else []
        name = " ".join(learner + [f"{key}={value}" for key, value in settings.items() if key != "learner"])
        run = Run(name, settings, {}, {})
        for key, values in lane.drop_vars(DONE).items():
            curve = values.dims[:1] if values.dims and str(values.dims[0]).endswith("sample") else ()
            flat = values.values.reshape(*(values.sizes[dim] for dim in curve), -1)
            for entry in range(flat.shape[-1]):
                label = str(key) if values.ndim == len(curve) else f"{key}_{entry}"
                if curve:
                    run.curves[label] = values[curve[0]].values, flat[:, entry]
                else:
                    run.results[label] = flat[entry].item()
        yield run


def to_tracker(dataset: xarray.Dataset, tracker: Any, project: str, **options: Any) -> None:
    """Logs each lane as a run of wandb, of trackio, or of any module with their ``init``.

    Args:
        dataset: as `sweeps.run` or `sweeps.load` returns it.
        tracker: the module, ``wandb`` or ``trackio``.
        project: the project's name.
        **options: of the tracker's ``init``, such as ``group``.

    Example: ``import wandb; export.to_tracker(sweeps.load("sweep"), wandb, "catch")``
    """
    for run in as_runs(dataset):
        log = tracker.init(project=project, name=run.name, config=run.settings, **options)
        for sample, values in _by_sample(run).items():
            log.log(values, step=sample)
        log.log(run.results)
        log.finish()


def to_tensorboard(dataset: xarray.Dataset, directory: str | Path) -> None:
    """Writes each lane as a run of TensorBoard, a directory of its own; needs ``pip install tensorboard``.

    Args:
        dataset: as `sweeps.run` or `sweeps.load` returns it.
        directory: where to write; ``tensorboard --logdir`` takes it.
    """
    from torch.utils.tensorboard import SummaryWriter

    path = as_directory("to_tensorboard", "directory", directory)
    for run in as_runs(dataset):
        with SummaryWriter(str(path / run.name)) as writer:
            for label, (samples, values) in run.curves.items():
                for sample, value in zip(samples, values, strict=True):
                    writer.add_scalar(label, value, int(sample))
            writer.add_hparams(run.settings, run.results, run_name=".")


def to_marl_eval(dataset: xarray.Dataset, path: str | Path, *, environment: str, task: str) -> None:
    """Writes the curves as marl-eval's JSON: an algorithm for each learner and setting, a run for each seed.

    Args:
        dataset: as `sweeps.run` or `sweeps.load` returns it.
        path: the file.
        environment: the environment's name.
        task: the task's name.

    Source: the data structure of marl-eval (``id-marl-eval``), Gorsane et al. (2022).
    """
    algorithms: dict[str, dict[str, Any]] = {}
    for run in as_runs(dataset):
        algorithm = run.name.removesuffix(f"seed={run.settings['seed']}").strip() or "algorithm"
        steps: dict[str, Any] = {
            f"step_{number}": {"step_count": sample} | {label: [value] for label, value in values.items()}
            for number, (sample, values) in enumerate(_by_sample(run).items())
        }
        steps["absolute_metrics"] = {label: [float(values[-1])] for label, (_, values) in run.curves.items()}
        algorithms.setdefault(algorithm, {})[f"seed_{run.settings['seed']}"] = steps
    write_atomically(Path(path), json.dumps({environment: {task: algorithms}}, indent=1).encode())


def _by_sample(run: Run) -> dict[int, dict[str, float]]:
    """The values of all curves at each sample that one of them has, in order."""
    found: dict[int, dict[str, float]] = {}
    for label, (samples, values) in run.curves.items():
        for sample, value in zip(samples.tolist(), values.tolist(), strict=True):
            found.setdefault(sample, {})[label] = value
    return dict(sorted(found.items()))
