"""Benchmark: how fast the engines are beside their competitors, on Pop-Art with the paper's network and streams.

A *lane-step* is one training step of one seed. `compare` gives every engine and every competitor the same first
parameters and the same numbers, checks that they compute the same errors, runs each once to compile, and then a few
times; the median counts. What an engine costs with other lanes, steps and networks is in `engine_costs`.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from popart_func._version import __version__
from popart_func.engines import ENGINES, available_engines, scan_lanes
from popart_func.experiments import competitors, regression
from popart_func.experiments.names import COMPETITORS, JAX_COMPETITORS
from popart_func.models import UnifiedModel, init_lanes

__all__ = ["Result", "as_json", "compare", "machine"]

# Loops in Python cost the same in every step, so they run a part of the stream. All engines do where there are so many
# lanes that the errors alone would take gigabytes.
_PART = {"eager": 300, "reference": 300}
_MOST_LANE_STEPS = 500_000_000
_REFERENCE_LANES = 2
_CHECKED_STEPS = 100
_MAX_DISTINCT_LANES = 1000


class Result(NamedTuple):
    """One measurement.

    Attributes:
        workload: what was run, ``"regression"``.
        engine: one of the engines, or one of `names.COMPETITORS`.
        device: where it ran.
        lanes: the number of lanes.
        steps: the number of steps that ran.
        ns_per_lane_step: the median of the repeats, without compiling.
        compile_seconds: how much longer the first run took than the median.
        spread: (slowest − fastest) / median of the repeats.
        extrapolated: whether fewer steps or lanes ran than asked; a lane-step is taken to cost the same in the rest.
    """

    workload: str
    engine: str
    device: str
    lanes: int
    steps: int
    ns_per_lane_step: float
    compile_seconds: float
    spread: float
    extrapolated: bool


def compare(
    lanes: Iterable[int] = (50, 1000),
    *,
    engines: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    steps: int = regression.STEPS,
    repeats: int = 5,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Measures engines and competitors side by side.

    Args:
        lanes: numbers of lanes, one comparison each.
        engines: the names of engines and competitors; by default all that run here.
        device: where the engines run, and JAX if it has that device; the reference runs on the CPU.
        steps: how many samples of the stream to run, at most.
        repeats: the number of timed runs, after a first one that compiles.
        on_result: called with each result as it comes.

    Returns:
        The results, engine by engine for each number of lanes.

    Raises:
        ValueError: an engine is unknown, or a number of lanes is below 1.
        ModuleNotFoundError: a competitor needs jax, which is not installed.
        RuntimeError: an engine or a competitor computes other errors than eager.
    """
    has_jax = importlib.util.find_spec("jax") is not None
    if engines is None:
        found = [name for name, reason in available_engines(torch.device(device)).items() if reason is None]
        names = [*found, *(name for name in COMPETITORS if has_jax or name not in JAX_COMPETITORS)]
    else:
        names = list(engines)
    for name in names:
        if name not in (*ENGINES, *COMPETITORS):
            raise ValueError(f"compare: `engines` must be among {[*ENGINES, *COMPETITORS]}, got {name!r}.")
        if name in JAX_COMPETITORS and not has_jax:
            raise ModuleNotFoundError(f"compare: {name!r} needs jax: pip install 'popart-func[jax]'", name="jax")
    results = []
    for number in lanes:
        if number < 1:
            raise ValueError(f"compare: `lanes` must be at least 1, got {number}.")
        problem = _Problem.of(number, steps, torch.device(device))
        for name in names:
            result = _measure(name, problem, repeats)
            results.append(result)
            if on_result is not None:
                on_result(result)
    return results


def machine() -> dict[str, Any]:
    """Processor, cores, GPU and versions that the numbers were measured with."""
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "popart_func": __version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def as_json(results: Iterable[Any]) -> dict[str, Any]:
    """The results of a benchmark, named tuples, as plain data: ``{"results": [...], "machine": {...}}``."""
    return {"results": [result._asdict() for result in results], "machine": machine()}


