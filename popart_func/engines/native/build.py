"""C++ source to a loaded kernel, through the system's compiler and a cache on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from popart_func.engines.compiler import compiler, why_no_compiler
from popart_func.engines.lane_scan import UnsupportedError

__all__ = ["BuildError", "ask_compiler", "build", "cache_directory", "why_not_here"]

FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-pthread",
)
"""IEEE arithmetic: no re-association, no contraction. What is given up are error codes and flags that no one reads."""


class BuildError(UnsupportedError):
    """The C++ compiler refused a kernel: a bug here, or a compiler that is too old."""


def why_not_here() -> str | None:
    """Why no kernel can be built here, or None."""
    if sys.platform == "win32":
        return "it needs a C++ compiler with GCC's command line, which Windows lacks."
    return why_no_compiler()


def build(source: str) -> ctypes.CDLL:
    """Compiles and loads a kernel, or loads it from the cache.

    Raises:
        BuildError: the compiler refused it, or the cache can't be written to.
    """
    command = [*_command(), *FLAGS]
    parts = (*command, ask_compiler()(), source)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = cache_directory() / f"{key}.so"
    if not _is_whole(library):
        _compile(command, source, library)
    try:
        kernel = ctypes.CDLL(str(library))
        kernel.run  # noqa: B018  # it has what is called
    except (OSError, AttributeError) as error:
        raise BuildError(f"native: {command[0]} made a kernel that can't be loaded: {error}") from error
    return kernel


def _is_whole(library: Path) -> bool:
    """Whether a kernel on disk is what was written: a damaged one would take the process with it."""
    try:
        return library.with_suffix(".sha256").read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _compile(command: list[str], source: str, library: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            _compile_in(Path(directory), command, source, library)
    except OSError as error:
        raise BuildError(
            f"native: no kernel can be kept in {library.parent}: {error}. Set POPART_FUNC_CACHE to another directory."
        ) from error


def _compile_in(directory: Path, command: list[str], source: str, library: Path) -> None:
    source_file, made, digest = (directory / name for name in ("kernel.cpp", "kernel.so", "kernel.sha256"))
    source_file.write_text(source)
    result = subprocess.run([*command, "-o", str(made), str(source_file)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"native: {' '.join(command)} failed:\n{result.stderr[-4000:]}")
    digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
    os.replace(made, library)
    os.replace(digest, library.with_suffix(".sha256"))


def cache_directory() -> Path:
    """Where kernels are kept: ``$POPART_FUNC_CACHE``, else the user's cache directory. Only the user may write there.

    Without a home that can be written to it is a directory of the user's own in the temporary one.

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


def _command() -> tuple[str, ...]:
    found = compiler()
    if found is None:
        raise BuildError(f"native: {why_no_compiler()}")
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    return (*found, native, *wide)


def ask_compiler() -> Callable[[], str]:
    """Begins to ask the compiler for its version and for what ``-march=native`` means here.

    It takes as long as tracing a small step, which can be done meanwhile. A cache may be shared by unlike machines.
    """
    return _asked(_command())


@functools.cache
def _asked(command: tuple[str, ...]) -> Callable[[], str]:
    query = [*command, "-E", "-dM", "-x", "c++", os.devnull]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return functools.cache(lambda: process.communicate()[0])
