"""The paper's online regression (Figure 1a): targets of 0 to 1023, and now and then 65535.

A small network learns numbers from their 16 bits, one example at a time, in one pass over 5004 of them. The rare 65535
is what normalization has to survive. Seed s draws the stream and the first parameters; all seeds of an algorithm run
side by side, each in its own lane.

`streams` gives the numbers, `learner` an algorithm, `reproduce` the whole experiment as a labelled array.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), section 3 and Figure 1a.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
import xarray
from torch import Tensor, vmap

from popart_func import optim
from popart_func._typing import Integer
from popart_func._version import __version__
from popart_func.engines import resolve_engine, scan_lanes
from popart_func.experiments.names import ALGORITHMS
from popart_func.learners import (
    Learner,
    LearnerState,
    art_learner,
    normalized_sgd_learner,
    popart_learner,
    sgd_learner,
)
from popart_func.models import UnifiedModel, init_lanes, stateless
from popart_func.pop_art import popart
from popart_func.sweeps._checks import as_device, as_names, as_seeds

__all__ = [
    "SETTINGS",
    "SPIKE",
    "STEPS",
    "WINDOW",
    "Setting",
    "bits",
    "init_and_step",
    "learner",
    "reproduce",
    "smooth",
    "streams",
]

STEPS = 5004
"""The length of a stream: five blocks of 1000 numbers, with one `SPIKE` after each of the first four."""

SPIKE = 65535
"""The rare target: 16 ones."""

WINDOW = 10
"""The number of samples in the moving average of the error."""

CHUNKS = 12
"""The number of pieces of equal length that a run is cut into, to show progress and compile one shape."""


class Setting(NamedTuple):
    """The hyper-parameters of an algorithm: floats, or 0-d tensors inside a lane.

    Attributes:
        learning_rate: α.
        step_size: β of the statistics, or None for an algorithm without.
    """

    learning_rate: float | Tensor
    step_size: float | Tensor | None = None


SETTINGS = {
    "sgd": Setting(10**-3.5),
    # The paper prints α = 10^-2.5 for ART; 10^-3.5 is what reproduces its curve.
    "art": Setting(10**-3.5, 10**-4.0),
    "popart": Setting(10**-2.5, 10**-0.5),
    "normalized_sgd": Setting(10**-2.5, 10**-0.5),
}
"""The paper's hyper-parameters for each algorithm, found there by a grid search."""

_MODEL = (16, 10, 1)

with torch.device("meta"):  # no numbers are drawn, so that a learner can be built inside a lane
    apply = stateless(UnifiedModel(*_MODEL))


def streams(seeds: Iterable[SupportsIndex]) -> Integer[Tensor, "5004 seeds"]:
    """The streams of numbers to learn; a number is both the target and, as bits, the input.

    5000 draws of ``numpy.random.RandomState(seed).randint(0, 1024)``, laid out row by row as 1000 x 5; block j is
    column j, and a 65535 follows each of the first four blocks.

    Args:
        seeds: distinct integers in [0, 2**32).

    Returns:
        int32, ``[5004, seeds]``: time first, as the engines read it.

    Raises:
        TypeError, ValueError: the seeds are none.

    >>> streams([0, 1])[[0, 1, 1000, 5003]]
    tensor([[  684,    37],
            [  763,   905],
            [65535, 65535],
            [  295,   954]], dtype=torch.int32)
    """
    columns = []
    for seed in as_seeds("streams", seeds):
        blocks = np.random.RandomState(seed).randint(0, 1024, 5000).reshape(1000, 5).T
        # Spikes go in before positions 1000, 2000, 3000 and 4000 of the plain numbers.
        columns.append(np.insert(blocks.reshape(-1), [1000, 2000, 3000, 4000], SPIKE))
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))


def bits(number: Integer[Tensor, "*axes"]) -> Integer[Tensor, "*axes 16"]:
    """The 16 binary digits of a number, the most significant first.

    Args:
        number: an integer in [0, 65535], 0-d; leading axes are kept.

    Returns:
        Zeros and ones, ``[..., 16]``, of the number's dtype.

    >>> bits(torch.tensor(426))
    tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0])
    """
    shifts = torch.arange(15, -1, -1, dtype=number.dtype, device=number.device)
    return (number[..., None] >> shifts) & 1


