"""Checks of what users give to loops, and of what their functions return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from popart_func._torch import is_jit_tracing
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.tree import PyTree

__all__ = ["Outline", "check_function", "check_length", "check_predicate", "check_same", "check_tensors", "pair"]


def check_function(caller: str, name: str, function: Any) -> None:
    """Raises TypeError unless an argument is a function."""
    if not callable(function):
        raise TypeError(f"{caller}: `{name}` must be a function, got {type(function).__name__}.")


def check_tensors(caller: str, name: str, tree: PyTree) -> list[Tensor]:
    """The leaves of a tree; raises TypeError if one is not a tensor."""
    leaves = optree.tree_leaves(tree)
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            path = optree.tree_paths(tree)[place]
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


class Outline(NamedTuple):
    """What a loop needs to know of a tree of tensors: its structure, and the paths and specs of its leaves."""

    structure: optree.PyTreeSpec
    paths: list[Any]
    specs: list[TensorSpec]

    @classmethod
    def of(cls, caller: str, name: str, tree: PyTree) -> Outline:
        """The outline of a tree; raises TypeError if a leaf is not a tensor."""
        leaves = check_tensors(caller, name, tree)
        return cls(optree.tree_structure(tree), optree.tree_paths(tree), [TensorSpec.of(leaf) for leaf in leaves])


def check_same(caller: str, function: str, before: Outline, result: PyTree, what: str = "the carry it took") -> Outline:
    """Raises TypeError unless what a function returned has a given structure, shapes and dtypes.

    Args:
        caller: the function that the user has called.
        function: its argument, the function that has returned.
        before: the outline that the result must have.
        result: what came back.
        what: whose outline that is.

    Returns:
        The outline of the result.
    """
    after = Outline.of(caller, f"what `{function}` returns", result)
    if before.structure != after.structure:
        raise TypeError(
            f"{caller}: `{function}` must return the structure of {what}, {before.structure}, got {after.structure}."
        )
    for path, old, new in zip(before.paths, before.specs, after.specs, strict=True):
        if old[:2] != new[:2]:
            raise TypeError(
                f"{caller}: `{function}` must return the shapes and dtypes of {what}: at {path} that has {old.dtype} "
                f"{old.shape} and it returned {new.dtype} {new.shape}."
            )
    return after


def check_predicate(caller: str, name: str, value: Any) -> Tensor:
    """A predicate as a bool tensor without axes; raises TypeError if it is not, or is read in torch.jit.trace."""
    if isinstance(value, bool):
        return torch.tensor(value)
    if not isinstance(value, Tensor) or value.ndim or value.dtype != torch.bool:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{caller}: {name} must be a bool tensor of shape (), got {got}.")
    if is_jit_tracing():
        raise TypeError(f"{caller}: torch.jit.trace would keep the value that {name} has now: use torch.compile.")
    return value


def pair(caller: str, result: Any) -> Sequence[Any]:
    """What a scan's step returned, ``(carry, y)``; raises TypeError if it is something else."""
    if not isinstance(result, tuple) or len(result) != 2:
        name = "a tensor" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"{caller}: `step` must return (carry, y), got {name}.")
    check_tensors(caller, "what `step` returns as y", result[1])
    return result
