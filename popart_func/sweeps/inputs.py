"""Inputs of the lanes: each seed's first parameters, and the stream of samples that it learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optree
import torch

from popart_func.engines.loops.arguments import check_tensors
from popart_func.tree import PyTree

__all__ = ["Inputs", "SeedInputs", "difference"]

SeedInputs = tuple[PyTree, PyTree]
"""A seed's parameters, and its stream, leaves ``[time, ...]``."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of every seed. They may differ in their numbers alone: that is checked when a seed is first asked for.

    Attributes:
        init: from a seed to parameters, a tree of tensors.
        data: a tree of tensors ``[time, ...]``, or a function from a seed to such a tree.
        device: where the inputs are put.
        dtype: of parameters that are floats.
    """

    init: Callable[[int], PyTree]
    data: PyTree | Callable[[int], PyTree]
    device: torch.device
    dtype: torch.dtype
    _kept: dict[int, SeedInputs] = field(default_factory=dict)
    _first: dict[int, SeedInputs] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_first": {}}

    @property
    def shared(self) -> bool:
        """Whether all seeds learn from the same stream."""
        return not callable(self.data)

    def of(self, seeds: list[int]) -> dict[int, SeedInputs]:
        """The inputs of some seeds. They are kept for the next call, since the next chunk shares seeds."""
        shared = self._stream(self.data) if self.shared else None
        found = {}
        for seed in seeds:
            if seed in self._kept:
                found[seed] = self._kept[seed]
                continue
            found[seed] = self._params(seed), self._stream(self.data(seed)) if shared is None else shared
            self._check_alike(seed, found[seed])
        if len(seeds) >= len(self._kept):
            self._kept.clear()
            self._kept.update(found)
        return found

    def _params(self, seed: int) -> PyTree:
        params = self._placed("init", self.init(seed))
        return optree.tree_map(lambda leaf: leaf.to(self.dtype) if leaf.is_floating_point() else leaf, params)

    def _stream(self, stream: PyTree) -> PyTree:
        placed = self._placed("data", stream)
        shapes = [tuple(leaf.shape) for leaf in optree.tree_leaves(placed)]
        if not all(shape and 0 < shape[0] == shapes[0][0] for shape in shapes):
            raise ValueError(
                f"run: every leaf of `data` must have the samples as its leading axis, one or more, as many as "
                f"all other leaves, got the shapes {', '.join(map(str, shapes))}."
            )
        return placed

    def _placed(self, name: str, tree: PyTree) -> PyTree:
        if not check_tensors("run", f"`{name}`", tree):
            raise ValueError(f"run: `{name}` must give at least one tensor, got {tree!r}.")
        return optree.tree_map(lambda leaf: leaf.detach().to(self.device), tree)

    def _check_alike(self, seed: int, inputs: SeedInputs) -> None:
        if not self._first:
            self._first[seed] = inputs
        ((first, expected),) = self._first.items()
        for name, one, other in zip(("init", "data"), expected, inputs, strict=True):
            differ = difference(one, other)
            if differ:
                raise ValueError(
                    f"run: `{name}` must give the same structure, shapes and dtypes for every seed, got {differ[0]} "
                    f"for seed {first} and {differ[1]} for seed {seed}."
                )


def difference(one: PyTree, other: PyTree) -> tuple[str, str] | None:
    """The first difference of two trees of tensors in structure, dtype or shape: what each has there. None if alike."""
    structures = optree.tree_structure(one), optree.tree_structure(other)
    if structures[0] != structures[1]:
        return str(structures[0]), str(structures[1])
    for path, *leaves in zip(optree.tree_paths(one), optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
        here, there = (f"{leaf.dtype} {tuple(leaf.shape)} at {path}" for leaf in leaves)
        if here != there:
            return here, there
    return None
