"""Eligibility traces with a bounded step: ObGD, overshooting-bounded gradient descent, as a pair ``(init, update)``.

z      <- decay z + ∇v
M       = α κ max(|δ|, 1) ‖z‖₁
params <- params + α / max(M, 1) δ z

v is the network's output for what was done and δ its temporal-difference error. The bound keeps a step from passing
the target: with κ >= 1 a linear v moves by less than δ. A GradientTransformation can't do this, since it gets δ ∇v.

Source: Elsayed, Vasan and Mahmood, *Streaming deep reinforcement learning finally works* (2024), algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from popart_func.pop_art import PopArtState

__all__ = ["TraceOptimizer", "obgd", "pop_traces"]

Traces = dict[str, Tensor]
Scalar = float | Tensor


class TraceOptimizer(NamedTuple):
    """``init(params) -> traces``, ``update(gradients, delta, traces, reset) -> (updates, traces)``.

    Attributes:
        init: traces of zeros.
        update: the updates, which are added to the parameters, from the gradients of the output, its error ``delta``
            (0-d), and whether the traces start anew after this step (0-d, bool).
    """

    init: Callable[[Mapping[str, Tensor]], Traces]
    update: Callable[[Mapping[str, Tensor], Tensor, Traces, Tensor], tuple[Traces, Traces]]


def obgd(step_size: Scalar = 1.0, *, decay: Scalar, kappa: Scalar = 2.0) -> TraceOptimizer:
    """Overshooting-bounded gradient descent with accumulating traces.

    Args:
        step_size: α, the largest step.
        decay: of the traces, γ λ.
        kappa: κ: how much smaller than the bound a step is.

    >>> optimizer = obgd(1.0, decay=0.5)
    >>> gradients, delta = {"w": torch.tensor([1.0, -2.0])}, torch.tensor(6.0)
    >>> updates, traces = optimizer.update(gradients, delta, optimizer.init(gradients), torch.tensor(False))
    >>> updates["w"]  # 6 z / (2 * 6 * 3)
    tensor([ 0.1667, -0.3333])
    """

    def init(params: Mapping[str, Tensor]) -> Traces:
        return {name: torch.zeros_like(leaf) for name, leaf in params.items()}

    def update(gradients: Mapping[str, Tensor], delta: Tensor, traces: Traces, reset: Tensor) -> tuple[Traces, Traces]:
        traces = {name: decay * leaf + gradients[name] for name, leaf in traces.items()}
        length = torch.stack([leaf.abs().sum() for leaf in traces.values()]).sum()
        bound = step_size * kappa * delta.abs().clamp(min=1) * length
        step = step_size * delta / bound.clamp(min=1)
        updates = {name: step * leaf for name, leaf in traces.items()}
        return updates, {name: torch.where(reset, 0.0, leaf) for name, leaf in traces.items()}

    return TraceOptimizer(init, update)


def pop_traces(traces: Traces, old: PopArtState, new: PopArtState, *, head: str) -> Traces:
    """The traces of a normalized output after POP, as if earlier gradients had been taken with the new statistics.

    The gradient of the head does not know the scale, and those below the head pass its weights, which POP multiplies
    by σ / σ'. Exact for one statistic.

    Args:
        traces: of the parameters by name.
        old: the statistics before, of one task.
        new: the statistics after.
        head: the name of the last layer.
    """
    ratio = (old.scale / new.scale).squeeze(-1)
    return {name: leaf if name.startswith(f"{head}.") else ratio * leaf for name, leaf in traces.items()}
