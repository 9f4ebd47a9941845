"""Ten lines of a user's program, which `mypy --strict` checks against the installed package."""

import torch
from torch import Tensor

import popart_func as pf

apply = pf.stateless(torch.nn.Linear(3, 1))
learner = pf.popart_learner(apply, pf.adam(1e-3), pf.popart(1, 0.01), head="")
state = learner.init(pf.init_params(lambda: torch.nn.Linear(3, 1), seed=0))


def step(state: pf.LearnerState, x: Tensor) -> tuple[pf.LearnerState, Tensor]:
    """One sample; the target is the input's first entry."""
    state, info = learner.update(state, (x, x[:1]))
    return state, info.error


state, errors = pf.scan(step, state, torch.ones(20, 3))
scale: Tensor = state.statistics.scale
