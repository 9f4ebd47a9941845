"""Dry run: the first step of a learner in one lane, with checks that name the user's function at fault.

It runs on the lanes' own device. What it finds, such as shapes and dtypes, the sweep's own steps rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, vmap

from popart_func.engines.loops.arguments import check_tensors
from popart_func.learners import Learner
from popart_func.sweeps._checks import check_function
from popart_func.sweeps.inputs import difference
from popart_func.sweeps.records import Record
from popart_func.sweeps.schema import Variable
from popart_func.tree import PyTree

__all__ = ["kept_variable", "over_lanes", "recorded_first_step"]


def recorded_first_step(
    name: str, make: Callable[..., Learner], record: Mapping[str, Record], params: PyTree, x: PyTree, hparams: PyTree
) -> dict[str, Tensor]:
    """Takes a learner's first step in one lane, and returns what each record's ``of`` gives, ``[1, ...]``.

    Args:
        name: the learner's, or empty.
        make: from hyper-parameters to a learner.
        record: the records by name.
        params: the lane's parameters, leaves ``[1, ...]``.
        x: the lane's first sample, leaves ``[1, ...]``.
        hparams: the lane's hyper-parameters, leaves ``[1]``.

    Raises:
        TypeError, ValueError: a function of the user's returns something else than it should, or changes its arguments.
    """
    label = f"make_learner[{name!r}]" if name else "make_learner"

    def initial(params: Any, hparams: Any) -> PyTree:
        learner = make(**hparams)
        if not (hasattr(learner, "init") and hasattr(learner, "update")):
            raise TypeError(f"run: `{label}` must return a Learner(init, update), got {type(learner).__name__}.")
        check_function("run", f"{label}(...).init", learner.init, "params")
        check_function("run", f"{label}(...).update", learner.update, "state", "x")
        state = learner.init(params)
        if not check_tensors("run", f"`{label}(...).init(params)`", state):
            raise ValueError(f"run: `{label}(...).init(params)` must hold at least one tensor, got {state!r}.")
        return state

    def step(state: Any, x: Any, hparams: Any) -> dict[str, Tensor]:
        took = optree.tree_map(lambda leaf: leaf, state)
        result = make(**hparams).update(state, x)
        if not isinstance(result, tuple) or len(result) != 2:
            got = type(result).__name__ + (f" of length {len(result)}" if isinstance(result, tuple) else "")
            raise TypeError(f"run: `{label}(...).update` must return (state, info), got {got}.")
        new, info = result
        check_tensors("run", f"`{label}(...).update(state, x)[0]`", new)
        differ = difference(took, new)
        if differ:
            raise TypeError(
                f"run: `{label}(...).update` must return a state of the structure, shapes and dtypes that it took, "
                f"{differ[0]}, got {differ[1]}."
            )
        return {name: _quantity(name, one, new, info) for name, one in record.items()}

    with _explained(f"the first step of `{label}(...)` ran in one lane, with hyper-parameters as 0-d tensors,"):
        params, x = (optree.tree_map(torch.clone, tree) for tree in (params, x))  # or a mistake would change the user's
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
    """Applies a function of one lane to all lanes: `torch.vmap`, for every kind of tree that optree knows.

    Args:
        function: of one lane's trees.
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


def kept_variable(name: str, record: Record, one: Tensor, steps: int) -> Variable:
    """Shape and dtype of what a record keeps, found by applying its ``keep`` to a series that repeats the first step.

    Args:
        name: the record's.
        record: the record.
        one: the quantity of the first step, ``[1, ...]``.
        steps: the number of samples.

    Raises:
        TypeError, ValueError: ``keep`` or ``samples`` return something else than they should.
    """

    def keep(series: Tensor) -> Tensor:
        kept = record.keep(series)
        if not isinstance(kept, Tensor):
            raise TypeError(f"run: a record must keep a tensor, got {type(kept).__name__} for {name!r}.")
        return kept

    with _explained(f"the `keep` of `record` {name!r} ran on a series that repeats the first step's value,"):
        kept = vmap(keep)(one[:, None].repeat(1, steps, *[1] * (one.ndim - 1)))[0]
    samples = None if record.samples is None else record.samples(steps)
    if samples is not None and not (isinstance(samples, range) and kept.shape[:1] == (len(samples),)):
        raise ValueError(
            f"run: the `samples` of `record` {name!r} must give the range of samples on the leading axis of what is "
            f"kept, of shape {tuple(kept.shape)}, got {samples!r}."
        )
    return Variable(tuple(kept.shape), _numpy_dtype(name, kept.dtype), samples, record.description)


def _versions(tree: PyTree) -> list[int]:
    """PyTorch's count of in-place changes of each leaf; it keeps none for inference tensors."""
    return [leaf._version for leaf in optree.tree_leaves(tree) if not leaf.is_inference()]


def _quantity(name: str, record: Record, state: PyTree, info: PyTree) -> Tensor:
    value = record.of(state, info)
    if not isinstance(value, Tensor):
        raise TypeError(f"run: the `of` of `record` {name!r} must give a tensor, got {type(value).__name__}.")
    return value


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Adds a note to an error that PyTorch raises in the user's function: what was tried."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(f"run: {what} under torch.vmap, where `float`, `.item()` and `if` can't read a tensor.")
        raise


def _numpy_dtype(name: str, dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        raise TypeError(f"run: a record must keep a dtype that numpy has, got {dtype} for {name!r}.") from None
