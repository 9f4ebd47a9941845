"""Losses of learners: their values, shapes, and gradients."""

from __future__ import annotations

import pytest
import torch
from every_learner import APPLY, F64, make_learner, params_of

import popart_func as pf


@pytest.mark.parametrize("name", ["sgd", "art", "popart"])
def test_every_learner_takes_a_loss(name):
    options = {"loss": pf.losses.huber(0.3)}
    learner = pf.sgd_learner(APPLY[2], pf.sgd(0.1), **options) if name == "sgd" else make_learner(name, 2, **options)
    _, info = learner.update(learner.init(params_of(2)), (torch.ones(6, dtype=F64), torch.tensor([9.0, -9], dtype=F64)))
    expected = torch.nn.functional.huber_loss(
        info.normalized_prediction, info.normalized_target, reduction="sum", delta=0.3
    )
    torch.testing.assert_close(info.loss, expected)


def test_losses_value_by_value():
    prediction, target = torch.randn(5, 2), torch.randn(5, 2)
    error, share = target - prediction, torch.tensor([0.2, 0.7], dtype=F64)
    below = torch.maximum(share * error, (share - 1) * error).float()
    losses = pf.losses
    torch.testing.assert_close(losses.quantile(share)(prediction, target, None, None), below)
    huber = torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.5)
    torch.testing.assert_close(losses.huber(0.5)(prediction, target, None, None), huber)
    expected = (torch.where(error < 0, 1 - share, share) * huber).float()
    torch.testing.assert_close(losses.quantile(share, 0.5)(prediction, target, None, None), expected)
    torch.testing.assert_close(
        losses.huber()(prediction, target), torch.nn.functional.smooth_l1_loss(prediction, target, reduction="none")
    )
    old = torch.zeros(5, 2)
    clipped = losses.clipped_value(0.25)(prediction, target, pf.init_state(2), None, old_value=old)
    expected = 0.5 * torch.maximum((prediction - target) ** 2, (prediction.clamp(-0.25, 0.25) - target) ** 2)
    torch.testing.assert_close(clipped, expected)
    with pytest.raises(ValueError, match=r"^huber: `delta` must be > 0, got 0"):
        losses.huber(0)
    with pytest.raises(ValueError, match=r"^clipped_value: `epsilon` must be > 0, got 0"):
        losses.clipped_value(0)


@pytest.mark.parametrize("batch", [(), (3,)])  # as many examples as outputs: a wrong axis would fit, too
def test_a_loss_by_output_takes_the_parameter_of_each_target(batch):
    share = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    indices, y = torch.tensor([2, 0, 0]), torch.tensor([5.0, -7.0, 3.0], dtype=F64)
    if not batch:
        indices, y = indices[0], y[0]
    tasks, groups = pf.popart(3, 0.3), pf.popart(2, 0.3, groups=torch.tensor([0, 0, 1]))
    for popart in (tasks, groups, None):
        loss = pf.losses.quantile(share)
        learner = pf.sgd_learner if popart is None else pf.popart_learner
        rest = {"loss": loss} if popart is None else {"loss": loss, "popart": popart}
        learner = learner(APPLY[3], pf.sgd(0.0), **rest)
        _, info = learner.update(learner.init(params_of(3)), (torch.randn(*batch, 6, dtype=F64), y, indices))
        error = info.normalized_target - info.normalized_prediction
        own = share[indices]
        torch.testing.assert_close(info.loss, torch.maximum(own * error, (own - 1) * error).mean())


def test_losses_refuse_shapes_that_only_broadcast():
    loss, three = pf.losses.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^quantile: the last axis of `prediction` must be the 3 outputs, got shape "
                       r"\(3,\) and as many indices\. Write `loss\.at\(outputs, indices\)`"):  # fmt: skip
        loss(three, three, None, torch.tensor([2, 0, 0]))
    for shape in ((4,), (3, 1), ()):
        with pytest.raises(ValueError, match="last axis of `prediction` must be the 3 outputs"):
            loss(torch.zeros(shape), torch.zeros(shape))
    single = pf.sgd_learner(APPLY[1], pf.sgd(0.1), loss=loss)
    with pytest.raises(ValueError, match=r"a parameter for each of the 1 outputs of the network, got \(3,\)"):
        single.update(single.init(params_of(1)), (torch.ones(3, 6, dtype=F64), three.double()))
    for wrong in (torch.tensor(0.5), torch.tensor([0.5, 1.0]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match=r"^quantile: `quantiles` must"):
            pf.losses.quantile(wrong)
    with pytest.raises(
        ValueError, match=r"^clipped_value: 'old_value' of the batch must have the shape of the targets"
    ):
        pf.losses.clipped_value(0.1)(torch.zeros(3, 3), torch.zeros(3, 3), pf.init_state(1), None, old_value=three)
    with pytest.raises(ValueError, match=r"^clipped_value: 'old_value' of the batch must .*, got None"):
        pf.losses.clipped_value(0.1)(three, three, pf.init_state(1))
