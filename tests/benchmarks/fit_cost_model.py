"""Fits the constants of `popart_func.engines.cost_model` to this machine, and shows what the rule then chooses.

    taskset -c 0 python tests/benchmarks/fit_cost_model.py              # the schedules of the native engine: 2 minutes
    taskset -c 0 python tests/benchmarks/fit_cost_model.py --inductor   # inductor as well: it compiles for 10 minutes

It runs steps on one thread and takes CPU time, so that other work on the machine changes it little. Copy the line that
begins with ``CONSTANTS`` into the module.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import popart_func as pf
from popart_func.engines import cost_model, load_engine
from popart_func.engines.lane_scan import LaneScan, make_lane_scan

POINTS = [
    *((width, 1, lanes, 2) for width in (4, 16, 32, 64, 128) for lanes in (1, 4, 16, 64)),
    *((width, batch, lanes, 2) for width in (8, 32, 64) for batch in (8, 32, 128) for lanes in (1, 16, 64)),
    *((10, 1, lanes, 4) for lanes in (1, 2, 4, 8, 16, 256)),  # the paper's network
    *((256, batch, lanes, 2) for batch in (1, 32) for lanes in (1, 16)),
]
"""Width, batch, lanes and number of hidden layers of the networks that are measured; each with SGD and with Adam."""

FEW = [(16, 1, 1, 2), (64, 1, 16, 2), (64, 32, 4, 2), (128, 8, 64, 2), (256, 32, 1, 2), (256, 128, 16, 2)]
"""The points at which `inductor` is measured."""


def network_scan(width: int, batch: int, lanes: int, depth: int, optimizer: Any, steps: int) -> LaneScan:
    """Pop-Art on a network with hidden layers of one width."""

    def make() -> nn.Module:
        sizes = [16] + depth * [width]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, 1))

    head = str(2 * depth)
    learner = pf.popart_learner(pf.stateless(make()), optimizer, pf.popart(1, 0.01), head=head)
    state = torch.vmap(learner.init)(
        {name: leaf.expand(lanes, *leaf.shape) for name, leaf in pf.init_params(make, 0).items()}
    )
    x = torch.randn(steps, lanes, batch, 16)
    return make_lane_scan("fit", learner_step(learner), state, (x, x.sum(-1, keepdim=True)), shared=False)


def learner_step(learner: Any) -> Callable[..., Any]:
    def step(state: Any, batch: Any) -> Any:
        state, info = learner.update(state, batch)
        return state, info.error.mean()

    return step


def walk_scan(lanes: int, steps: int) -> LaneScan:
    """Q-learning on a walk, with the walk inside: a step of scalars."""

    def step(carry: Any, _: Any) -> Any:
        q, place, key = carry
        key, draw = pf.random.split(key)
        action = torch.where(pf.random.uniform(draw) < 0.1, pf.random.randint(draw, (), 0, 2), q[place].argmax())
        after = (place + 2 * action - 1).clamp(0, 19)
        target = (after == 19) + 0.9 * q[after].max()
        q = q.index_put((place, action), q[place, action] + 0.1 * (target - q[place, action]))
        return (q, torch.where(after == 19, 0, after), key), after

    carry = (
        torch.zeros(lanes, 20, 2),
        torch.zeros(lanes, dtype=torch.int64),
        torch.vmap(pf.random.key)(torch.arange(lanes)),
    )
    return make_lane_scan("fit", step, carry, None, length=steps)


def seconds_of(make: Callable[[int], LaneScan], engine: str, guess: float, **options: Any) -> float:
    """CPU seconds of a step: of many steps less one, the least of several runs."""
    run = load_engine(engine).run
    steps = int(min(2000, max(3, 0.05 / guess)))
    many, one = make(steps), make(1)

    def timed(scan: LaneScan) -> float:
        run(scan, **options)
        found = []
        for _ in range(4):
            start = time.process_time()
            run(scan, **options)
            found.append(time.process_time() - start)
        return min(found)

    return max(timed(many) - timed(one), 1e-9) / (steps - 1)


def measure(make: Callable[[int], LaneScan], inductor: bool) -> dict[str, float]:
    """Seconds of a step on each engine, by its name in `cost_model.PredictedSeconds`."""
    scan = make(1)
    guess = cost_model.predict_here(scan.graph(), scan.lanes)
    found = {
        schedule: seconds_of(make, "native", getattr(guess, schedule), schedule=schedule)
        for schedule in ("lanes", "elements")
    }
    return {**found, "inductor": seconds_of(make, "inductor", guess.inductor)} if inductor else found


def fitted(features: list[list[float]], seconds: list[float]) -> list[float]:
    """Non-negative constants for which the relative errors of ``features @ constants`` are least, in nanoseconds."""
    rows = torch.tensor(features, dtype=torch.float64) * 1e-9 / torch.tensor(seconds, dtype=torch.float64)[:, None]
    taken = list(range(rows.shape[1]))
    while True:
        part = rows[:, taken]
        found = torch.linalg.lstsq(part, torch.ones(len(part), 1, dtype=torch.float64)).solution[:, 0]
        if (found >= 0).all():
            constants = torch.zeros(rows.shape[1], dtype=torch.float64)
            constants[taken] = found
            return [float(f"{value:.3g}") for value in constants]
        del taken[int(found.argmin())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inductor", action="store_true", help="measure inductor, too")
    parser.add_argument(
        "--measurements", type=Path, default=Path("measurements.json"), help="read from this file if it is there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[int], LaneScan]] = {}
    for point in POINTS:
        for name, optimizer in (("sgd", pf.sgd(1e-3)), ("adam", pf.adam(1e-3))):
            if name == "sgd" or point[0] in (16, 64):
                makers[f"{name} {point}"] = lambda steps, p=point, o=optimizer: network_scan(*p, o, steps)
    for lanes in (1, 4, 16, 64):
        makers[f"walk {lanes}"] = lambda steps, lanes=lanes: walk_scan(lanes, steps)
    if arguments.measurements.exists():
        measured = json.loads(arguments.measurements.read_text())
    else:
        measured = {
            name: measure(make, arguments.inductor and name[4:] in map(str, FEW)) for name, make in makers.items()
        }
        arguments.measurements.write_text(json.dumps(measured))
    rows: dict[str, list[Any]] = {engine: [[], []] for engine in ("lanes", "elements", "inductor")}
    register = cost_model.register_bytes()
    for name, found in measured.items():
        scan = makers[name](1)
        counts, lanes = cost_model.OperationCounts.of(scan.graph()), scan.lanes
        width = register // counts.bytes
        features = {
            "lanes": [
                -(-lanes // width) * cost_model.spilling(counts, register) * value
                for value in (counts.products, counts.others)
            ],
            "elements": [
                lanes * value for value in (counts.loops, counts.product_vectors, counts.other_vectors, counts.scalars)
            ],
            "inductor": [counts.nodes, counts.products * lanes / width, counts.others * lanes / width],
        }
        for engine, seconds in found.items():
            rows[engine][0].append(features[engine])
            rows[engine][1].append(seconds)
    constants = [fitted(*rows["lanes"]), fitted(*rows["elements"])]
    constants.append(fitted(*rows["inductor"]) if arguments.inductor else list(cost_model.CONSTANTS[6:]))
    cost_model.CONSTANTS = cost_model.Constants(*(value for part in constants for value in part))
    print(f"{'µs of a step, measured (predicted)':44s} {'lanes':>22s} {'elements':>22s} {'inductor':>22s}  choice")
    losses = []
    for name, found in measured.items():
        scan = makers[name](1)
        predicted = cost_model.predict(cost_model.OperationCounts.of(scan.graph()), scan.lanes, 1, register)
        loss = found[predicted.schedule] / min(found["lanes"], found["elements"])
        losses.append(loss)
        cells = [
            f"{1e6 * found[engine]:12.4g} {f'({1e6 * getattr(predicted, engine):.4g})':>9s}"
            if engine in found
            else " " * 22
            for engine in ("lanes", "elements", "inductor")
        ]
        print(f"{name:44s} {' '.join(cells)}  {predicted.schedule}{f' x {loss:.2f}' * (loss > 1.05)}")
    print(f"worst choice {max(losses):.2f} times the best, mean {sum(losses) / len(losses):.3f}")
    print(f"CONSTANTS = {cost_model.CONSTANTS}")


if __name__ == "__main__":
    main()
