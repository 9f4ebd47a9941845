"""Costs of the engines: nanoseconds per lane-step of Pop-Art with one thing varied: lanes, steps, width or depth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, vmap

from popart_func import optim
from popart_func.engines import available_engines, scan_lanes
from popart_func.experiments import regression
from popart_func.learners import popart_learner
from popart_func.models import stateless
from popart_func.pop_art import popart

__all__ = ["COST_BASE", "COST_VALUES", "Cost", "costs"]


class Cost(NamedTuple):
    """The cost of a lane-step with one thing varied and the rest as in `COST_BASE`.

    Attributes:
        engine: one of the engines.
        varied: ``"lanes"``, ``"steps"``, ``"width"`` or ``"depth"``.
        value: the value of the varied thing.
        ns_per_lane_step: the median of three runs, without compiling.
    """

    engine: str
    varied: str
    value: int
    ns_per_lane_step: float


COST_BASE = {"lanes": 1000, "steps": 500, "width": 10, "depth": 4}
"""The shape of a run; `costs` varies one thing at a time."""

COST_VALUES = {
    "lanes": (1, 4, 16, 64, 256, 1000, 4000, 16_000, 100_000),
    "steps": (10, 100, 1000, 5000),
    "width": (4, 8, 16, 32, 64, 128, 256),
    "depth": (1, 2, 4, 8, 16),
}
"""The values that `costs` gives to each thing."""


def costs(
    engines: Iterable[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    values: Mapping[str, Iterable[int]] = COST_VALUES,
    on_cost: Callable[[Cost], None] | None = None,
) -> list[Cost]:
    """Measures what a lane-step of Pop-Art costs against lanes, steps, hidden width and depth.

    A run that would take long makes fewer steps. A curve ends where one run takes more than ten seconds.

    Args:
        engines: the engines' names; by default all that run here except eager.
        device: where the engines run.
        values: what to vary, and which values to give it.
        on_cost: called with each cost as it comes.

    Returns:
        The costs, engine by engine, in the order of ``values``.
    """
    found = available_engines(torch.device(device)).items()
    names = [name for name, reason in found if reason is None and name != "eager"] if engines is None else engines
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
    """The number of lane-steps of a run: with large networks and many lanes it makes fewer steps, but at least 10."""
    multiplications = lanes * (16 * width + (depth - 1) * width**2)
    return lanes * max(10, min(steps, int(2e10 / multiplications)))


def _cost(engine: str, device: torch.device, *, lanes: int, steps: int, width: int, depth: int) -> float:
    """Nanoseconds per lane-step of one engine on a multi-layer network of this shape."""
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
