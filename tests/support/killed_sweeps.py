"""Runs a sweep into a store again and again, killed at random moments; prints how many chunks were done after each.

``python killed_sweeps.py STORE KILLS SEED``. Each run is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import small_sweep
import torch

from popart_func import sweeps


def begin(store: Path, **changes: Any) -> int:
    """Forks a process that runs the sweep into a store."""
    child = os.fork()
    if child == 0:
        sweeps.run(**small_sweep.arguments(store=store, **changes))
        os._exit(0)
    return child


def done_chunks(store: Path) -> set[Path]:
    """The files that are written last of each chunk."""
    return {path for path in store.glob("lanes.zarr/*/diverged_at/c/*") if path.name.isdigit()}


def main(store: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    one_lane = {"lanes": sweeps.lanes([0], learning_rate=[0.1], step_size=[0.1])}
    sweeps.run(**small_sweep.arguments(**one_lane))  # imports what is imported at first use
    started = time.perf_counter()
    os.waitpid(begin(store.with_name("first"), **one_lane), 0)
    first_chunks = time.perf_counter() - started
    moments, done, killed = random.Random(seed), set[Path](), []
    while len(killed) < kills:
        child = begin(store, seeds=range(20))
        time.sleep(moments.uniform(0, 2 * first_chunks))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert done <= done_chunks(store), "what was done stays done"
        done = done_chunks(store)
        if os.WIFSIGNALED(status):
            killed.append(len(done))
        else:  # it was faster, and begins anew
            for last in done:
                last.unlink()
            done = set()
    print(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
