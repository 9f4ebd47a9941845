"""How long a new process takes to its first result, beyond importing torch: ``python tests/benchmarks/warm_start.py``.

Pop-Art on the paper's network, 50 lanes, streams of 5004 samples, the native engine. A process imports torch, and then
the clock starts: importing popart_func, building network, parameters and step, and the first call, less what a second
call takes. *Warm*: the kernel is in the cache, as after any earlier run of the same step. *Cold*: the cache is empty.
Prints milliseconds, medians over processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """
import json
import time

import torch

times = [time.perf_counter()]
import popart_func as pf

times.append(time.perf_counter())
shifts = torch.arange(15, -1, -1, dtype=torch.int32)
network = pf.stateless(pf.UnifiedModel(16, 10, 1))
learner = pf.popart_learner(network, pf.sgd(10**-2.5), pf.popart(1, 10**-0.5))


def step(state, number):
    bits = (number[..., None] >> shifts) & 1
    state, info = learner.update(state, (bits.float(), number.float()))
    return state, info.error


start = torch.vmap(learner.init)(pf.init_lanes(lambda: pf.UnifiedModel(16, 10, 1), seeds=range(50)))
numbers = torch.randint(0, 1024, (5004, 50), dtype=torch.int32)
times.append(time.perf_counter())
for _ in range(4):
    pf.scan_lanes(step, start, numbers, shared=False, engine="native")
    times.append(time.perf_counter())
imported, built, first, *steady = (b - a for a, b in zip(times, times[1:]))
steady = min(steady)
print(json.dumps({"import popart_func": imported, "build the step": built, "first call": first - steady,
                  "steady call": steady, "beyond importing torch": imported + built + first - steady}))
"""


def measure(cache: str) -> dict[str, float]:
    """One process: name to milliseconds. Python's bytecode is cached, as after any earlier import."""
    environment = {**os.environ, "POPART_FUNC_CACHE": cache, "PYTHONDONTWRITEBYTECODE": ""}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return {name: 1e3 * seconds for name, seconds in json.loads(result.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=10)
    processes = parser.parse_args().processes
    cold = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(measure(cache))
    with tempfile.TemporaryDirectory() as cache:
        measure(cache)
        warm = [measure(cache) for _ in range(processes)]
    for name in warm[0]:
        values = [run[name] for run in warm]
        print(
            f"{name:24} warm {statistics.median(values):7.1f} ms ({min(values):.1f} to {max(values):.1f})   "
            f"cold {statistics.median(run[name] for run in cold):7.1f} ms"
        )


if __name__ == "__main__":
    main()
