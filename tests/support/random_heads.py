"""Random statistics and heads, far from 0 and 1."""

from __future__ import annotations

import torch

import popart_func as pf

FLOAT32, FLOAT64 = torch.float32, torch.float64


def random_state(tasks, dtype=FLOAT64):
    variance = torch.rand(tasks, dtype=dtype) * 9 + 0.5
    return pf.PopArtState(
        shift=torch.randn(tasks, dtype=dtype) * 100 + 30,
        scale=variance.sqrt(),
        variance=variance,
        count=torch.randint(1, 9, (tasks,), dtype=torch.int32),
        residue=torch.randn(tasks, dtype=dtype) * 1e-3,
    )


def random_head(outputs, dtype=FLOAT64, inputs=5):
    return {"weight": torch.randn(outputs, inputs, dtype=dtype) + 0.3, "bias": torch.randn(outputs, dtype=dtype) - 0.7}


def outputs_of(head, state, hidden):
    return pf.unnormalize(state, hidden @ head["weight"].mT + head["bias"])
