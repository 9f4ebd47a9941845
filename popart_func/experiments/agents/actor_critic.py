"""Actor-critics of one lane: `ppo`, and `v_trace`, which corrects for the policy's changes since it acted.

A step of the agent rolls its environment out, estimates targets and advantages in the rewards' units, and learns from
them in several epochs, all of it loops inside the step. The critic is a learner of `critics`, and plain values, ART,
Pop-Art and normalized SGD differ in nothing else. Advantages are normalized: the scale of the rewards reaches the
policy through the critic alone.

Source: Schulman et al., *Proximal policy optimization algorithms* (2017); Espeholt et al., *IMPALA* (2018); Hessel et
al., *Multi-task deep reinforcement learning with PopArt* (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from popart_func import random
from popart_func.engines import scan
from popart_func.experiments.agents.agent import Agent, Experience
from popart_func.experiments.agents.critics import Critic
from popart_func.experiments.agents.networks import apply_mlp, init_mlp
from popart_func.experiments.agents.returns import Estimates, generalized_advantages
from popart_func.experiments.agents.returns import v_trace as v_trace_estimates
from popart_func.experiments.environments import Environment, step_or_reset
from popart_func.learners import LearnerState
from popart_func.optim import GradientTransformation, apply_updates

__all__ = ["ActorCriticState", "ppo", "v_trace"]

Scalar = float | Tensor


class ActorCriticState(NamedTuple):
    """What the next step of an actor-critic needs."""

    actor: dict[str, Tensor]
    optimizer: Any
    critic: LearnerState
    environment: Any
    observation: Tensor
    key: Tensor


class Rollout(NamedTuple):
    """What the agent saw and did, ``[time, ...]``, and how likely its actions were."""

    observation: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    following: Tensor
    discount: Tensor
    goes_on: Tensor


Loss = Callable[[dict[str, Tensor], Rollout, Tensor], Tensor]
"""Of the actor's parameters, a rollout or a part of it, and its normalized advantages."""


def ppo(
    environment: Environment,
    critic: Critic,
    optimizer: GradientTransformation,
    hidden: tuple[int, ...] = (50, 50),
    *,
    discount: Scalar = 0.99,
    trace: Scalar = 0.95,
    clip: Scalar = 0.2,
    entropy: Scalar = 0.01,
    length: int = 128,
    epochs: int = 4,
    minibatches: int = 4,
) -> Agent:
    """Proximal policy optimization with the clipped objective.

    Args:
        environment: a pure environment.
        critic: what learns the values, see `critics.make_critic`.
        optimizer: of the policy's network.
        hidden: the widths of the hidden layers of either network.
        discount: γ.
        trace: λ of generalized advantages.
        clip: how far a probability may move from that of the rollout, relative to it.
        entropy: the weight of the policy's entropy.
        length: the actions of a rollout; a step of the agent is one.
        epochs: how often a rollout is learned from.
        minibatches: into how many parts an epoch cuts it, after a permutation.

    Raises:
        ValueError: ``length`` is no multiple of ``minibatches``.
    """
    if length % minibatches:
        raise ValueError(f"ppo: `length` must be a multiple of `minibatches`, got {length} and {minibatches}.")

    def loss(actor: dict[str, Tensor], rollout: Rollout, advantage: Tensor) -> Tensor:
        log_prob, bonus = _log_prob_and_entropy(actor, rollout)
        ratio = (log_prob - rollout.log_prob).exp()
        one = torch.ones_like(ratio)
        near = torch.maximum(torch.minimum(ratio, one + clip), one - clip)
        gain = torch.minimum(ratio * advantage, near * advantage)
        return -(gain + entropy * bonus).mean()

    def learn(state: ActorCriticState, rollout: Rollout, key: Tensor) -> ActorCriticState:
        value, following = _values(critic, state.critic, rollout)
        estimates = generalized_advantages(rollout.reward, rollout.discount, rollout.goes_on, value, following, trace)

        def minibatch(state: ActorCriticState, places: Tensor) -> tuple[ActorCriticState, tuple[()]]:
            part = Rollout(*(leaf[places] for leaf in rollout))
            targets, advantages = (leaf[places] for leaf in estimates)
            return _improve(state, part, Estimates(targets, advantages), loss, critic, optimizer), ()

        def epoch(state: ActorCriticState, key: Tensor) -> tuple[ActorCriticState, tuple[()]]:
            order = random.permutation(key, length).reshape(minibatches, -1)
            return scan(minibatch, state, order)[0], ()

        learned: ActorCriticState = scan(epoch, state, random.split(key, epochs))[0]
        return learned

    return _agent(environment, critic, optimizer, hidden, discount, length, learn)


