"""Records: what a sweep keeps of each lane, such as the full curve of the error, or its mean over the last samples.

A `Record` holds two functions. ``of(state, info)`` runs inside the step, in one lane, and gives a quantity, a tensor of
any shape. ``keep(series)`` runs after the last step: a pure function of one lane's series of that quantity,
``[time, ...]``, in PyTorch, under `torch.vmap` over lanes. So the series of one chunk of lanes are in memory at a time,
and only what is kept goes to the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._checks import check_count
from popart_func._typing import Float, Num, Shaped
from popart_func.sweeps._checks import check_function

__all__ = ["Record", "as_record", "error", "every", "last", "mean", "smoothed"]

Quantity = Callable[[Any, Any], Tensor]
"""``(state, info) -> tensor``, of the state after a learner's update and its info."""


def error(state: Any, info: Any) -> Float[Tensor, ""]:
    """The error of a step: the mean of ``info.error``, ``|f(x) − y|`` before the gradient step, over outputs and batch.

    Raises:
        TypeError: a learner's info has no such tensor of floats.
    """
    found = getattr(info, "error", None)
    if isinstance(found, Tensor) and found.is_floating_point() and found.numel():
        return found.mean()
    got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    got = got if hasattr(info, "error") else f"none in {type(info).__name__}"
    raise TypeError(
        f"records.error: a learner's `info.error` must be a tensor of floats, and not empty, got {got}. Say what to "
        f"record of this learner instead, such as every(of=lambda state, info: info)."
    )


class Record(NamedTuple):
    """One variable of a sweep's result.

    Attributes:
        of: ``of(state, info)``, the quantity of a step.
        keep: from one lane's series of that quantity, ``[time, ...]``, to what is kept.
        samples: the samples that ``keep`` keeps, given their number, where it leaves a time axis in front; else None.
        description: one line for the files.
        gaps: whether a NaN in the quantity means that a step has no value, as the return of an episode that has not
            ended. Else a lane diverges there (``diverged_at``), as it does at infinity in any case.
    """

    of: Quantity
    keep: Callable[[Tensor], Tensor]
    samples: Callable[[int], range] | None
    description: str
    gaps: bool = False


def every(n: int = 1, *, of: Quantity = error, gaps: bool = False) -> Record:
    """Keeps every n-th sample, from the first; by default the full curve.

    >>> record = every(3)
    >>> record.keep(torch.arange(7.0)), list(record.samples(7))
    (tensor([0., 3., 6.]), [0, 3, 6])
    """
    check_count("every", "n", n)
    description = f"{_name(of)} of every sample" if n == 1 else f"{_name(of)} of one sample in {n}"
    return Record(of, partial(_every, n), partial(_samples, n, 1), description, gaps)


def smoothed(window: int = 10, n: int = 1, *, of: Quantity = error, gaps: bool = False) -> Record:
    """Keeps every n-th entry of the moving average without its ends; entry i averages samples i to i + window - 1.

    With ``gaps`` it averages those that have a value, and is NaN where none has.

    >>> record = smoothed(2)
    >>> record.keep(torch.tensor([1.0, 2.0, 3.0, 7.0])), list(record.samples(4))
    (tensor([1.5000, 2.5000, 5.0000]), [0, 1, 2])
    """
    check_count("smoothed", "window", window)
    check_count("smoothed", "n", n)
    description = f"{_name(of)}, averaged over {window} samples from this one on"
    return Record(of, partial(_smoothed, window, n, gaps), partial(_samples, n, window), description, gaps)


def last(n: int, *, of: Quantity = error, gaps: bool = False) -> Record:
    """Keeps the mean over the last n samples: one number a lane for each entry of the quantity.

    With ``gaps`` it is the mean of those that have a value, and NaN where none has.

    >>> last(2).keep(torch.tensor([9.0, 1.0, 2.0]))
    tensor(1.5000)
    """
    check_count("last", "n", n)
    return Record(of, partial(_mean_of_last, n, gaps), None, f"{_name(of)}, mean over the last {n} samples", gaps)


def mean(*, of: Quantity = error, gaps: bool = False) -> Record:
    """Keeps the mean over all samples: one number a lane for each entry of the quantity.

    With ``gaps`` it is the mean of those that have a value, and NaN where none has.

    >>> mean().keep(torch.tensor([9.0, 1.0, 2.0]))
    tensor(4.)
    """
    return Record(of, partial(_mean_of_last, None, gaps), None, f"{_name(of)}, mean over all samples", gaps)


def as_record(name: str, record: Record | Callable[[Tensor], Tensor]) -> Record:
    """A record as it is; any other function becomes the ``keep`` of a record of the error."""
    if not callable(record) and not isinstance(record, Record):
        raise TypeError(
            f"run: `record` must map names to records, such as every(10), or to functions of a series, "
            f"got {type(record).__name__} for {name!r}."
        )
    found = record if isinstance(record, Record) else Record(error, record, None, f"error, {_name(record)}")
    check_function("run", f"record[{name!r}].of", found.of, "state", "info")
    check_function("run", f"record[{name!r}].keep", found.keep, "series")
    if found.samples is not None:
        check_function("run", f"record[{name!r}].samples", found.samples, "steps")
    return found


def _every(n: int, series: Shaped[Tensor, "time ..."]) -> Shaped[Tensor, "kept ..."]:
    return series[::n]


def _smoothed(window: int, n: int, gaps: bool, series: Num[Tensor, "time ..."]) -> Num[Tensor, "kept ..."]:
    ends = series.shape[0] - window + 1
    if ends < 1:
        raise ValueError(f"smoothed: `window` must be at most the {series.shape[0]} samples, got {window}.")
    value, counted = (series.nan_to_num(0, math.inf, -math.inf), ~series.isnan()) if gaps else (series, None)
    total = _sum_of_window(value, window, n)
    return (total / (window if counted is None else _sum_of_window(counted, window, n))).to(_floating(series))


def _sum_of_window(series: Tensor, window: int, n: int) -> Tensor:
    ends = series.shape[0] - window + 1
    total = series[:ends:n].double()
    for shift in range(1, window):
        total = total + series[shift : ends + shift : n]
    return total


def _mean_of_last(n: int | None, gaps: bool, series: Num[Tensor, "time ..."]) -> Num[Tensor, "..."]:
    if n is not None and n > series.shape[0]:
        raise ValueError(f"last: `n` must be at most the {series.shape[0]} samples, got {n}.")
    values = series[-(n or 0) :].double()
    return (values.nanmean(0) if gaps else values.mean(0)).to(_floating(series))


def _samples(n: int, window: int, steps: int) -> range:
    return range(0, steps - window + 1, n)


def _floating(series: Tensor) -> torch.dtype:
    return series.dtype if series.is_floating_point() else torch.get_default_dtype()


def _name(function: Callable[..., Any]) -> str:
    name: str = getattr(function, "__name__", type(function).__name__)
    return name.replace("_", " ")
