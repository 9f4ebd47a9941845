"""`map_elements`: a function that acts on each number by itself, applied to all leaves of trees at once.

An optimizer of a small network spends its time on calls, a dozen for each parameter. Where nothing traces or
transforms, the parameters are joined to one vector, for as many calls as one parameter takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn import Parameter

from popart_func._torch import flatten_tensors, is_plain, unflatten_tensors
from popart_func.tree import PyTree

__all__ = ["map_elements"]

_MOST_NUMBERS = 100_000
"""Larger networks would spend more time on copies than on calls."""


def map_elements(function: Callable[..., tuple[Tensor, ...]], *trees: PyTree) -> tuple[PyTree, ...]:
    """``function(*leaves)`` gives a tuple for the leaves at one place of all trees; this gives a tuple of trees.

    Args:
        function: of tensors of one shape, whose every result has it too, and depends at each place on the numbers at
            that place alone.
        *trees: of one structure.

    Raises:
        ValueError: of several structures.

    >>> import torch
    >>> map_elements(lambda a, b: (a + b, a * b), {"w": torch.tensor([2.0])}, {"w": torch.tensor([3.0])})
    ({'w': tensor([5.])}, {'w': tensor([6.])})
    """
    leaves, structure = optree.tree_flatten(trees[0])
    columns: list[list[Any]] = [leaves, *(_leaves_of(tree, structure) for tree in trees[1:])]
    if not leaves:  # any number tells how many results there are; a 0-d one mixes with rates on any device
        parts: list[Any] = [() for _ in function(*[torch.zeros(())] * len(columns))]
    elif _can_be_joined(columns):
        results = function(*map(flatten_tensors, columns))
        parts = [unflatten_tensors(result, leaves) for result in results]
    else:
        parts = list(zip(*map(function, *columns), strict=True))
    return tuple(structure.unflatten(part) for part in parts)


def _leaves_of(tree: PyTree, structure: optree.PyTreeSpec) -> list[Any]:
    try:
        return structure.flatten_up_to(tree)
    except ValueError:  # whose message holds all numbers
        raise ValueError(
            f"optim: gradients, moments and parameters must have one structure, got {structure} and "
            f"{optree.tree_structure(tree)}."
        ) from None


def _can_be_joined(columns: Sequence[Sequence[Any]]) -> bool:
    every = [leaf for column in columns for leaf in column]
    if len(columns[0]) < 2 or not is_plain() or not {type(leaf) for leaf in every} <= {Tensor, Parameter}:
        return False
    shapes = [leaf.shape for leaf in columns[0]]
    return (
        all([leaf.shape for leaf in column] == shapes for column in columns[1:])
        and len({(leaf.dtype, leaf.device, leaf.requires_grad) for leaf in every}) == 1
        and sum([leaf.numel() for leaf in columns[0]]) <= _MOST_NUMBERS
    )
