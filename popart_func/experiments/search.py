"""The paper's search for hyper-parameters on its online regression: learning rates x step sizes, four algorithms.

`sweep_grid` runs the grid; `judge` finds the best setting of an algorithm, with its interval. A setting is judged by
its seeds' *final error*: the mean of ``|f(x) - y|`` over the last 1000 of 5004 samples, the block after the last 65535,
where a prediction is made before its sample is seen. The average over seeds is the interquartile mean, which a few bad
seeds do not decide; a seed that diverged is infinitely bad.

Figure 1a shows another error: after ART and POP of the sample. POP keeps the prediction, so for Pop-Art both are the
same. ART alone moves the prediction toward the target, onto it with a step size of 1, so the larger the step size the
better that error looks. It is kept as ``recorded_error``.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), section 3: both are searched over
{10^-5, 10^-4.5, ..., 1}.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray
from torch import Tensor

from popart_func import sweeps
from popart_func._checks import check_scalar
from popart_func._typing import Float, Integer
from popart_func.experiments import competitors, regression
from popart_func.experiments.names import ALGORITHMS, HALF_DECADES
from popart_func.experiments.regression import SETTINGS, Setting
from popart_func.learners import Learner, LearnerState
from popart_func.models import init_params
from popart_func.pop_art import unnormalize
from popart_func.sweeps._checks import as_names, as_numbers, as_seeds
from popart_func.sweeps.records import last, mean, smoothed
from popart_func.sweeps.schema import DIVERGED, NEVER, NOT_RUN
from popart_func.sweeps.statistics import bootstrap_interval, interquartile_mean, probability_of_improvement
from popart_func.sweeps.workers import Workers

__all__ = ["FINAL", "RECORD", "cells", "judge", "make_learners", "reference_seconds", "sweep_grid"]

FINAL = 1000
"""The number of samples at the end of the stream that a setting is judged by."""


def prior_error(state: Any, info: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The error before the sample is seen, a record's quantity."""
    return info[0]


