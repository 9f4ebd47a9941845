"""Critics, which learn the agents' values: plain, art, popart or normalized.

plain:      regression on the targets as they are
art:        normalized targets, without POP
popart:     normalized targets, with POP (Algorithm 1)
normalized: targets as they are, with the gradient below the head scaled (Algorithm 2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from popart_func.experiments.names import CRITICS
from popart_func.learners import (
    Apply,
    Learner,
    LearnerState,
    art_learner,
    normalized_sgd_learner,
    popart_learner,
    sgd_learner,
)
from popart_func.models import Params
from popart_func.optim import GradientTransformation
from popart_func.pop_art import PopArt, unnormalize

__all__ = ["Critic", "make_critic"]


class Critic(NamedTuple):
    """A learner, and the values of a network in the rewards' units.

    Attributes:
        learner: `init` and `update` of the value network.
        values: ``values(state, params, x)`` with the statistics of ``state``; ``params`` may be a target network's.
        pops: whether POP moves the network, so that a target network has to be popped with it.
    """

    learner: Learner
    values: Callable[[LearnerState, Params, Tensor], Tensor]
    pops: bool


def make_critic(
    name: str, apply: Apply, optimizer: GradientTransformation, popart: PopArt, *, head: str = "head"
) -> Critic:
    """The critic of a name.

    Args:
        name: one of `names.CRITICS`.
        apply: ``apply(params, x)`` -> outputs.
        optimizer: such as `optim.adam(1e-3)`.
        popart: the statistics, which plain critics leave alone.
        head: the name of the last linear layer.

    Raises:
        ValueError: there is no such critic.
    """

    def unnormalized(state: LearnerState, params: Params, x: Tensor) -> Tensor:
        outputs = apply(params, x)
        tasks = popart.tasks_of(state.statistics, outputs)
        return unnormalize(state.statistics, outputs, None if tasks is None else tasks.expand(outputs.shape))

    def raw(state: LearnerState, params: Params, x: Tensor) -> Tensor:
        return apply(params, x)

    if name == "plain":
        return Critic(sgd_learner(apply, optimizer), raw, pops=False)
    if name == "art":
        return Critic(art_learner(apply, optimizer, popart), unnormalized, pops=False)
    if name == "popart":
        return Critic(popart_learner(apply, optimizer, popart, head=head), unnormalized, pops=True)
    if name == "normalized":
        return Critic(normalized_sgd_learner(apply, optimizer, popart, head=head), raw, pops=False)
    raise ValueError(f"make_critic: `name` must be one of {', '.join(CRITICS)}, got {name!r}.")