class _Problem(NamedTuple):
    """What every engine gets, and the first errors that it must compute."""

    params: dict[str, Tensor]
    numbers: Tensor
    steps: int
    expected: np.ndarray

    @classmethod
    def of(cls, lanes: int, steps: int, device: torch.device) -> _Problem:
        seeds = range(min(lanes, _MAX_DISTINCT_LANES))
        repeat = torch.arange(lanes) % len(seeds)
        params = init_lanes(lambda: UnifiedModel(16, 10, 1), seeds)
        numbers = regression.streams(seeds)[:steps]
        expected = _engine("eager", params, numbers[:_CHECKED_STEPS])().numpy()
        params = {name: leaf.to(device)[repeat.to(device)] for name, leaf in params.items()}
        return cls(
            params, numbers[: max(1, _MOST_LANE_STEPS // lanes)].to(device)[:, repeat.to(device)], steps, expected
        )


def _measure(name: str, problem: _Problem, repeats: int) -> Result:
    params, numbers, asked, expected = problem
    lanes, steps = numbers.shape[1], min(numbers.shape[0], _PART.get(name, numbers.shape[0]))
    device = numbers.device
    used = min(lanes, _REFERENCE_LANES) if name == "reference" else lanes
    with ExitStack() as stack:
        if name in COMPETITORS:
            device = torch.device("cpu") if name == "reference" else _enter_jax_device(stack, device)
            make = competitors.MAKERS[name]
            plain = {key: leaf[:used].cpu().numpy() for key, leaf in params.items()}
            run = make(plain, numbers[:steps, :used].cpu().numpy())
        else:
            run = _engine(name, params, numbers[:steps])

        started = time.perf_counter()
        errors = run()
        first = time.perf_counter() - started
        checked = errors[:_CHECKED_STEPS, : expected.shape[1]]
        _check_same(name, np.asarray(checked.cpu() if isinstance(checked, Tensor) else checked), expected)
        del errors, checked
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return Result(
        workload="regression",
        engine=name,
        device=str(device),
        lanes=lanes,
        steps=steps,
        ns_per_lane_step=median / (steps * used) * 1e9,
        compile_seconds=max(0.0, first - median),
        spread=(max(seconds) - min(seconds)) / median,
        extrapolated=steps < asked or used < lanes,
    )


def _enter_jax_device(stack: ExitStack, device: torch.device) -> torch.device:
    """Makes JAX run on a device, or on the CPU where JAX lacks it; returns which."""
    import jax

    try:
        found = jax.devices("gpu" if device.type == "cuda" else device.type)[device.index or 0]
    except (RuntimeError, IndexError):
        found, device = jax.devices("cpu")[0], torch.device("cpu")
    stack.enter_context(jax.default_device(found))
    return device


def _engine(name: str, params: dict[str, Tensor], numbers: Tensor) -> Callable[[], Tensor]:
    init, step = regression.init_and_step("popart")
    start = init(params)

    def run() -> Tensor:
        _, errors = scan_lanes(step, start, numbers, shared=False, engine=name)
        if errors.is_cuda:
            torch.cuda.synchronize(errors.device)
        return errors

    return run


def _check_same(name: str, errors: np.ndarray, expected: np.ndarray) -> None:
    """Raises unless the first errors are those of eager.

    They go up to 1023 and are not yet chaotic: competitors agree to 6e-4, and a step size of 0.3 for 0.316 shows as
    0.15.
    """
    steps, lanes = (min(a, b) for a, b in zip(errors.shape, expected.shape, strict=True))
    difference = float(np.abs(errors[:steps, :lanes] - expected[:steps, :lanes]).max())
    if not difference < 0.02:
        raise RuntimeError(
            f"compare: {name} must compute the errors that eager does, got a difference of {difference}."
        )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
