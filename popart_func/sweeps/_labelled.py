"""Checks of labelled arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xarray

from popart_func.sweeps._checks import check_names

__all__ = ["check_dims", "check_runs"]


def check_dims(
    caller: str, argument: str, values: xarray.DataArray, dims: str | Iterable[str], *, but: str | None = None
) -> list[str]:
    """The dimensions as a list, if there are some, distinct and all of the array's (``but`` one)."""
    return check_names(caller, argument, dims, [str(dim) for dim in values.dims if dim != but])


def check_runs(caller: str, argument: str, values: xarray.DataArray, over: Sequence[str], *, least: int) -> None:
    """Raises unless a labelled array has numbers, and enough of them along the dimensions of its runs."""
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{caller}: `{argument}` must be real numbers, got dtype {values.dtype}.")
    for dim in over:
        if values.sizes[dim] < least:
            raise ValueError(
                f"{caller}: `{argument}` must have at least {least} run{'s' * (least > 1)} along {dim!r}, "
                f"got {values.sizes[dim]}."
            )
