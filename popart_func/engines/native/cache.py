"""The cache of compiled kernels on disk, which the CPU and CUDA share.

Where: ``$POPART_FUNC_CACHE``, else ``popart_func`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A kernel is a few files of
one name: what was compiled, its checksum and, for people to read, its source. Kernels used last take up to
``$POPART_FUNC_CACHE_MB`` megabytes, 1000 by default; the others are removed. ``popart-func cache`` shows the cache, and
``popart-func cache --clear`` empties it.

Several processes may share a cache: one removes kernels only while no other is between looking for a kernel and having
loaded it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from popart_func.engines.native.target import BuildError

__all__ = [
    "KeptKernel",
    "cache_directory",
    "cache_key",
    "cache_limit",
    "clear_cache",
    "keep_source",
    "kept_kernels",
    "shares_cache",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAME = re.compile(r"[0-9a-f]{32}(?=[.\w])")
"""How the names of a kernel's files begin. Nothing else is ever removed."""


class KeptKernel(NamedTuple):
    """A kernel on disk.

    Attributes:
        files: its files, the compiled one last: a process that is ended while it removes them leaves no kernel that
            looks whole. A compilation that was killed has left a folder.
        size: of all files, in bytes.
        used: when it was last used, in seconds since 1970.
    """

    files: list[Path]
    size: int
    used: float


def cache_key(parts: Iterable[str]) -> str:
    """The name of a kernel: a hash of its source and of everything else that decides what comes of it."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def keep_source(path: Path, source: str) -> None:
    """Writes a kernel's source beside it, for people to read; if it is there, notes in its date that it was used.

    The engine never reads it: where it can't be written (a read-only or a full cache), nothing is raised.
    """
    with contextlib.suppress(OSError):
        if path.exists():
            os.utime(path)
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


def cache_limit() -> int:
    """The most bytes that kernels may take on disk.

    Raises:
        BuildError: ``$POPART_FUNC_CACHE_MB`` is no number of megabytes.
    """
    given = os.environ.get("POPART_FUNC_CACHE_MB") or "1000"
    if not given.isdecimal():
        raise BuildError(f"native: POPART_FUNC_CACHE_MB must be a whole number of megabytes, got {given!r}.")
    return int(given) * 10**6


def kept_kernels(directory: Path) -> list[KeptKernel]:
    """The kernels in a cache, those used longest ago first."""
    found: dict[str, list[tuple[Path, int, float]]] = {}
    for entry in os.scandir(directory):
        name = _NAME.match(entry.name)
        if name:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                parts = os.scandir(entry) if entry.is_dir(follow_symlinks=False) else ()
                sizes = [part.stat(follow_symlinks=False).st_size for part in (entry, *parts)]
                used = entry.stat(follow_symlinks=False).st_mtime
                found.setdefault(name.group(), []).append((Path(entry.path), sum(sizes), used))
    kernels = [
        KeptKernel(
            sorted((path for path, _, _ in files), key=lambda path: path.suffix in (".so", ".cubin")),
            sum(size for _, size, _ in files),
            max(used for _, _, used in files),
        )
        for files in found.values()
    ]
    return sorted(kernels, key=lambda kernel: kernel.used)


def clear_cache(directory: Path, limit: int = 0) -> list[KeptKernel]:
    """Removes the kernels used longest ago, until the others take no more than ``limit`` bytes; waits for no process.

    Returns:
        The kernels that were removed; none if another process is loading one just now.

    Raises:
        OSError: a file can't be removed.
    """
    removed = []
    with _locked(directory, exclusive=True) as alone:
        kernels = kept_kernels(directory) if alone else []
        size = sum(kernel.size for kernel in kernels)
        for kernel in kernels:
            if size <= limit:
                break
            for file in kernel.files:
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink(missing_ok=True)
            removed.append(kernel)
            size -= kernel.size
    return removed


def shares_cache(build: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a function that finds or makes a kernel and reads it: meanwhile, no process removes one.

    If the function has added something to the cache, the cache is then cut down to `cache_limit`.
    """

    @functools.wraps(build)
    def shared(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        directory, limit = cache_directory(), cache_limit()
        before = directory.stat().st_mtime_ns
        with _locked(directory, exclusive=False):
            kernel = build(*args, **kwargs)
        if directory.stat().st_mtime_ns != before:  # unchanged where a kernel was found, which is to stay fast
            with contextlib.suppress(OSError):
                clear_cache(directory, limit)
        return kernel

    return shared


@contextlib.contextmanager
def _locked(directory: Path, *, exclusive: bool) -> Iterator[bool]:
    """Locks a directory, shared or, without waiting, exclusively; yields whether it is locked.

    Where the file system has no locks, kernels are used without one, and none is removed.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            locked = True
        except OSError:
            locked = False
        try:
            yield locked
        finally:
            if locked:  # closing is not enough: a process that was forked meanwhile has the descriptor, too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