def learner(algorithm: str, setting: Setting | None = None) -> Learner:
    """One of the four algorithms on the experiment's network, written for one lane.

    Args:
        algorithm: one of `ALGORITHMS`.
        setting: its hyper-parameters; by default the paper's.

    Raises:
        ValueError: the algorithm is unknown, or has statistics and the setting no step size.

    >>> learner("sgd").init(init_lanes(lambda: UnifiedModel(16, 10, 1), [0])).statistics.scale
    tensor([1.])
    """
    as_names("learner", "algorithm", algorithm, ALGORITHMS)
    learning_rate, step_size = SETTINGS[algorithm] if setting is None else setting
    optimizer = optim.sgd(learning_rate)
    if algorithm == "sgd":
        return sgd_learner(apply, optimizer)
    if step_size is None:
        raise ValueError(f"learner: `setting` must have a step_size for {algorithm!r}, got None.")
    makers: dict[str, Callable[..., Learner]] = {
        "art": art_learner,
        "popart": popart_learner,
        "normalized_sgd": normalized_sgd_learner,
    }
    return makers[algorithm](apply, optimizer, popart(1, step_size))


def smooth(error: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """The moving average over the last axis, without its ends, computed in float64.

    Args:
        error: ``[..., steps]``.
        window: the number of neighbours that are averaged.

    Returns:
        ``[..., steps - window + 1]`` of the input's dtype; entry i averages inputs i to i + window - 1.

    >>> smooth(np.array([1.0, 2.0, 3.0, 7.0]), window=2)
    array([1.5, 2.5, 5. ])
    """
    if not 1 <= window <= error.shape[-1]:
        raise ValueError(f"smooth: `window` must be between 1 and the {error.shape[-1]} steps, got {window}.")
    windows = np.lib.stride_tricks.sliding_window_view(error, window, axis=-1)
    return windows.mean(axis=-1, dtype=np.float64).astype(error.dtype)


def reproduce(
    seeds: Iterable[SupportsIndex] = range(50),
    *,
    algorithms: Iterable[str] = ALGORITHMS,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[str, int], None] | None = None,
) -> xarray.Dataset:
    """Runs the experiment of Figure 1a: every algorithm on every seed, all seeds of an algorithm at once.

    It records ``|f(x) - y|``, unnormalized, after ART and POP of a sample and before its gradient step.

    Args:
        seeds: distinct integers in [0, 2**32); each draws its own stream and its own first parameters.
        algorithms: one or more of `names.ALGORITHMS`, in the order of the result.
        engine: one of `popart_func.engines.ENGINES`, or ``"auto"``.
        device: where to run.
        dtype: of parameters and errors, float32 or float64.
        on_progress: called as ``on_progress(algorithm, steps)`` with the number of steps done, of 5004: with 0 when an
            algorithm begins, and then after each twelfth.

    Returns:
        The variables ``error`` (algorithm, seed, step) and ``rmse`` (algorithm, seed, sample), its moving average, with
        the coordinates learning_rate, step_size, seconds and compile_seconds per algorithm. Each has a ``long_name``
        and ``units`` among its attributes.

    Raises:
        TypeError, ValueError: seeds, algorithms, engine, device or dtype are none.
        EngineUnavailableError: the engine can't run on the device.

    For example (it takes some seconds)::

        median = reproduce(range(50)).rmse.median("seed").sel(algorithm="popart")
    """
    seeds = as_seeds("reproduce", seeds)
    algorithms = as_names("reproduce", "algorithms", algorithms, ALGORITHMS)
    device = as_device("reproduce", device)
    engine = resolve_engine(engine, device, STEPS, caller="reproduce")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"reproduce: `dtype` must be torch.float32 or torch.float64, got {dtype}.")

    numbers = streams(seeds).to(device)
    params = {name: leaf.to(device, dtype) for name, leaf in init_lanes(make_network, seeds).items()}
    errors, seconds, compile_seconds = [], [], []
    for algorithm in algorithms:
        error, chunk_seconds = _run(algorithm, params, numbers, engine, on_progress)
        extra = max(0.0, chunk_seconds[0] - float(np.median(chunk_seconds[1:])))
        errors.append(error)
        seconds.append(sum(chunk_seconds) - extra)
        compile_seconds.append(extra)

    error = np.stack(errors)
    settings = [SETTINGS[algorithm] for algorithm in algorithms]
    dataset = xarray.Dataset(
        {"error": (("algorithm", "seed", "step"), error), "rmse": (("algorithm", "seed", "sample"), smooth(error))},
        coords={
            "algorithm": np.array(algorithms, dtype=object),
            "seed": np.array(seeds, dtype=np.int64),
            "step": np.arange(STEPS),
            "sample": np.arange(STEPS - WINDOW + 1),
            "learning_rate": ("algorithm", [setting.learning_rate for setting in settings]),
            "step_size": ("algorithm", [np.nan if s.step_size is None else s.step_size for s in settings]),
            "seconds": ("algorithm", seconds),
            "compile_seconds": ("algorithm", compile_seconds),
        },
        attrs={
            "title": "Online regression on numbers of very different magnitude (van Hasselt et al. 2016, Figure 1a)",
            "popart_func_version": __version__,
            "torch_version": torch.__version__,
            "engine": engine,
            "device": _device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
        },
    )
    for name, (long_name, units) in _DESCRIPTIONS.items():
        dataset[name].attrs = {"long_name": long_name, "units": units}
    return dataset


