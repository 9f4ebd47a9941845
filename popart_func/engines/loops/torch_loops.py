"""PyTorch's own loops inside a step: `torch.cond`, `torch.while_loop` and its scan become this package's."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from popart_func._torch import higher_order_ops
from popart_func.engines.loops.api import cond, inner_scan, while_loop

__all__ = ["torch_loops"]


@contextlib.contextmanager
def torch_loops() -> Iterator[None]:
    """Within it, and in this thread only, PyTorch's names of loops mean this package's loops.

    PyTorch's compile what they are given, and have no rule under several transforms of `torch.func`. A step that has
    imported a function itself, ``from torch import cond``, keeps PyTorch's.
    """
    thread = threading.get_ident()
    names: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch, "cond", _cond),
        (torch, "while_loop", _while_loop),
        (higher_order_ops, "scan", _scan),
    )
    before = [getattr(owner, name) for owner, name, _ in names]
    for (owner, name, own), original in zip(names, before, strict=True):
        setattr(owner, name, functools.wraps(original)(functools.partial(_in_thread, thread, own, original)))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(names, before, strict=True):
            setattr(owner, name, original)


def _in_thread(thread: int, own: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (own if threading.get_ident() == thread else original)(*args, **kwargs)


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    predicate = pred.reshape(()) if isinstance(pred, Tensor) else bool(pred)
    return cond(predicate, true_fn, false_fn, *operands)


def _while_loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried_inputs: Any) -> Any:
    carry = tuple(carried_inputs)
    going = lambda carry: cond_fn(*carry).reshape(())  # noqa: E731
    return while_loop(going, lambda carry: tuple(body_fn(*carry)), carry)


def _scan(
    combine_fn: Callable[..., Any], init: Any, xs: Any, *, dim: int = 0, reverse: bool = False
) -> tuple[Any, Any]:
    first = optree.tree_map(lambda leaf: leaf.movedim(dim, 0), xs)
    carry, ys = inner_scan(combine_fn, init, first, length=None, reverse=reverse, unroll=1, checkpoint=None)
    return carry, optree.tree_map(lambda leaf: leaf.movedim(0, dim), ys)
