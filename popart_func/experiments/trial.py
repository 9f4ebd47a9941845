"""A learner's first step and what is recorded of it, taken once with every part looked at: whose mistake is it?

A sweep's own step takes nothing for granted that was not seen here, in one lane, on the CPU or wherever the lanes run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, vmap

from popart_func.engines.lane_scan import check_tensors
from popart_func.experiments._checks import check_function
from popart_func.experiments.grid import Variable
from popart_func.experiments.records import Record
from popart_func.experiments.starts import difference
from popart_func.learners import Learner
from popart_func.tree import PyTree

__all__ = ["measured", "variable"]


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

    def one_lane(params: Any, x: Any, hparams: Any) -> dict[str, Tensor]:
        learner = make(**hparams)
        if not isinstance(learner, Learner):
            raise TypeError(f"run: `{label}` must return a Learner(init, update), got {type(learner).__name__}.")
        check_function("run", f"{label}(...).init", learner.init, "params")
        check_function("run", f"{label}(...).update", learner.update, "state", "x")
        state = learner.init(params)
        if not check_tensors("run", f"{label}(...).init(params)", state):
            raise ValueError(f"run: `{label}(...).init(params)` must hold at least one tensor, got {state!r}.")
        result = learner.update(state, x)
        if not isinstance(result, tuple) or len(result) != 2:
            got = type(result).__name__ + (f" of length {len(result)}" if isinstance(result, tuple) else "")
            raise TypeError(f"run: `{label}(...).update` must return (state, info), got {got}.")
        new, info = result
        check_tensors("run", f"{label}(...).update(state, x)[0]", new)
        differ = difference(state, new)
        if differ:
            raise TypeError(
                f"run: `{label}(...).update` must return a state of the structure, shapes and dtypes that it took, "
                f"{differ[0]}, got {differ[1]}."
            )
        return {name: _measure(name, one, new, info) for name, one in record.items()}

    with _noted(f"the first step of `{label}(...)` was tried in one lane, with hyper-parameters as 0-d tensors,"):
        return vmap(one_lane, in_dims=(0, 0, 0 if hparams else None))(params, x, hparams)


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

    with _noted(f"the `keep` of `record` {name!r} was tried on a series of zeros,"):
        kept = vmap(keep)(one.new_zeros(1, steps, *one.shape[1:]))[0]
    samples = None if record.samples is None else record.samples(steps)
    if samples is not None and not (isinstance(samples, range) and kept.shape[:1] == (len(samples),)):
        raise ValueError(
            f"run: the `samples` of `record` {name!r} must give the range of samples on the leading axis of what is "
            f"kept, of shape {tuple(kept.shape)}, got {samples!r}."
        )
    return Variable(tuple(kept.shape), _numpy_dtype(name, kept.dtype), samples, record.description)


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