_DESCRIPTIONS = {
    "error": ("|f(x) - y|, unnormalized, after ART and POP of the sample and before its gradient step", "target units"),
    "rmse": (f"error, moving average of {WINDOW}: entry i averages steps i to i + {WINDOW - 1}", "target units"),
    "algorithm": ("algorithm", ""),
    "seed": ("seed of the stream and of the first parameters", ""),
    "step": ("sample number, one gradient step each", "samples"),
    "sample": (f"first sample of a window of {WINDOW}", "samples"),
    "learning_rate": ("learning rate of stochastic gradient descent", "1"),
    "step_size": ("step size of the statistics; NaN without statistics", "1"),
    "seconds": (f"wall time of all {STEPS} steps of all seeds, compile_seconds taken off", "s"),
    "compile_seconds": (
        f"how much longer the first of {CHUNKS} equal chunks of steps took than the median of the others: "
        "tracing, compiling and warming up",
        "s",
    ),
}


def _run(
    algorithm: str,
    params: dict[str, Tensor],
    numbers: Tensor,
    engine: str,
    on_progress: Callable[[str, int], None] | None,
    chunks: int = CHUNKS,
) -> tuple[np.ndarray, list[float]]:
    """Runs one algorithm; returns its errors ``[seeds, steps]`` and the wall time of each chunk in seconds."""
    init, step = init_and_step(algorithm)
    carry = init(params)
    errors, seconds, done = [], [], 0
    if on_progress is not None:
        on_progress(algorithm, 0)
    for chunk in numbers.chunk(chunks):
        started = time.perf_counter()
        carry, error = scan_lanes(step, carry, chunk, shared=False, engine=engine)
        errors.append(error.cpu())  # which also waits for a GPU
        seconds.append(time.perf_counter() - started)
        done += chunk.shape[0]
        if on_progress is not None:
            on_progress(algorithm, done)
    return torch.cat(errors).T.contiguous().numpy(), seconds


@functools.cache
def init_and_step(algorithm: str) -> tuple[Callable[..., LearnerState], Callable[..., Any]]:
    """An algorithm's ``init`` over lanes and its step of one lane.

    They are the same function objects in every call, so that an engine compiles the step once.
    """
    init, update = learner(algorithm)

    def step(state: LearnerState, number: Tensor) -> tuple[LearnerState, Tensor]:
        dtype = next(iter(state.params.values())).dtype
        state, info = update(state, (bits(number).to(dtype), number.to(dtype)))
        return state, info.error

    return vmap(init), step


def make_network() -> UnifiedModel:
    """The experiment's network, with fresh parameters."""
    return UnifiedModel(*_MODEL)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
