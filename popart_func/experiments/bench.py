"""How fast the engines are, against the peers, in one run: Pop-Art on the paper's network, streams of 5004 samples.

A *lane-step* is one training step of one seed. In `compare` every engine and every peer gets the same first parameters
and the same numbers, is checked to compute the same errors, is run once to compile, and then a few times; the median
counts. `costs` varies one thing at a time: lanes, steps, width, depth.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn, vmap

from popart_func import optim
from popart_func._version import __version__
from popart_func.engines import ENGINES, available_engines, scan_lanes
from popart_func.experiments import regression
from popart_func.learners import popart_learner
from popart_func.models import UnifiedModel, init_lanes, stateless
from popart_func.pop_art import popart

__all__ = ["PEERS", "Cost", "Result", "as_json", "compare", "costs", "machine"]

JAX_PEERS = ("jax", "jax_traced", "jax_lanes_last")
PEERS = (*JAX_PEERS, "reference")
"""What the engines are measured against, see `peers`. JAX runs on the engines' device if it has it, else on the CPU."""

# Engines whose cost per step does not depend on how many steps there are run a part of the stream; so do all of them
# where there are so many lanes that the errors alone would take gigabytes.
_PART = {"eager": 300, "reference": 300}
_MOST_LANE_STEPS = 500_000_000
_REFERENCE_LANES = 2
_CHECKED_STEPS = 100
_MAX_DISTINCT_LANES = 1000


class Result(NamedTuple):
    """One measurement.

    Attributes:
        engine: one of the engines, or one of `PEERS`.
        device: where it ran.
        lanes: how many lanes.
        steps: how many steps were run.
        ns_per_lane_step: the median, compile time apart.
        compile_seconds: how much longer the first run took than the median.
        spread: (slowest − fastest) / median of the repeats.
        extrapolated: whether it ran fewer steps or lanes than asked, whose cost per lane-step is taken to be the same.
    """

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
    """Measures engines and peers side by side.

    Args:
        lanes: numbers of lanes, one comparison each.
        engines: which engines and peers; by default all that run here.
        device: where the engines run, and JAX if it has that device; the reference runs on the CPU.
        steps: how much of the stream, at most.
        repeats: runs after the first.
        on_result: called with each result as it comes.

    Returns:
        The results, engine by engine for each number of lanes.

    Raises:
        ValueError: an unknown engine, or no lanes.
        ModuleNotFoundError: a peer that needs jax, and no jax.
        RuntimeError: two of them do not compute the same errors.
    """
    has_jax = importlib.util.find_spec("jax") is not None
    peers = [name for name in PEERS if has_jax or name not in JAX_PEERS]
    names = [*_found(torch.device(device)), *peers] if engines is None else list(engines)
    for name in names:
        if name not in (*ENGINES, *PEERS):
            raise ValueError(f"compare: `engines` must be among {[*ENGINES, *PEERS]}, got {name!r}.")
        if name in JAX_PEERS and not has_jax:
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


class Cost(NamedTuple):
    """What a lane-step costs when one thing is varied and the rest stays as in `COST_BASE`.

    Attributes:
        engine: one of the engines.
        varied: ``"lanes"``, ``"steps"``, ``"width"`` or ``"depth"``.
        value: of what is varied.
        ns_per_lane_step: the median of three runs, compile time apart.
    """

    engine: str
    varied: str
    value: int
    ns_per_lane_step: float


COST_BASE = {"lanes": 1000, "steps": 500, "width": 10, "depth": 4}
"""What stays while `costs` varies one thing."""

COST_VALUES = {
    "lanes": (1, 4, 16, 64, 256, 1000, 4000, 16_000, 100_000),
    "steps": (10, 100, 1000, 5000),
    "width": (4, 8, 16, 32, 64, 128, 256),
    "depth": (1, 2, 4, 8, 16),
}
"""What `costs` varies, and how."""


def costs(
    engines: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    values: Mapping[str, Iterable[int]] = COST_VALUES,
    on_cost: Callable[[Cost], None] | None = None,
) -> list[Cost]:
    """What a lane-step of Pop-Art costs against lanes, steps, hidden width and depth.

    Where a run would take long, fewer steps are run, and a curve ends where one run takes more than ten seconds.

    Args:
        engines: by default all that run here but eager.
        device: where.
        values: what to vary, and which values to give it.
        on_cost: called with each cost as it comes.
    """
    names = [name for name in _found(torch.device(device)) if name != "eager"] if engines is None else list(engines)
    results = []
    for name in names:
        for varied, numbers in values.items():
            for value in numbers:
                shape = {**COST_BASE, varied: value}
                results.append(Cost(name, varied, value, _cost(name, torch.device(device), **shape)))
                if on_cost is not None:
                    on_cost(results[-1])
                if results[-1].ns_per_lane_step * _lane_steps(**shape) > 1e10:
                    break
    return results


def _lane_steps(*, lanes: int, steps: int, width: int, depth: int) -> int:
    """How many lane-steps a run of this shape makes."""
    work = lanes * (16 * width + (depth - 1) * width**2)
    return lanes * max(10, min(steps, int(2e10 / work)))


def _cost(engine: str, device: torch.device, *, lanes: int, steps: int, width: int, depth: int) -> float:
    sizes = [16, *[width] * depth]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    module = nn.Sequential(*layers, nn.Linear(width, 1))
    learner = popart_learner(stateless(module), optim.sgd(10**-2.5), popart(1, 10**-0.5), head=str(len(layers)))

    def step(state: Any, number: Tensor) -> tuple[Any, Tensor]:
        state, info = learner.update(state, (regression.bits(number).float(), number.float()))
        return state, info.error

    params = {name: leaf.detach().to(device).expand(lanes, *leaf.shape) for name, leaf in module.named_parameters()}
    start = vmap(learner.init)(params)
    steps = _lane_steps(lanes=lanes, steps=steps, width=width, depth=depth) // lanes
    numbers = torch.randint(0, 1024, (steps, lanes), dtype=torch.int32, device=device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        scan_lanes(step, start, numbers, shared=False, engine=engine)[1].cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / (steps * lanes) * 1e9


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "popart_func": __version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def as_json(results: Iterable[Result]) -> dict[str, Any]:
    """The results as plain data: ``{"results": [...], "machine": {...}}``."""
    return {"results": [result._asdict() for result in results], "machine": machine()}


class _Problem(NamedTuple):
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
        if name in PEERS:
            from popart_func.experiments import peers

            device = torch.device("cpu") if name == "reference" else _enter_jax_device(stack, device)
            make = {
                "jax": peers.jax_scan,
                "jax_traced": peers.jax_traced,
                "jax_lanes_last": peers.jax_lanes_last,
                "reference": peers.reference,
            }[name]
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
    """Has JAX run on a device, or on the CPU if it does not have it; says which."""
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
    """Errors up to 1023 and not yet chaotic: peers agree to 6e-4, and a step size of 0.3 for 0.316 shows as 0.15."""
    steps, lanes = (min(a, b) for a, b in zip(errors.shape, expected.shape, strict=True))
    difference = float(np.abs(errors[:steps, :lanes] - expected[:steps, :lanes]).max())
    if not difference < 0.02:
        raise RuntimeError(
            f"compare: {name} must compute the errors that eager does, got a difference of {difference}."
        )


def _found(device: torch.device) -> list[str]:
    return [name for name, reason in available_engines(device).items() if reason is None]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
