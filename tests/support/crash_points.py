"""Runs a small sweep with a fault at each system call that touches its store, and then once more without.

``python tests/support/crash_points.py [--every N] [--scenario new]``; needs gcc, on Linux. A fault kills the process
before the call or in the middle of a write, or makes the call fail with ENOSPC or EIO. After each, the next start must
give the result of an uninterrupted run, bit for bit, from a store begun at once and from one that grows. Prints the
counts, and ends with status 1 if there was a difference. Each run is a fork of this process, which has imported all.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES = {"count": 0, "killed": 1, "killed in a write": 2, "ENOSPC": 3, "EIO": 4}
SOURCE = Path(__file__).with_name("faults.c")


def in_fork(body: Callable[[], int]) -> int:
    """The exit status of a fork that runs ``body``; minus the signal where one ended it."""
    child = os.fork()
    if child == 0:
        try:
            status = body()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 99
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(every: int, scenarios: list[str], folder: Path) -> int:
    import small_sweep
    import torch

    from popart_func import sweeps
    from popart_func.sweeps.records import last

    torch.set_num_threads(1)
    os.environ["PATH"] = ""  # without git, which a sweep asks for its revision, a run takes half of its time
    faults = ctypes.CDLL(None)
    faults.faults_count.restype = ctypes.c_long
    small = {"learning_rate": (0.1,), "step_size": (0.1,), "record": {"final": last(5)}}

    def arguments(seeds: range, **changes: Any) -> dict[str, Any]:
        found = small_sweep.arguments(seeds, **small, chunk_size=2, **changes)
        return {**found, "make_learner": found["make_learner"]["popart"]}

    expected = sweeps.run(**arguments(range(4)))
    store = folder / "store"
    begun = folder / "begun"

    def run(seeds: range, path: Path) -> Any:
        return sweeps.run(**arguments(seeds, store=path))

    def faulted(number: int, mode: int) -> int:
        """0: all went well; 1: it gave a wrong result; 2: it said that the store can't be used."""
        faults.faults_arm(os.fsencode(store), ctypes.c_long(number), mode)
        try:
            right = run(range(4), store).equals(expected)
        except sweeps.StoreError:
            return 2
        if mode == 0:
            (folder / "calls").write_text(str(faults.faults_count()))
        return int(not right)

    def next_start() -> int:
        return int(not (run(range(4), store).equals(expected) and sweeps.load(store).equals(expected)))

    assert in_fork(lambda: int(run(range(3), begun) is None)) == 0
    found: Counter[str] = Counter()
    wrong = 0
    for scenario in scenarios:

        def prepare(scenario: str = scenario) -> None:
            shutil.rmtree(store, ignore_errors=True)
            if scenario == "grown":
                shutil.copytree(begun, store)

        prepare()
        assert in_fork(lambda: faulted(0, 0)) == 0
        calls = int((folder / "calls").read_text())
        print(f"{scenario}: {calls} system calls", flush=True)
        for name, mode in list(MODES.items())[1:]:
            for number in range(1 + (every - 1) // 2, calls + 1, every):
                prepare()
                status = in_fork(lambda number=number, mode=mode: faulted(number, mode))
                allowed = (-signal.SIGKILL,) if mode <= 2 else (0, 2)
                again = in_fork(next_start)
                # Threads of a run may make a few calls less than those of the run that was counted.
                missed = mode <= 2 and status == 0 and number > calls - 5
                if again or not (status in allowed or missed):
                    wrong += 1
                    print(f"{scenario}, {name} at call {number}: {status}, then {again}", flush=True)
                found[name] += 1
    print(f"{sum(found.values())} crash points, {wrong} differences: {dict(found)}")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every N-th call")
    parser.add_argument("--scenario", choices=["new", "grown"], help="by default both")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
            library = str(Path(scratch) / "faults.so")
            subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, str(SOURCE), "-ldl"], check=True)
            environment = {**os.environ, "LD_PRELOAD": library}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
        sys.exit(main(given.every, [given.scenario] if given.scenario else ["new", "grown"], Path(scratch)))
