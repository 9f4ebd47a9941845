"""A learner's first step and what is recorded of it, taken once with every part looked at: whose mistake is it?

A sweep's own step takes nothing for granted that was not seen here, in one lane, on the CPU or wherever the lanes run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, vmap

from popart_func.engines.lane_scan import check_tensors
from popart_func.learners import Learner
from popart_func.sweeps._checks import check_function
from popart_func.sweeps.grid import Variable
from popart_func.sweeps.inputs import difference
from popart_func.sweeps.records import Record
from popart_func.tree import PyTree

__all__ = ["measured", "over_lanes", "variable"]


def measured(
    name: str, make: Callable[..., Learner], record: Mapping[str, Record], params: PyTree, x: PyTree, hparams: PyTree
) -> dict[str, Tensor]:
    """What is recorded of the first step of a learner, for each record: leaves ``[1, ...]``, as those given.

    Args:
        name: the learner's, or empty.
        make: from hyper-parameters to a learner.
        record: name to what is kept.
        params: leaves ``[1, ...]``.
        x: the first sample, leaves ``[1, ...]``.
        hparams: leaves ``[1]``.
    """
    label = f"make_learner[{name!r}]" if name else "make_learner"

    def initial(params: Any, hparams: Any) -> PyTree:
        learner = make(**hparams)
        if not (hasattr(learner, "init") and hasattr(learner, "update")):
            raise TypeError(f"run: `{label}` must return a Learner(init, update), got {type(learner).__name__}.")
        check_function("run", f"{label}(...).init", learner.init, "params")
        check_function("run", f"{label}(...).update", learner.update, "state", "x")
        state = learner.init(params)
        if not check_tensors("run", f"{label}(...).init(params)", state):
            raise ValueError(f"run: `{label}(...).init(params)` must hold at least one tensor, got {state!r}.")
        return state

    def step(state: Any, x: Any, hparams: Any) -> dict[str, Tensor]:
        took = optree.tree_map(lambda leaf: leaf, state)
        result = make(**hparams).update(state, x)
        if not isinstance(result, tuple) or len(result) != 2:
            got = type(result).__name__ + (f" of length {len(result)}" if isinstance(result, tuple) else "")
            raise TypeError(f"run: `{label}(...).update` must return (state, info), got {got}.")
        new, info = result
        check_tensors("run", f"{label}(...).update(state, x)[0]", new)
        differ = difference(took, new)
        if differ:
            raise TypeError(
                f"run: `{label}(...).update` must return a state of the structure, shapes and dtypes that it took, "
                f"{differ[0]}, got {differ[1]}."
            )
        return {name: _measure(name, one, new, info) for name, one in record.items()}

    with _noted(f"the first step of `{label}(...)` was tried in one lane, with hyper-parameters as 0-d tensors,"):
        params, x = (optree.tree_map(torch.clone, tree) for tree in (params, x))  # the caller keeps its own
        state = over_lanes(initial, params, hparams)
        before = _versions(state), _versions(x)
        found = over_lanes(step, state, x, hparams)
    for argument, one, other in zip(("state", "x"), before, (_versions(state), _versions(x)), strict=True):
        if one != other:
            raise ValueError(
                f"run: `{label}(...).update` must not change `{argument}` in place: change a copy, `leaf.clone()`, or "
                f"write `leaf = leaf + 1` instead of `leaf += 1`."
            )
    return found


def over_lanes(function: Callable[..., PyTree], *trees: PyTree) -> PyTree:
    """A function of trees in every lane: `torch.vmap`, also of trees that optree knows and PyTorch does not.

    Args:
        function: of one lane.
        *trees: its arguments, leaves ``[lanes, ...]``.
    """
    structure = optree.tree_structure(trees)  # type: ignore[arg-type]
    structures = []

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        results, found = optree.tree_flatten(function(*optree.tree_unflatten(structure, leaves)))
        structures.append(found)
        return tuple(results)

    results = vmap(flat)(*optree.tree_leaves(trees))  # type: ignore[arg-type]
    return optree.tree_unflatten(structures[-1], results)


def variable(name: str, record: Record, one: Tensor, steps: int) -> Variable:
    """What is kept under one name, given what is recorded of one step, ``[1, ...]``.

    Args:
        name: the record's.
        record: the record.
        one: what it is of.
        steps: how many samples there are.
    """

    def keep(series: Tensor) -> Tensor:
        kept = record.keep(series)
        if not isinstance(kept, Tensor):
            raise TypeError(f"run: a record must keep a tensor, got {type(kept).__name__} for {name!r}.")
        return kept

    with _noted(f"the `keep` of `record` {name!r} was tried on a series of the first step's value, repeated,"):
        kept = vmap(keep)(one[:, None].repeat(1, steps, *[1] * (one.ndim - 1)))[0]
    samples = None if record.samples is None else record.samples(steps)
    if samples is not None and not (isinstance(samples, range) and kept.shape[:1] == (len(samples),)):
        raise ValueError(
            f"run: the `samples` of `record` {name!r} must give the range of samples on the leading axis of what is "
            f"kept, of shape {tuple(kept.shape)}, got {samples!r}."
        )
    return Variable(tuple(kept.shape), _numpy_dtype(name, kept.dtype), samples, record.description)


def _versions(tree: PyTree) -> list[int]:
    """How often each leaf has been changed in place, as far as PyTorch counts it."""
    return [leaf._version for leaf in optree.tree_leaves(tree) if not leaf.is_inference()]


def _measure(name: str, record: Record, state: PyTree, info: PyTree) -> Tensor:
    value = record.of(state, info)
    if not isinstance(value, Tensor):
        raise TypeError(f"run: the `of` of `record` {name!r} must give a tensor, got {type(value).__name__}.")
    return value


@contextmanager
def _noted(what: str) -> Iterator[None]:
    """Says of an error of PyTorch's in a user's function what it came of."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(f"run: {what} under torch.vmap: neither `float`, `.item()`, nor `if` can be asked of a tensor.")
        raise


def _numpy_dtype(name: str, dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        raise TypeError(f"run: a record must keep a dtype that numpy has, got {dtype} for {name!r}.") from None