def v_trace(
    environment: Environment,
    critic: Critic,
    optimizer: GradientTransformation,
    hidden: tuple[int, ...] = (50, 50),
    *,
    discount: Scalar = 0.99,
    trace: Scalar = 0.95,
    entropy: Scalar = 0.1,
    length: int = 16,
    epochs: int = 2,
) -> Agent:
    """Actor-critic with V-trace: from the second epoch on, the rollout is that of an older policy.

    Args:
        environment: a pure environment.
        critic: what learns the values, see `critics.make_critic`.
        optimizer: of the policy's network.
        hidden: the widths of the hidden layers of either network.
        discount: γ.
        trace: λ of the targets.
        entropy: the weight of the policy's entropy. Advantages have a deviation of 1 also where rewards are rare: with
            much less than 0.1 the policy settles on one action before it has learned which.
        length: the actions of a rollout; a step of the agent is one.
        epochs: how often a rollout is learned from, whole.
    """

    def loss(actor: dict[str, Tensor], rollout: Rollout, advantage: Tensor) -> Tensor:
        log_prob, bonus = _log_prob_and_entropy(actor, rollout)
        return -(log_prob * advantage + entropy * bonus).mean()

    def learn(state: ActorCriticState, rollout: Rollout, key: Tensor) -> ActorCriticState:
        def epoch(state: ActorCriticState, _: Any) -> tuple[ActorCriticState, tuple[()]]:
            value, following = _values(critic, state.critic, rollout)
            ratio = (_log_prob_and_entropy(state.actor, rollout)[0] - rollout.log_prob).exp()
            estimates = v_trace_estimates(
                rollout.reward, rollout.discount, rollout.goes_on, value, following, ratio, trace
            )
            return _improve(state, rollout, estimates, loss, critic, optimizer), ()

        learned: ActorCriticState = scan(epoch, state, length=epochs)[0]
        return learned

    return _agent(environment, critic, optimizer, hidden, discount, length, learn)


def _agent(
    environment: Environment,
    critic: Critic,
    optimizer: GradientTransformation,
    hidden: tuple[int, ...],
    discount: Scalar,
    length: int,
    learn: Callable[[ActorCriticState, Rollout, Tensor], ActorCriticState],
) -> Agent:
    """An agent that rolls out ``length`` actions in a step, and learns from them."""
    inputs = [math.prod(environment.observation_shape), *hidden]

    def init(key: Tensor) -> ActorCriticState:
        key, for_actor, for_critic, for_reset = random.split(key, 4)
        actor = init_mlp(for_actor, [*inputs, environment.num_actions])
        learner = critic.learner.init(init_mlp(for_critic, [*inputs, 1]))
        return ActorCriticState(actor, optimizer.init(actor), learner, *environment.reset(for_reset), key)

    def step(state: ActorCriticState) -> tuple[ActorCriticState, Experience]:
        key, for_rollout, for_learning = random.split(state.key, 3)

        def act(place: tuple[Any, Tensor], key: Tensor) -> tuple[tuple[Any, Tensor], tuple[Rollout, Experience]]:
            now, seen = place
            for_action, for_step = random.split(key)
            logits = apply_mlp(state.actor, seen).log_softmax(-1)
            action = random.categorical(for_action, logits)
            now, following, transition = step_or_reset(environment, now, action, for_step)
            ended = transition.terminated | transition.truncated
            rollout = Rollout(
                seen,
                action,
                logits.gather(-1, action[None]).squeeze(-1),
                transition.reward,
                transition.observation,
                discount * (~transition.terminated).to(logits.dtype),
                (~ended).to(logits.dtype),
            )
            return (now, following), (rollout, Experience(transition.raw_reward, ended))

        place = state.environment, state.observation
        (now, seen), (rollout, experience) = scan(act, place, random.split(for_rollout, length))
        state = learn(state, rollout, for_learning)
        return state._replace(environment=now, observation=seen, key=key), experience

    return Agent(init, step, actions=length)


def _log_prob_and_entropy(actor: dict[str, Tensor], rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Of the actions and of the policy, ``[time]``."""
    logits = apply_mlp(actor, rollout.observation).log_softmax(-1)
    return logits.gather(-1, rollout.action[:, None]).squeeze(-1), -(logits.exp() * logits).sum(-1)


def _values(critic: Critic, state: LearnerState, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The values of the states and of those behind them, in the rewards' units, ``[time]``."""
    value, following = (critic.values(state, state.params, x) for x in (rollout.observation, rollout.following))
    return value.squeeze(-1), following.squeeze(-1)


def _improve(
    state: ActorCriticState,
    rollout: Rollout,
    estimates: Estimates,
    loss: Loss,
    critic: Critic,
    optimizer: GradientTransformation,
) -> ActorCriticState:
    """One gradient step of the critic and one of the actor."""
    advantages = estimates.advantages - estimates.advantages.mean()
    # No constant is added below: it would be nothing at one scale of the rewards and all at another one.
    smallest = torch.finfo(advantages.dtype).tiny
    normalized = advantages / advantages.square().mean().sqrt().clamp(min=smallest)
    learner, _ = critic.learner.update(state.critic, (rollout.observation, estimates.targets[:, None]))
    gradients = grad(loss)(state.actor, rollout, normalized)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.actor)
    return state._replace(actor=dict(apply_updates(state.actor, updates)), optimizer=optimizer_state, critic=learner)
