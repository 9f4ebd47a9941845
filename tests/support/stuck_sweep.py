"""``python stuck_sweep.py PIPE``: a sweep in two processes that hold a pipe open, each in the middle of a chunk."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import small_sweep

from popart_func import sweeps


def main(pipe: str) -> None:
    arguments = small_sweep.arguments(workers=2)
    here, init = os.getpid(), arguments["init"]

    def stuck(seed: int) -> Any:
        if os.getpid() != here:
            os.write(os.open(pipe, os.O_WRONLY), b".")
            time.sleep(600)
        return init(seed)

    sweeps.run(**{**arguments, "init": stuck})


if __name__ == "__main__":
    main(sys.argv[1])
