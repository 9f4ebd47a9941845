"""A training loop of one's own with Pop-Art: every network below learns targets of two sizes.

`train` is the loop: an optimizer, statistics, one `update_network`, a gradient, an update.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import popart_func as pf
from popart_func import optim

pytestmark = pytest.mark.usefixtures("unchecked")
PER_ACTION = torch.tensor([0, 0, 0, 1, 1, 1])


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


class Convolution(nn.Module):
    """Values of a picture, by a convolution of one pixel as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 8, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.reshape(-1, 1, 2, 2)))).flatten(1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(1, 8), nn.Parameter(torch.randn(4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x[..., None]) + self.place).mean(-2))


class ActorCritic(nn.Module):
    """A policy and a critic on one body; Pop-Art moves the critic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(torch.tanh(self.body(x)))


class Ensemble(nn.Module):
    """Three critics at once, as weights with a leading axis; the output is their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 2, 16) / 4), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return (torch.einsum("moi,...i->...mo", self.weight, hidden) + self.bias).mean(-2)


class Quantiles(nn.Sequential):
    """Three outputs for each of two tasks."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))


class Toppo(nn.Sequential):
    """TOPPO's critic: layer norms, one head with an output for each task."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh())
        self.add_module("critic", nn.Linear(16, 2))


NETWORKS = {
    "MLP": (Mlp, "2", None),
    "convolution": (Convolution, "head", None),
    "transformer": (Transformer, "head", None),
    "shared actor-critic": (ActorCritic, "critic", None),
    "ensemble of critics": (Ensemble, pf.Head(""), None),
    "quantile critic": (Quantiles, "2", PER_ACTION),
    "TOPPO's critic": (Toppo, "critic", None),
}


def train(make, head, groups, x, y, steps, optimizer):
    apply, popart = pf.stateless(make()), pf.popart(2, 0.2, groups=groups, bias_correction=True)
    params = pf.init_params(make, 0)
    opt_state, state = optimizer.init(params), popart.init(params)

    def error(params, goal):
        return (apply(params, x) - goal).square().mean()

    for _ in range(steps):
        params, opt_state, state = popart.update_network(params, opt_state, state, y, head=head)
        grads = torch.func.grad(error)(params, pf.normalize(state, y, popart.tasks_of(state, y)))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = pf.apply_updates(params, updates)
    return pf.unnormalize(state, apply(params, x), groups), params, state


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_both_tasks_at_once(name):
    make, head, groups = NETWORKS[name]
    x = torch.randn(64, 4)
    y = torch.stack([1e4 + 3e3 * x[:, 0], 3 * x[:, 1] - 5], -1)
    y = y if groups is None else y[:, groups]
    optimizer = optim.from_torch(torch.optim.NAdam, lr=3e-2)
    learned, params, _ = train(make, head, groups, x, y, 50, optimizer)
    # The mean of the targets alone is off by one deviation.
    assert ((learned - y).square().mean(0).sqrt() / y.std(0)).max() < 0.75
    still, _, _ = train(make, head, groups, x, y, 3, pf.sgd(0.0))
    first = pf.stateless(make())(pf.init_params(make, 0), x)
    torch.testing.assert_close(still, first, rtol=1e-3, atol=5e-3)
    if name == "shared actor-critic":
        assert torch.equal(params["actor.weight"], pf.init_params(make, 0)["actor.weight"])


def test_q_learning_of_x_y_action_with_one_statistic_and_a_target_network():
    """Targets from a Polyak-averaged network that is popped with the other, so that its values stay as they are."""
    make = Mlp
    apply, popart, optimizer = pf.stateless(make()), pf.popart(1, 0.05), pf.adam(3e-2)
    params = pf.init_params(make, 0)
    target, opt_state, state = dict(params), optimizer.init(params), popart.init(params)
    x, action = torch.randn(64, 4), torch.randint(0, 2, (64,))
    reward = 1e3 * torch.where(action == 0, x[:, 0], -x[:, 0])

    def error(params, goal):
        return (apply(params, x).gather(-1, action[:, None]).squeeze(-1) - goal).square().mean()

    for _ in range(60):
        y = reward + 0.5 * pf.unnormalize(state, apply(target, x)).amax(-1)
        before = pf.unnormalize(state, apply(target, x))
        (params, target), opt_state, state = popart.update_network((params, target), opt_state, state, y, head="2")
        after = pf.unnormalize(state, apply(target, x))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=0.1)
        updates, opt_state = optimizer.update(torch.func.grad(error)(params, pf.normalize(state, y)), opt_state, params)
        params = pf.apply_updates(params, updates)
        target = optim.incremental_update(params, target, 0.1)
    best = apply(params, x).argmax(-1)
    assert (best == (x[:, 0] < 0).long()).float().mean() > 0.85
