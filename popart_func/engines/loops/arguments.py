"""Checks of what users give to loops, and of what their functions return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from popart_func.tree import PyTree

__all__ = ["check_function", "check_length", "check_predicate", "check_same", "check_tensors"]


def check_function(caller: str, name: str, function: Any) -> None:
    """Raises TypeError unless an argument is a function."""
    if not callable(function):
        raise TypeError(f"{caller}: `{name}` must be a function, got {type(function).__name__}.")


def check_tensors(caller: str, name: str, tree: PyTree) -> list[Tensor]:
    """The leaves of a tree; raises TypeError if one is not a tensor."""
    leaves = optree.tree_leaves(tree)
    for path, leaf in zip(optree.tree_paths(tree), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{caller}: every leaf of {name} must be a tensor, got {type(leaf).__name__} at {path}.")
    return leaves


def check_length(caller: str, xs: PyTree, length: int | None) -> int:
    """How many rounds a scan has: the leading axis of its xs, or ``length`` where there are none.

    Raises:
        ValueError: the leaves of ``xs`` have several lengths, or ``length`` is missing, negative or another one.
    """
    leaves = check_tensors(caller, "`xs`", xs)
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(lengths) > 1 or None in lengths:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"{caller}: every leaf of `xs` must have the same leading time axis, got shapes {shapes}.")
    found = lengths.pop() if lengths else length
    if found is None:
        raise ValueError(f"{caller}: `xs` has no tensors, so `length` must say how many steps to take.")
    if found < 0 or (length is not None and length != found):
        wanted = f"the leading axis of `xs`, {found}" if leaves else "at least 0"
        raise ValueError(f"{caller}: `length` must be {wanted}, got {length}.")
    return int(found)


def check_same(caller: str, function: str, before: PyTree, after: PyTree, before_name: str = "the carry it took") -> None:
    """Raises TypeError unless what a function returned has the structure, shapes and dtypes of what it took.

    Args:
        caller: the function that the user has called.
        function: its argument, the function that has returned.
        before: the tree that went in.
        after: the tree that came back.
        before_name: what ``before`` is.
    """
    expected, got = optree.tree_structure(before), optree.tree_structure(after)
    if expected != got:
        raise TypeError(f"{caller}: `{function}` must return the structure of {before_name}, {expected}, got {got}.")
    new = check_tensors(caller, f"what `{function}` returns", after)
    for path, old_leaf, new_leaf in zip(optree.tree_paths(before), optree.tree_leaves(before), new, strict=True):
        if old_leaf.dtype != new_leaf.dtype or old_leaf.shape != new_leaf.shape:
            raise TypeError(
                f"{caller}: `{function}` must return the shapes and dtypes of {before_name}: at {path} that has "
                f"{old_leaf.dtype} {tuple(old_leaf.shape)} and it returned {new_leaf.dtype} {tuple(new_leaf.shape)}."
            )


def check_predicate(caller: str, name: str, value: Any) -> Tensor:
    """A predicate as a bool tensor without axes; raises TypeError if it is something else."""
    if isinstance(value, bool):
        return torch.tensor(value)
    if not isinstance(value, Tensor) or value.ndim or value.dtype != torch.bool:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: {name} must be a bool tensor of shape (), got {got}.")
    return value


def pair(caller: str, result: Any) -> Sequence[Any]:
    """What a scan's step returned, ``(carry, y)``; raises TypeError if it is something else."""
    if not isinstance(result, tuple) or len(result) != 2:
        name = "a tensor" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"{caller}: `step` must return (carry, y), got {name}.")
    check_tensors(caller, "what `step` returns as y", result[1])
    return result
