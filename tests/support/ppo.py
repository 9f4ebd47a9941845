"""Proximal policy optimization on CartPole as one pure step: rollout, advantages, epochs, minibatches, Pop-Art.

An update rolls four environments out for 128 steps, estimates advantages in reverse, and runs four epochs of four
minibatches over a permutation, each a step of Adam on clipped gradients. Everything is a loop inside the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

import popart_func as pf

STEPS, ENVIRONMENTS, EPOCHS, MINIBATCHES, HIDDEN = 128, 4, 4, 4, 32
DISCOUNT, TRACE, CLIP, LONGEST = 0.99, 0.95, 0.2, 500.0


def cart_pole(state: Tensor, action: Tensor) -> Tensor:
    """The next states ``[environments, 4]`` of CartPole-v1: position, velocity, angle, angular velocity."""
    _, dx, angle, spin = state.unbind(-1)
    force = torch.where(action == 1, 10.0, -10.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    push = (force + 0.05 * spin * spin * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
    pull = push - 0.05 * turn * cos / 1.1
    return state + 0.02 * torch.stack([dx, pull, spin, turn], -1)


def network(params: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(torch.tanh(x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"])
    return hidden @ params["w3"].T + params["b3"]


def log_probability(actor: dict[str, Tensor], x: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Of the actions, and of all actions."""
    both = torch.log_softmax(network(actor, x), -1)
    return torch.where(action == 1, both[:, 1], both[:, 0]), both


def advantage(later: Any, x: Any) -> Any:
    """A step backwards in time of generalized advantage estimation, on arrays of PyTorch or of JAX."""
    (following, value_after), (value, reward, done) = later, x
    error = reward + DISCOUNT * value_after * (1 - done) - value
    found = error + DISCOUNT * TRACE * (1 - done) * following
    return (found, value), found


def ppo(reward_scale: float, *, with_popart: bool, updates: int) -> tuple[Callable[[int], Any], Callable[..., Any]]:
    """``init(seed) -> carry`` and ``update(carry, number) -> (carry, (mean return, loss))``."""
    optimizer = pf.adam(1.0, eps=1e-5)
    statistics = pf.popart(1, step_size=0.02, scale_lb=1e-6, scale_ub=1e8)

    def init(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, gain: float) -> Tensor:
            left, _, right = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
            return gain * left @ right

        def layers(outputs: int, gain: float) -> dict[str, Tensor]:
            weights = matrix(HIDDEN, 4, 2**0.5), matrix(HIDDEN, HIDDEN, 2**0.5), matrix(outputs, HIDDEN, gain)
            return {f"w{n}": weight for n, weight in enumerate(weights, 1)} | {
                f"b{n}": torch.zeros(len(weight)) for n, weight in enumerate(weights, 1)
            }

        params = {"actor": layers(2, 0.01), "critic": layers(1, 1.0)}
        states = 0.1 * (torch.rand(ENVIRONMENTS, 4, generator=generator) - 0.5)
        return {
            "params": params,
            "optimizer": optimizer.init(params),
            "statistics": pf.init_state(1),
            "environment": (states, torch.zeros(ENVIRONMENTS), torch.zeros(())),
            "key": pf.random.key(seed),
        }

    def update(carry: Any, number: Tensor) -> Any:
        key, rollout_key, epoch_key = pf.random.split(carry["key"], 3)
        params, state = carry["params"], carry["statistics"]

        def value(x: Tensor) -> Tensor:
            values = network(params["critic"], x)
            return (pf.unnormalize(state, values) if with_popart else values).squeeze(-1)

        def act(environment: Any, key: Any) -> Any:
            x, age, mean_return = environment
            action_key, reset_key = pf.random.split(key, 2)
            _, both = log_probability(params["actor"], x, torch.zeros(ENVIRONMENTS))
            action = (pf.random.uniform(action_key, (ENVIRONMENTS,)) < both[:, 1].exp()).long()
            after, age = cart_pole(x, action), age + 1
            fell = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.2095)
            ended = ~fell & (age >= LONGEST)
            done = fell | ended
            reward = reward_scale + DISCOUNT * torch.where(ended, value(after), 0.0)  # what would have followed
            finished = (age * done).sum() / done.sum().clamp(min=1)
            mean_return = torch.where(done.any(), 0.9 * mean_return + 0.1 * finished, mean_return)
            fresh = 0.1 * (pf.random.uniform(reset_key, (ENVIRONMENTS, 4)) - 0.5)
            environment = torch.where(done[:, None], fresh, after), torch.where(done, 0.0, age), mean_return
            chosen, _ = log_probability(params["actor"], x, action)
            return environment, (x, action, chosen, value(x), reward, done.float())

        environment, (xs, actions, chosen, values, rewards, done) = pf.scan(
            act, carry["environment"], pf.random.split(rollout_key, STEPS)
        )

        start = torch.zeros(ENVIRONMENTS), value(environment[0])
        _, advantages = pf.scan(advantage, start, (values, rewards, done), reverse=True)
        targets = (advantages + values).flatten()
        if with_popart:
            critic = params["critic"]
            head = {"weight": critic["w3"], "bias": critic["b3"]}
            head, state = statistics.update(head, state, targets[:, None])
            params = {**params, "critic": {**critic, "w3": head["weight"], "b3": head["bias"]}}
            targets = pf.normalize(state, targets[:, None]).squeeze(-1)
        batch = xs.flatten(0, 1), actions.flatten(), chosen.flatten(), targets, advantages.flatten()
        rate = 2.5e-3 * (1 - number / updates)

        def minibatch(learner: Any, places: Tensor) -> Any:
            params, momentum = learner
            x, action, before, target, advantage = (part[places] for part in batch)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8 * reward_scale)

            def loss(params: Any) -> Tensor:
                now, both = log_probability(params["actor"], x, action)
                ratio = torch.exp(now - before)
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
                entropy = -(both.exp() * both).sum(-1).mean()
                error = network(params["critic"], x).squeeze(-1) - target
                return 0.25 * error.square().mean() - gain - 0.01 * entropy

            gradient, cost = grad_and_value(loss)(params)
            norm = sum(leaf.square().sum() for part in gradient.values() for leaf in part.values()).sqrt()
            factor = torch.clamp(0.5 / (norm + 1e-6), max=1.0)
            gradient = {name: {k: leaf * factor for k, leaf in part.items()} for name, part in gradient.items()}
            change, momentum = optimizer.update(gradient, momentum)
            params = {
                name: {k: leaf + rate * change[name][k] for k, leaf in part.items()} for name, part in params.items()
            }
            return (params, momentum), cost

        def epoch(learner: Any, key: Any) -> Any:
            order = pf.random.permutation(key, STEPS * ENVIRONMENTS).reshape(MINIBATCHES, -1)
            learner, costs = pf.scan(minibatch, learner, order)
            return learner, costs.mean()

        (params, momentum), costs = pf.scan(epoch, (params, carry["optimizer"]), pf.random.split(epoch_key, EPOCHS))
        after = {"params": params, "optimizer": momentum, "statistics": state, "environment": environment, "key": key}
        return after, (environment[2], costs.mean())

    return init, update
