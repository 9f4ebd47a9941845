"""Operations on pytrees of tensors, through optree: stack, unstack, partition, combine, max_difference.

Parameters, states and batches are pytrees: dicts, NamedTuples, tuples and lists of tensors, nested at will. Dict leaves
come in sorted order here, as in JAX; `torch.utils._pytree` keeps the order of insertion. Never zip the leaves of one
library with the structure of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import optree
import torch
from torch import Tensor

__all__ = ["combine", "max_difference", "partition", "stack", "unstack"]

PyTree = Any
"""A nest of dicts, NamedTuples, tuples and lists with tensors at its leaves."""


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of one structure on a new leading axis, the lane axis.

    Args:
        trees: at least one tree; leaves at the same place have the same shape.

    Returns:
        One tree whose leaves have shape ``[len(trees), ...]``.

    Raises:
        ValueError: there is no tree, or structures or shapes differ.

    >>> stack([{"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}])
    {'w': tensor([1., 2.])}
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: `trees` must hold at least one tree, got none.")
    for position, tree in enumerate(trees[1:], start=1):
        _check_same_structure("stack", trees[0], tree, f"trees[{position}]")
    return optree.tree_map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])


def unstack(tree: PyTree) -> list[PyTree]:
    """Cuts a tree along the leading axis of its leaves: the inverse of `stack`.

    Raises:
        ValueError: the tree has no leaves, or they do not share one leading axis.

    >>> unstack({"w": torch.tensor([1.0, 2.0])})
    [{'w': tensor(1.)}, {'w': tensor(2.)}]
    """
    leaves = optree.tree_leaves(tree)
    if not leaves or any(leaf.shape[:1] != leaves[0].shape[:1] or leaf.ndim == 0 for leaf in leaves):
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"unstack: the leaves of `tree` must share one leading axis, got shapes {shapes}.")
    return [optree.tree_map(itemgetter(lane), tree) for lane in range(leaves[0].shape[0])]


def partition(tree: PyTree, predicate: Callable[[Tensor], bool]) -> tuple[PyTree, PyTree]:
    """Splits a tree in two by a predicate on its leaves; each half has None where the other has the leaf.

    `combine` is the inverse.

    >>> partition({"w": torch.ones(2), "n": torch.tensor(1)}, torch.is_floating_point)
    ({'w': tensor([1., 1.]), 'n': None}, {'w': None, 'n': tensor(1)})
    """
    chosen = optree.tree_map(lambda leaf: leaf if predicate(leaf) else None, tree)
    others = optree.tree_map(lambda leaf: None if predicate(leaf) else leaf, tree)
    return chosen, others


def combine(first: PyTree, second: PyTree) -> PyTree:
    """Merges two trees: each None of one becomes the leaf of the other. The inverse of `partition`.

    Raises:
        ValueError: the structures differ, or a place holds a leaf in both trees.

    >>> combine({"w": None, "n": torch.tensor(1)}, {"w": torch.tensor(2.0), "n": None})
    {'w': tensor(2.), 'n': tensor(1)}
    """

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is not None and b is not None:
            raise ValueError("combine: a place holds a leaf in both trees; one of them must be None there.")
        return b if a is None else a

    _check_same_structure("combine", first, second, "second", none_is_leaf=True)
    return optree.tree_map(choose, first, second, none_is_leaf=True)


def max_difference(first: PyTree, second: PyTree) -> Tensor:
    """The largest absolute difference between two trees, over all leaves, as a 0-d tensor.

    NaN when a difference is NaN. Two equal infinities do not differ.

    Raises:
        ValueError: structures or shapes differ: nothing is broadcast.

    >>> max_difference({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 5.0])})
    tensor(3.)
    """
    _check_same_structure("max_difference", first, second, "second")
    differences = []
    for path, a, b in zip(optree.tree_paths(first), optree.tree_leaves(first), optree.tree_leaves(second), strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"max_difference: leaves at {path} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        if a.numel():
            differences.append(torch.where(a == b, 0, (a - b).abs()).amax())
    if not differences:
        return torch.tensor(0.0)
    dtype = differences[0].dtype
    for difference in differences:
        dtype = torch.promote_types(dtype, difference.dtype)
    return torch.stack([difference.to(dtype) for difference in differences]).amax()


def _check_same_structure(caller: str, first: PyTree, other: PyTree, name: str, *, none_is_leaf: bool = False) -> None:
    expected = optree.tree_structure(first, none_is_leaf=none_is_leaf)
    got = optree.tree_structure(other, none_is_leaf=none_is_leaf)
    if expected != got:
        raise ValueError(f"{caller}: `{name}` must have the structure {expected}, got {got}.")
