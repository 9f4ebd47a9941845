"""Runs a sweep into a store again and again, each time killed at a random moment; prints how much was done after each.

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

import small_sweep
import torch

from popart_func.experiments import sweep


def main(store: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    moments, done = random.Random(seed), []
    while len(done) < kills:
        child = os.fork()
        if child == 0:
            sweep.run(**small_sweep.arguments(seeds=range(30), store=store))
            os._exit(0)
        time.sleep(moments.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"a run ended by itself, after {len(done)} were killed: give it more to do")
        done.append(len(list((store / "done").glob("*-*.json"))))
    print(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
