"""Pop-Art in TorchRL's own losses; skipped where TorchRL is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchrl")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import ProbabilisticActor
from torchrl.modules import ValueNorm as TheirValueNorm
from torchrl.modules.distributions import NormalParamExtractor, TanhNormal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.multiagent import IPPOLoss, MAPPOLoss

from popart_func.interop.torchrl import ValueHead, ValueNorm

# TorchRL's own business.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
AGENTS = 3


def parts(loss_type, step_size=0.3):
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(6, 4), NormalParamExtractor()),
            in_keys=[("agents", "observation")],
            out_keys=[("agents", "loc"), ("agents", "scale")],
        ),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    head = ValueHead(16, 1, step_size)
    critic = TensorDictModule(
        nn.Sequential(nn.Linear(6, 16), nn.Tanh(), head),
        in_keys=[("agents", "observation")],
        out_keys=[("agents", "state_value")],
    )
    norm = ValueNorm(head)
    own = {} if loss_type is ClipPPOLoss else {"value_norm": norm}
    loss = loss_type(actor, critic, **own)
    loss.set_keys(value=("agents", "state_value"), action=("agents", "action"))
    return actor, critic, head, norm, loss


def batch_of(actor, size=16, scale=1e4):
    batch = TensorDict({("agents", "observation"): torch.randn(size, AGENTS, 6)}, [size])
    with torch.no_grad():
        actor(batch)
    x = batch["agents", "observation"]
    batch["value_target"] = scale * (x[..., :1] + 2)
    batch["advantage"] = torch.randn(size, AGENTS, 1)
    return batch


def values(critic, batch):
    with torch.no_grad():
        return critic(batch.clone())["agents", "state_value"]


@pytest.mark.parametrize("loss_type", [MAPPOLoss, IPPOLoss, ClipPPOLoss])
def test_a_loss_moves_the_statistics_and_no_value(loss_type):
    actor, critic, head, norm, loss = parts(loss_type)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    norm.attach(loss, optimizer)
    assert isinstance(norm, TheirValueNorm)
    assert len({id(one) for one in loss.parameters()}) == len(list(loss.parameters()))
    batch = batch_of(actor)
    before = values(critic, batch)
    out = loss(batch)
    torch.testing.assert_close(values(critic, batch), before, rtol=1e-3, atol=2e-2)
    assert head.count == 1
    assert head.scale > 1e3
    # The loss is that of normalized predictions and targets.
    error = norm.normalize(values(critic, batch)) - norm.normalize(batch["value_target"])
    expected = nn.functional.smooth_l1_loss(error, 0 * error)
    torch.testing.assert_close(out["loss_critic"].detach(), loss.critic_coeff * expected, rtol=1e-3, atol=1e-4)
    y = torch.randn(5, 1) * 1e4
    torch.testing.assert_close(norm.denormalize(norm.normalize(y)), y)
    assert norm.scale() is head.scale


def test_a_critic_learns_large_values_and_its_moments_follow():
    actor, critic, head, norm, loss = parts(MAPPOLoss, 0.1)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    norm.attach(loss, optimizer)
    batch = batch_of(actor, 64)
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch)["loss_critic"].backward()
        optimizer.step()
    error = (values(critic, batch) - batch["value_target"]).square().mean().sqrt()
    assert error < 0.6 * batch["value_target"].std()
    before, moment = head.scale.clone(), optimizer.state[head.weight]["exp_avg"].clone()
    norm.update(1e6 * torch.randn(8, AGENTS, 1))
    torch.testing.assert_close(optimizer.state[head.weight]["exp_avg"], moment * before / head.scale)


def test_errors():
    actor, _, _, norm, loss = parts(MAPPOLoss)
    norm.attach(loss)
    batch = batch_of(actor)
    del batch["value_target"]
    with pytest.raises(KeyError, match="the batch of MAPPOLoss must hold the targets"):
        loss(batch)
    with pytest.raises(ValueError, match="trailing shape"):
        norm.update(torch.ones(4, 2))
