"""Proximal policy optimization as one pure step, with loops inside: it learns at any scale of rewards."""

from __future__ import annotations

import pytest
import torch
from ppo import ppo

import popart_func as pf

SEEDS, UPDATES = 32, 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward_scale", "with_popart", "lowest", "highest"),
    [(1e-3, True, 495, 500), (1.0, True, 495, 500), (1e3, True, 495, 500), (1e3, False, 0, 100)],
)
def test_ppo_learns_cart_pole(reward_scale: float, with_popart: bool, lowest: float, highest: float):
    init, update = ppo(reward_scale, with_popart=with_popart, updates=UPDATES)
    start = pf.tree.stack([init(seed) for seed in range(SEEDS)])
    _, (returns, _) = pf.scan_lanes(update, start, torch.arange(float(UPDATES)), engine="native")
    assert lowest <= returns[-1].median() <= highest
