"""Batches, states and infos of learners, and which output of the network each target belongs to.

A batch is ``(x, y)``, ``(x, y, indices)`` or ``(x, y, indices, weights)``, or a dict with these names, which may leave
some out and have others, which go to the loss. y is float32, or float64 where the parameters are.

- Without indices, y has a target for every output; with a single output, y may lack the last axis. Where outputs share
  a statistic (``groups``), y may have a target for every task instead, which then is that of all its outputs.
- With indices, each example has one target, for the output that ``indices`` names.
- A target of weight 0 is absent, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._checks import as_weights, check_in_range
from popart_func._typing import Float, Integer, Num
from popart_func.models import Params
from popart_func.pop_art import PopArt, PopArtState, normalize, unnormalize

__all__ = ["Batch", "Example", "Info", "Learner", "LearnerState", "unpack"]

Batch = Any
"""``(x, y)``, ``(x, y, indices)``, ``(x, y, indices, weights)`` or a dict with these names."""


_MISTAKEN = {
    **dict.fromkeys(("mask", "masks", "weight", "w", "sample_weight", "sample_weights"), "weights"),
    **dict.fromkeys(("index", "idx", "task", "tasks"), "indices"),
}
"""Names in a batch that would be taken for what the loss reads, and what was meant."""


class LearnerState(NamedTuple):
    """What the next step needs. All learners have the same; with SGD the statistics stay at 0 and 1.

    Attributes:
        params: the flat parameters of the network, and its buffers.
        statistics: the statistics of the targets.
        opt_state: the state of the optimizer.
    """

    params: dict[str, Tensor]
    statistics: PopArtState
    opt_state: Any


class Info(NamedTuple):
    """Measurements of one update, taken after ART and POP of its batch and before its gradient step.

    Attributes:
        loss: the loss of the normalized prediction, half squared error if no other is given, summed over outputs,
            averaged over the batch; 0-d.
        prediction: f(x), unnormalized, in the shape of the targets.
        target: y, unnormalized.
        error: ``|f(x) − y|``, unnormalized, without the rounding of a large shift; 0 for an absent target.
        normalized_prediction: ``(f(x) − μ) / σ``.
        normalized_target: ``(y − μ) / σ``; 0 for an absent target.
        scale_ratio: σ/σ' of this update, ``[tasks]``: far from 1 where the targets' size changes.
        bound_use: ``|normalized target|`` over its bound by Proposition 2, in the shape of the targets: near 1 for a
            target unlike all before, and 0 where there is no bound.
        count: how many updates each task has had, ``[tasks]``.
    """

    loss: Float[Tensor, "*lanes"]
    prediction: Float[Tensor, "..."]
    target: Num[Tensor, "..."]
    error: Float[Tensor, "..."]
    normalized_prediction: Float[Tensor, "..."]
    normalized_target: Float[Tensor, "..."]
    scale_ratio: Float[Tensor, "*lanes tasks"]
    bound_use: Float[Tensor, "..."]
    count: Integer[Tensor, "*lanes tasks"]  # type: ignore[assignment]  # a tuple's own `count` is not missed


class Learner(NamedTuple):
    """A pair of pure functions: ``init(params) -> state``, ``update(state, batch) -> (state, info)``."""

    init: Callable[[Params], LearnerState]
    update: Callable[[LearnerState, Batch], tuple[LearnerState, Info]]


class Example(NamedTuple):
    """A checked batch.

    Attributes:
        caller: the learner, which errors name.
        x: the input.
        y: the targets.
        indices: the output of each target, or None.
        weights: the weight of each target, in the shape and dtype of y, or None.
        tasks: the statistic of each target, or None where that is its place on the last axis, or the only one.
        groups: the statistic of each output, or None.
        others: what else the batch holds, for the loss.
    """

    caller: str
    x: Any
    y: Tensor
    indices: Tensor | None
    weights: Tensor | None
    tasks: Tensor | None
    groups: Tensor | None
    others: Mapping[str, Any]

    def present(self, values: Tensor) -> Tensor:
        """Values of targets, with 0 for those that are absent."""
        return values if self.weights is None else torch.where(self.weights > 0, values, 0)

    def at_outputs(self) -> Example:
        """With a target for every output, where y has one for every task."""
        groups = self.groups
        if groups is None or self.indices is not None or self.y.shape[-1:] == groups.shape:
            return self
        weights = None if self.weights is None else self.weights.index_select(-1, groups)
        tasks = groups if self.y.shape[-1] > 1 else None
        return self._replace(y=self.y.index_select(-1, groups), weights=weights, tasks=tasks)

    def select(self, outputs: Tensor) -> Tensor:
        """The outputs that have a target, in the shape of the targets."""
        y, indices = self.y, self.indices
        if indices is not None:
            if not indices.shape == y.shape == outputs.shape[:-1]:
                raise ValueError(
                    f"{self.caller}: with indices, targets and indices must have the shape of the outputs without "
                    f"their last axis, {tuple(outputs.shape[:-1])}, got {tuple(y.shape)} and {tuple(indices.shape)}."
                )
            check_in_range(self.caller, "indices", indices, outputs.shape[-1])
            return outputs.gather(-1, indices.long()[..., None]).squeeze(-1)
        if y.shape == outputs.shape:
            return outputs
        if outputs.shape[-1] == 1 and y.shape == outputs.shape[:-1]:
            return outputs.squeeze(-1)
        raise ValueError(
            f"{self.caller}: the targets must have the shape of the outputs, {tuple(outputs.shape)}, "
            f"got {tuple(y.shape)}."
        )

    def lift(self, cotangent: Tensor, outputs: Tensor) -> Tensor:
        """The transpose of `select`, averaged over the batch: a cotangent of the targets becomes one of all outputs."""
        cotangent = self.average(cotangent, outputs).to(outputs.dtype)
        if self.indices is None:
            return cotangent.reshape(outputs.shape)
        return torch.zeros_like(outputs).scatter(-1, self.indices.long()[..., None], cotangent[..., None])

    def average(self, losses: Tensor, outputs: Tensor) -> Tensor:
        """The terms of the average over the batch, one for each target. Their sum is the average.

        The average is over examples. An example weighs as much as its heaviest target.
        """
        if self.weights is None:
            return losses / outputs.shape[:-1].numel()
        weights = self.weights
        examples = weights.amax(-1) if weights.shape == outputs.shape else weights
        total = examples.sum()
        return losses * (weights / torch.where(total > 0, total, 1))

    def shares(self, statistics: PopArtState) -> tuple[Tensor | float, Tensor | float, Tensor]:
        """What `PopArt.bound` takes, to broadcast with the targets.

        Returns:
            The share of each target in all targets of its task; how many targets that task has; its count of updates.
        """
        tasks, count, weights = self.tasks, statistics.count, self.weights
        if tasks is None and weights is None:
            number = max(self.y.numel(), 1) / count.shape[-1]
            return 1 / number, number, count if count.shape[-1] > 1 else count.squeeze(-1)
        weights = torch.ones_like(self.y, dtype=statistics.shift.dtype) if weights is None else weights
        if tasks is None:
            total = weights.reshape(-1, count.shape[-1]).sum(0)
            if count.shape[-1] == 1:  # y may be 0-d
                total, count = total.squeeze(-1), count.squeeze(-1)
        else:
            rows = tasks.expand(self.y.shape).reshape(-1).long()
            total = torch.zeros_like(statistics.scale).index_add(0, rows, weights.reshape(-1).to(statistics.scale))
            total, count = (field.index_select(0, rows).reshape(self.y.shape) for field in (total, count))
        samples = torch.where(total > 0, total, 1)
        return torch.where(weights > 0, weights, 1) / samples, samples, count

    def rescale(self, statistics: PopArtState, delta: Tensor, *, inverse: bool = False) -> Tensor:
        """``δ / σ``, or the inverse ``σ δ``: changes the units of a difference, to which the shift does not apply."""
        zero = torch.zeros_like(statistics.shift)
        centred = statistics._replace(shift=zero, residue=zero)
        return (unnormalize if inverse else normalize)(centred, delta, self.tasks)


def unpack(caller: str, batch: Batch, statistics: PopArtState, popart: PopArt | None) -> Example:
    """A batch, checked.

    Raises:
        TypeError, ValueError: parts that are missing or of another kind.
    """
    if isinstance(batch, Mapping):
        given = dict(batch)
        if not {"x", "y"} <= given.keys():
            raise ValueError(f"{caller}: `batch` must have 'x' and 'y', got {sorted(given)}.")
        for name in given.keys() & _MISTAKEN.keys():
            raise ValueError(
                f"{caller}: `batch` holds {name!r}, which a learner does not read: write {_MISTAKEN[name]!r}. What "
                f"your own loss reads needs another name."
            )
    elif isinstance(batch, tuple | list) and len(batch) in (2, 3, 4):
        given = dict(zip(("x", "y", "indices", "weights"), batch, strict=False))
    else:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"{caller}: `batch` must be (x, y), (x, y, indices), (x, y, indices, weights) or a dict of them, got {got}."
        )
    x, y = given.pop("x"), given.pop("y")
    indices, weights = given.pop("indices", None), given.pop("weights", None)
    if not isinstance(y, Tensor):
        raise TypeError(f"{caller}: the targets y of `batch` must be a tensor, got {type(y).__name__}.")
    dtype = statistics.shift.dtype
    if torch.promote_types(y.dtype, dtype) != dtype:
        raise TypeError(
            f"{caller}: the targets y of `batch` must be of the statistics' dtype, {dtype}, or convert to it, got "
            f"{y.dtype}: write y.float(), or make the parameters double."
        )
    if indices is not None and not isinstance(indices, Tensor):
        raise TypeError(f"{caller}: the indices of `batch` must be a tensor, got {type(indices).__name__}.")
    if weights is not None:
        weights = as_weights(caller, "y", y, weights).to(dtype)
    groups = None if popart is None else popart.groups
    tasks = None
    if statistics.shift.shape[-1] == 1 and y.shape[-1:] != (1,):
        groups = None  # y has no axis of tasks: `at_outputs` must not take one of its axes for it
    if statistics.shift.shape[-1] > 1:
        tasks = indices
        if popart is not None and groups is not None:
            tasks = popart.tasks_of(statistics, y) if indices is None else groups[indices.long()]
    return Example(caller, x, y, indices, weights, tasks, groups, given)
