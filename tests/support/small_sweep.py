"""A sweep that takes a moment: a linear network, 10 samples, no compiler. It can be sent to other processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

import popart_func as pf
from popart_func import sweeps
from popart_func.sweeps.records import every, last

STEPS = 10
TOO_LARGE = 1e6


def arguments(
    seeds: Any = range(3), learning_rate: Any = (0.01, 0.3, TOO_LARGE), step_size: Any = (0.1, 0.5), **changes: Any
) -> dict[str, Any]:
    """Arguments of `sweeps.run`: SGD, which has no step size, and Pop-Art; in chunks of 4 lanes: 9 and 18 of them."""

    def apply(params: Any, x: Any) -> Any:
        return x @ params["0.weight"].T + params["0.bias"]

    def sgd(learning_rate: Any) -> pf.Learner:
        return pf.sgd_learner(apply, pf.sgd(learning_rate))

    def popart(learning_rate: Any, step_size: Any) -> pf.Learner:
        return pf.popart_learner(apply, pf.sgd(learning_rate), pf.popart(1, step_size), head="0")

    def data(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(STEPS, 2, generator=generator)
        return x, 100 * x.sum(1, keepdim=True) + 7

    def init(seed: int) -> Any:
        return pf.init_params(lambda: torch.nn.Sequential(torch.nn.Linear(2, 1)), seed)

    found = {
        "make_learner": {"sgd": sgd, "popart": popart},
        "data": data,
        "init": init,
        "lanes": sweeps.lanes(seeds, learning_rate=learning_rate, step_size=step_size),
        "record": {"final": last(5), "curve": every(3)},
        "chunk_size": 4,
        "engine": "eager",
        "quiet": True,
    }
    return {**found, **changes}


def killed_once(init: Any, marker: Path) -> Any:
    """An ``init`` whose process is killed when seed 2 is first asked for in another process than this one."""
    here = os.getpid()

    def deadly(seed: int) -> Any:
        if seed == 2 and os.getpid() != here and not marker.exists():
            if marker.parent.exists():
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return init(seed)

    return deadly
