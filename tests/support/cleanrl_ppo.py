"""Proximal policy optimization on gymnasium's CartPole, written as cleanrl's ``ppo.py`` is, with and without Pop-Art.

The lines that Pop-Art changes end in ``# Pop-Art``; beside each stands what cleanrl has.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

from popart_func.nn import PopArtHead

ENVS, STEPS, EPOCHS, MINIBATCHES = 8, 64, 4, 4
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5


class Agent(nn.Module):
    def __init__(self, popart: bool) -> None:
        super().__init__()
        hidden = lambda: [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]  # noqa: E731
        self.actor = nn.Sequential(*hidden(), nn.Linear(64, 2))
        self.critic = nn.Sequential(*hidden(), PopArtHead(64, 1, 0.1) if popart else nn.Linear(64, 1))  # Pop-Art
        self.head = self.critic[-1]


def train(reward_scale: float, *, popart: bool, updates: int, seed: int = 1) -> list[float]:
    """The mean length of the episodes that end during each update."""
    torch.manual_seed(seed)
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * ENVS)
    agent = Agent(popart)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-3, eps=1e-5)
    raw = agent.head.unnormalize if popart else lambda value: value  # Pop-Art
    scaled = agent.head.normalize if popart else lambda value: value  # Pop-Art
    observation, done = torch.tensor(envs.reset(seed=seed)[0]), torch.zeros(ENVS)
    lengths, ended, means = np.zeros(ENVS), [20.0], []
    for _ in range(updates):
        rollout = []
        for _ in range(STEPS):
            with torch.no_grad():
                policy = Categorical(logits=agent.actor(observation))
                action, value = policy.sample(), raw(agent.critic(observation)).flatten()
            after, reward, terminated, truncated, _ = envs.step(action.numpy())
            rewards = reward_scale * torch.tensor(reward, dtype=torch.float32)
            rollout.append((observation, action, policy.log_prob(action), value, rewards, done))
            observation, done = torch.tensor(after), torch.tensor(terminated | truncated, dtype=torch.float32)
            lengths += 1
            ended += lengths[done.bool().numpy()].tolist()
            lengths[done.bool().numpy()] = 0
        means.append(float(np.mean(ended[-20:])))
        xs, actions, log_probs, values, rewards, dones = map(torch.stack, zip(*rollout, strict=True))

        advantages, running = torch.zeros_like(rewards), torch.zeros(ENVS)
        with torch.no_grad():
            following, alive = raw(agent.critic(observation)).flatten(), 1 - done
        for time in reversed(range(STEPS)):
            delta = rewards[time] + GAMMA * alive * following - values[time]
            running = delta + GAMMA * LAMBDA * alive * running
            advantages[time], following, alive = running, values[time], 1 - dones[time]
        returns = advantages + values
        batch = [part.flatten(0, 1) for part in (xs, actions, log_probs, advantages, returns)]
        if popart:
            agent.head.update(batch[-1][:, None], optimizer=optimizer)  # Pop-Art

        for _ in range(EPOCHS):
            for rows in torch.randperm(ENVS * STEPS).chunk(MINIBATCHES):
                x, action, old, advantage, target = (part[rows] for part in batch)
                policy = Categorical(logits=agent.actor(x))
                ratio = (policy.log_prob(action) - old).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
                error = agent.critic(x).flatten() - scaled(target)  # Pop-Art
                loss = VALUE * 0.5 * error.square().mean() - surrogate.mean() - ENTROPY * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    envs.close()
    return means
