"""Sweeps of a learner of one's own, all of whose lanes learn from one stream."""

from __future__ import annotations

import torch

from popart_func import sweeps
from popart_func.sweeps.records import every

STREAM = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)


def weights_of(seed):
    return {"w": torch.randn(3, generator=torch.Generator().manual_seed(seed))}


def step_of(rate):
    """The least mean squares step, as the `update` of a learner."""

    def update(state, xy):
        error = (state["w"] * xy[0]).sum() - xy[1]
        return {"w": state["w"] - rate * error * xy[0]}, error.abs()

    return update


def shared_sweep(make_learner, **changes):
    """A sweep of a learner whose info is its error, all of whose lanes learn from `STREAM`."""
    lanes = sweeps.lanes(changes.pop("seeds", range(2)), rate=[0.1, 0.01])
    arguments = {"init": weights_of, "engine": "eager", "record": {"error": every(of=lambda state, info: info)}}
    return sweeps.run(make_learner, STREAM, lanes=lanes, **(arguments | changes))
