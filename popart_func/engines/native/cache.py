"""The cache of compiled kernels on disk, which the CPU and CUDA share; each kernel's source lies beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from popart_func.engines.native.target import BuildError

__all__ = ["cache_directory", "cache_key", "keep_source"]


def cache_key(parts: Iterable[str]) -> str:
    """The name of a kernel: a hash of its source and of everything else that decides what comes of it."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def keep_source(path: Path, source: str) -> None:
    """Writes a kernel's source beside it, for people to read, unless it is there.

    The engine never reads it: where it can't be written (a read-only or a full cache), nothing is raised.
    """
    with contextlib.suppress(OSError):
        if path.exists():
            return
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(source)
            os.replace(made, path)  # at once, so that no one sees a part of it
        except OSError:
            os.unlink(made)


def cache_directory() -> Path:
    """Where kernels are kept: ``$POPART_FUNC_CACHE``, else the user's cache directory. Only the user may write there.

    Without a home that can be written to, it is a directory of the user's own in the temporary one.

    Raises:
        BuildError: ``$POPART_FUNC_CACHE`` can't be a directory.
        PermissionError: it belongs to someone else, or others may write to it: a kernel in it could be theirs.
    """
    given = os.environ.get("POPART_FUNC_CACHE")
    directory = Path(given or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not given:
        directory /= "popart_func"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if given:
            raise BuildError(
                f"native: POPART_FUNC_CACHE must name a directory that can be made, got {given}: {error.strerror}."
            ) from error
        directory = Path(tempfile.gettempdir()) / f"popart_func-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"native: the cache {directory} must belong to you, and only you may write to it: "
            f"run `chmod go-w {directory}`, or set POPART_FUNC_CACHE to another directory."
        )
    return directory
