"""The native engine against the eager one, and what it promises beyond that: isolation, determinism, caching, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap

from popart_func import optim
from popart_func.engines import eager, native
from popart_func.engines.lane_scan import LaneScan, make_lane_scan
from popart_func.learners import art_learner, normalized_sgd_learner, popart_learner, sgd_learner
from popart_func.models import UnifiedModel, init_lanes, stateless
from popart_func.pop_art import art, init_state, popart
from popart_func.tree import max_difference

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")

MODEL = UnifiedModel(5, 4, 1)
APPLY = stateless(MODEL)
LANES = 19  # two blocks, the last one not full

OPTIMIZERS: dict[str, Callable[[Any], optim.GradientTransformation]] = {
    "sgd": lambda rate: optim.sgd(rate),
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optim.sgd(rate, momentum=0.5, nesterov=True),
    "adam": lambda rate: optim.adam(rate),
}
LEARNERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda optimizer, beta: sgd_learner(APPLY, optimizer),
    "art": lambda optimizer, beta: art_learner(APPLY, optimizer, popart(1, beta)),
    "popart": lambda optimizer, beta: popart_learner(APPLY, optimizer, popart(1, beta)),
    "normalized_sgd": lambda optimizer, beta: normalized_sgd_learner(APPLY, optimizer, popart(1, beta)),
}


def make_step(learner: str, optimizer: str) -> Callable[..., Any]:
    def step(state: Any, xy: Any, hparams: Any) -> Any:
        state, info = LEARNERS[learner](OPTIMIZERS[optimizer](hparams["rate"]), hparams["beta"]).update(state, xy)
        return state, {"error": info.error, "loss": info.loss}

    return step


def make_scan(learner: str, optimizer: str, dtype: torch.dtype, *, steps: int = 200, lanes: int = LANES, step: Any = None) -> LaneScan:
    generator = torch.Generator().manual_seed(5)
    params = {name: leaf.to(dtype) for name, leaf in init_lanes(lambda: UnifiedModel(5, 4, 1), range(lanes)).items()}
    state = vmap(LEARNERS[learner](OPTIMIZERS[optimizer](0.1), 0.1).init)(params)
    x = torch.randn(steps, lanes, 5, generator=generator, dtype=dtype)
    y = x.sum(-1, keepdim=True) + 2 + torch.randn(steps, 1, 1, generator=generator, dtype=dtype) / 4
    hparams = {
        "rate": torch.linspace(1e-3, 3e-3, lanes, dtype=dtype),
        "beta": torch.linspace(0.05, 0.3, lanes, dtype=dtype),
    }
    return make_lane_scan("scan_lanes", step or make_step(learner, optimizer), state, (x, y), hparams, shared=False)


def difference(first: Any, second: Any) -> float:
    """The largest difference, relative to 1 + |value|."""
    return max(
        float(((a - b).abs() / (1 + b.abs())).max())
        for a, b in zip(torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(second), strict=True)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_agrees_with_eager_in_float64(learner: str, optimizer: str) -> None:
    scan = make_scan(learner, optimizer, torch.float64)
    expected, got = eager.run(scan), native.run(scan)
    assert torch.isfinite(expected[1]["error"]).all()
    assert difference(got, expected) < 1e-12


@pytest.mark.parametrize(("learner", "optimizer"), [("popart", "adam"), ("normalized_sgd", "sgd")])
def test_agrees_with_eager_in_float32(learner: str, optimizer: str) -> None:
    scan = make_scan(learner, optimizer, torch.float32)
    # Sums of 5 products and vector functions of 4 ulp differ by about 1e-6 a step; training contracts it.
    assert difference(native.run(scan), eager.run(scan)) < 2e-4
