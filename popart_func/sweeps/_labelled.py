"""Checks of labelled arrays (xarray): their dimensions, and the runs along them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xarray

from popart_func.sweeps._checks import as_names

__all__ = ["as_dims", "check_runs"]


def as_dims(
    caller: str, argument: str, values: xarray.DataArray, dims: str | Iterable[str], *, but: str | None = None
) -> list[str]:
    """Dimensions as a list: one or more, distinct, all of the array's own, and not the one named by ``but``."""
    return as_names(caller, argument, dims, [str(dim) for dim in values.dims if dim != but])


def check_runs(caller: str, argument: str, values: xarray.DataArray, over: Sequence[str], *, least: int) -> None:
    """Raises unless an array holds real numbers, and at least so many along each dimension of its runs."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{caller}: `{argument}` must be real numbers, got dtype {values.dtype}.")
    for dim in over:
        if values.sizes[dim] < least:
            raise ValueError(
                f"{caller}: `{argument}` must have at least {least} run{'s' * (least > 1)} along {dim!r}, "
                f"got {values.sizes[dim]}."
            )
