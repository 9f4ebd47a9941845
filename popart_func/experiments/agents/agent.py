"""What an agent is: two pure functions, `init` and `step`, over one lane.

init: agent.init(key) -> state
step: agent.step(state) -> (state, Experience)

The environment is part of the step, and so is learning: `engines.scan_lanes(lambda s, _: agent.step(s), ...)` runs
hundreds of seeds at once. A state holds the environment, the network, the statistics and a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Agent", "Experience"]


class Experience(NamedTuple):
    """What happened in a step of an agent, which may be several actions.

    Attributes:
        reward: the environment's own of each action, ``[actions]``: `Transition.raw_reward`.
        ended: whether an episode ended behind it, ``[actions]``.
    """

    reward: Tensor
    ended: Tensor


class Agent(NamedTuple):
    """A pair of pure functions: ``init(key) -> state``, ``step(state) -> (state, Experience)``.

    Attributes:
        init: the first state.
        step: acts and learns.
        actions: how many actions a step takes.
    """

    init: Callable[[Tensor], Any]
    step: Callable[[Any], tuple[Any, Experience]]
    actions: int
