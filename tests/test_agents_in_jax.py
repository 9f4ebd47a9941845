"""Agents through `to_jax_function`: the same random numbers, and the same returns of the first episodes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

import popart_func as pf
from popart_func import random
from popart_func.experiments.environments.bsuite import Catch
from popart_func.experiments.environments.wrappers import scale_rewards
from popart_func.experiments.reward_scales.roster import ALGORITHMS, make_agent
from popart_func.interop.jax import to_jax, to_jax_function

ACTIONS, LANES = 128, 4

NAMES = [pytest.param(f"{one}-popart", marks=() if one == "q" else pytest.mark.slow) for one in ALGORITHMS]


def with_first_values(state):
    """A first state whose networks' heads are not 0.

    Values that are all 0 are equal to rounding until they have learned, and rounding would choose the greedy action.
    """

    generator = torch.Generator().manual_seed(0)

    def changed(params):
        weight = params["head.weight"]
        return {**params, "head.weight": weight + 0.3 * torch.randn(weight.shape, generator=generator)}

    if hasattr(state, "params"):
        return state._replace(params=changed(state.params))
    part = "critic" if hasattr(state, "critic") else "learner"
    learner = getattr(state, part)
    return state._replace(**{part: learner._replace(params=changed(learner.params))})


@pytest.mark.parametrize("name", NAMES)
def test_the_same_agent_in_jax(name):
    """Fourteen episodes at rewards times 30, in four seeds: keys, ends and returns are equal."""
    agent = make_agent(name, scale_rewards(Catch(), 30.0), *ALGORITHMS[name.split("-")[0]].setting)
    start = with_first_values(torch.vmap(agent.init)(torch.stack([random.key(seed) for seed in range(LANES)])))
    steps = ACTIONS // agent.actions
    last, ours = pf.scan_lanes(lambda state, _: agent.step(state), start, length=steps, engine="native")

    one = to_jax_function(agent.step)
    run = jax.jit(jax.vmap(lambda state: jax.lax.scan(lambda state, _: one(state), state, None, length=steps)))
    state, theirs = run(to_jax(start, strict_dtype=False))  # the replay's actions are int64
    np.testing.assert_array_equal(state.key, last.key)
    np.testing.assert_array_equal(theirs.ended, ours.ended.transpose(0, 1))
    np.testing.assert_array_equal(theirs.reward, ours.reward.transpose(0, 1))
    assert ours.ended.sum() == LANES * (ACTIONS // 9)
    assert ours.reward.sum() > -LANES * (ACTIONS // 9), "some balls were caught"