def recorded_error(state: Any, info: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """The error after ART and POP of the sample, as in Figure 1a, a record's quantity."""
    return info[1]


RECORD = {
    "final_error": last(FINAL, of=prior_error),
    "mean_error": mean(of=prior_error),
    "recorded_error": last(FINAL, of=recorded_error),
    "rmse": smoothed(regression.WINDOW, n=50, of=recorded_error),
}
"""What is kept of each lane: three numbers, and every 50th sample of the smoothed error."""


def make_learners(algorithms: Iterable[str] = ALGORITHMS) -> dict[str, Any]:
    """The paper's algorithms as `sweeps.run` takes them. SGD takes no step size, and so has no lanes for its values.

    >>> list(make_learners(["sgd"]))
    ['sgd']
    """
    return {name: _sgd if name == "sgd" else functools.partial(_normalized, name) for name in algorithms}


def sweep_grid(
    algorithms: Iterable[str] = ALGORITHMS,
    learning_rates: Iterable[SupportsFloat] = HALF_DECADES,
    step_sizes: Iterable[SupportsFloat] = HALF_DECADES,
    seeds: Iterable[SupportsIndex] = range(50),
    *,
    chunk_size: int = sweeps.CHUNK_SIZE,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    store: str | Path | None = None,
    workers: Workers = None,
    quiet: bool = False,
) -> xarray.Dataset:
    """Runs a grid of settings of the paper's experiment, by default the paper's own grid.

    Args:
        algorithms: one or more of `names.ALGORITHMS`.
        learning_rates: values of α.
        step_sizes: values of β, for the algorithms that have one.
        seeds: distinct integers in [0, 2**32).
        chunk_size: as in `sweeps.run`.
        engine: as in `sweeps.run`.
        device: as in `sweeps.run`.
        store: as in `sweeps.run`.
        workers: as in `sweeps.run`.
        quiet: as in `sweeps.run`.

    Returns:
        The variables of `RECORD`, ``diverged_at`` and ``done`` over learner, learning_rate, step_size and seed.

    Raises:
        TypeError, ValueError: as `sweeps.run`; or a learning rate is not positive, or a step size not in (0, 1].
    """
    names = as_names("sweep_grid", "algorithms", algorithms, ALGORITHMS)
    axes = {"learning_rate": tuple(as_numbers("sweep_grid", "learning_rates", learning_rates))}
    if any(name != "sgd" for name in names):
        axes["step_size"] = tuple(as_numbers("sweep_grid", "step_sizes", step_sizes))
    for name, values in axes.items():
        for value in values:
            check_scalar("sweep_grid", f"{name}s", value, above=0, most=1 if name == "step_size" else None)
    return sweeps.run(
        make_learners(names),
        lambda seed: regression.streams([seed])[:, 0],
        functools.partial(init_params, regression.make_network),
        sweeps.Grid(axes, tuple(as_seeds("sweep_grid", seeds)), tuple(names)),
        record=RECORD,
        chunk_size=chunk_size,
        engine=engine,
        device=device,
        store=store,
        workers=workers,
        quiet=quiet,
    )


def judge(dataset: xarray.Dataset, algorithm: str, by: str = "final_error") -> dict[str, Any]:
    """Finds an algorithm's best setting and sets the paper's beside it, each with an interval, as plain data.

    Args:
        dataset: as `sweep_grid` returns it.
        algorithm: its name.
        by: the error to judge by: a variable of `RECORD` with one number a lane.

    Returns:
        ``best`` and ``paper``: each with its setting, the interquartile mean of the error over seeds, the 95 %
        bootstrap interval of that and the number of diverged seeds. ``improvement``: the probability that a seed of the
        best setting beats one of the paper's, with its interval. ``as_good``: the number of settings whose interval
        reaches the best one's estimate. ``settings``, ``lanes``, ``diverged_lanes``: their numbers. ``paper`` and
        ``improvement`` are None where the grid lacks the paper's setting.

    Raises:
        ValueError: as `cells`.
    """
    errors = cells(dataset, algorithm, by, caller="judge")
    intervals = bootstrap_interval(errors, interquartile_mean)
    estimate = intervals["estimate"]
    place = {str(dim): int(i) for dim, i in estimate.fillna(np.inf).argmin(...).items()}
    best = _described(intervals, errors, place)
    paper_place = _place_of(errors, SETTINGS[algorithm])
    found: dict[str, Any] = {"best": best, "paper": None, "improvement": None}
    if paper_place is not None:
        found["paper"] = _described(intervals, errors, paper_place)
        better = probability_of_improvement(
            errors.isel(place).drop_vars(place), errors.isel(paper_place).drop_vars(place)
        )
        found["improvement"] = {name: _plain(better[name]) for name in ("estimate", "low", "high")}
    found["as_good"] = int((intervals["low"] <= best["estimate"]).sum()) if best["estimate"] is not None else 0
    found["settings"] = int(estimate.size)
    found["diverged_lanes"] = int((errors.isnull()).sum())
    found["lanes"] = int(errors.size)
    return found


def reference_seconds(samples: int = 500) -> float:
    """Measures the seconds that a lane-step takes in the reference style: one module per seed in a Python loop.

    Args:
        samples: the number of samples of seed 0's stream to run.
    """
    params = {name: leaf[None].numpy() for name, leaf in init_params(regression.make_network, 0).items()}
    stream = regression.streams([0])[:samples].numpy()
    competitors.reference(params, stream[:1])()  # a first step imports what the optimizer needs
    run = competitors.reference(params, stream)
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / samples


def cells(
    dataset: xarray.Dataset, algorithm: str, name: str = "final_error", *, caller: str = "cells"
) -> xarray.DataArray:
    """One algorithm's errors over its own hyper-parameters and the seeds; NaN for lanes that diverged.

    Args:
        dataset: as `sweep_grid` returns it.
        algorithm: its name.
        name: the error, a variable of `RECORD`.
        caller: the function that a message names.

    Raises:
        ValueError: there is no such algorithm or error; or some lanes have not run, so whether they diverge is unknown.
    """
    as_names(caller, "algorithm", algorithm, dataset["learner"].values.tolist())
    as_names(caller, "name" if caller == "cells" else "by", name, [str(variable) for variable in dataset.data_vars])
    one = dataset.sel(learner=algorithm, drop=True)
    not_run = int((one[DIVERGED] == NOT_RUN).sum())
    if not_run:
        raise ValueError(
            f"{caller}: `dataset` must be of a finished sweep, got {not_run} of {one[DIVERGED].size} lanes of "
            f"{algorithm!r} that have not been run."
        )
    errors = one[name].where(one[DIVERGED] == NEVER)
    if algorithm == "sgd" and "step_size" in errors.dims:
        errors = errors.isel(step_size=0, drop=True)
    return errors


def _sgd(learning_rate: Tensor) -> Any:
    return _on_numbers("sgd", Setting(learning_rate))


def _normalized(algorithm: str, learning_rate: Tensor, step_size: Tensor) -> Any:
    return _on_numbers(algorithm, Setting(learning_rate, step_size))


def _on_numbers(algorithm: str, setting: Setting) -> Any:
    """A learner whose samples are the numbers themselves: the step makes bits of them, so that streams stay small.

    Its info is the error before the sample is seen, and the error after ART and POP.
    """
    learner = regression.learner(algorithm, setting)

    def update(state: LearnerState, number: Integer[Tensor, ""]) -> tuple[LearnerState, tuple[Tensor, Tensor]]:
        dtype = next(iter(state.params.values())).dtype
        x, y = regression.bits(number).to(dtype), number.to(dtype)
        new, info = learner.update(state, (x, y))
        if algorithm != "art":  # without statistics, or with POP, both errors are the same
            return new, (info.error.mean(), info.error.mean())
        before = unnormalize(state.statistics, regression.apply(state.params, x)) - y
        return new, (before.abs().mean(), info.error.mean())

    return Learner(learner.init, update)  # type: ignore[arg-type]


def _place_of(errors: xarray.DataArray, setting: Setting) -> dict[str, int] | None:
    """The place of a setting in a grid, by dimension; None if the grid lacks it."""
    place = {}
    for dim in errors.dims:
        if dim != "seed":
            near = np.isclose(errors[dim].values, getattr(setting, str(dim)), rtol=1e-6, atol=0)
            if not near.any():
                return None
            place[str(dim)] = int(near.argmax())
    return place


def _described(intervals: xarray.Dataset, errors: xarray.DataArray, place: dict[str, int]) -> dict[str, Any]:
    """One setting with its estimate, interval and number of diverged seeds, as plain data."""
    at = intervals.isel(place)
    setting = {name: float(errors[name][index]) for name, index in place.items()}
    numbers = {name: _plain(at[name]) for name in ("estimate", "low", "high")}
    return {**setting, **numbers, "diverged": int(errors.isel(place).isnull().sum())}


def _plain(value: xarray.DataArray) -> float | None:
    return float(value) if np.isfinite(value) else None
