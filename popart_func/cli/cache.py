"""``popart-func cache``: the compiled kernels that are kept on disk."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from popart_func.engines.native.cache import cache_directory, cache_limit, clear_cache, kept_kernels

__all__ = ["cache"]


def cache(*, clear: Annotated[bool, Parameter(negative=(), show_default=False)] = False) -> int:
    """Show where compiled kernels are kept and how much room they take, or remove them.

    The folder is $POPART_FUNC_CACHE, else popart_func in $XDG_CACHE_HOME or in ~/.cache. When kernels take more than
    $POPART_FUNC_CACHE_MB megabytes, 1000 by default, those used longest ago are removed.

    Parameters
    ----------
    clear
        Remove all kernels. Each is compiled again when it is next needed.
    """
    directory = cache_directory()
    removed = clear_cache(directory) if clear else []
    kernels = kept_kernels(directory)
    print(f"folder   {directory}")
    if clear:
        print(f"removed  {_amount(len(removed), sum(kernel.size for kernel in removed))}")
    print(
        f"kept     {_amount(len(kernels), sum(kernel.size for kernel in kernels))}, {_megabytes(cache_limit())} at most"
    )
    if clear and kernels:
        print("Another process is loading a kernel: try again when it has.")
    return int(clear and bool(kernels))


def _amount(kernels: int, size: int) -> str:
    return f"{kernels} kernel{'s' * (kernels != 1)}, {_megabytes(size)}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
