"""C++ source to a loaded kernel, through the system's compiler and the cache on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from popart_func.engines.compiler import compiler, why_no_compiler
from popart_func.engines.native.cache import cache_directory, cache_key, keep_source, shares_cache
from popart_func.engines.native.target import BuildError

__all__ = ["ask_compiler", "build"]

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
"""IEEE arithmetic: no re-association, no contraction. Only error codes and flags that nothing reads are given up."""


_locks: dict[tuple[int, Path], threading.Lock] = {}
"""One for each kernel, so that of several threads one compiles it; of each process, since a fork would inherit it."""


@shares_cache
def build(source: str) -> ctypes.CDLL:
    """Compiles and loads a kernel, or loads it from the cache.

    Raises:
        BuildError: the compiler refused it, or the cache can't be written to.
    """
    command = [*_command(), *FLAGS]
    library = cache_directory() / f"{cache_key((*command, ask_compiler()(), source))}.so"
    with _locks.setdefault((os.getpid(), library), threading.Lock()):
        if not _is_whole(library):
            _compile(command, source, library)
    keep_source(library.with_suffix(".cpp"), source)
    try:
        kernel = ctypes.CDLL(str(library))
        kernel.run  # noqa: B018  # raises if the kernel lacks its entry
    except (OSError, AttributeError) as error:
        raise BuildError(f"native: {command[0]} made a kernel that can't be loaded: {error}") from error
    return kernel


def _is_whole(library: Path) -> bool:
    """Whether a kernel on disk is what was written: loading a damaged one would end the process."""
    try:
        return library.with_suffix(".sha256").read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _compile(command: list[str], source: str, library: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=library.stem) as directory:
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
    if not made.exists():
        raise BuildError(_no_compiler(command[0], "wrote no kernel"))
    digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
    os.replace(made, library)
    os.replace(digest, library.with_suffix(".sha256"))


def _command() -> tuple[str, ...]:
    found = compiler()
    if found is None:
        raise BuildError(f"native: {why_no_compiler()}")
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    return (*found, native, *wide)


def _no_compiler(program: str, why: str) -> str:
    return f"native: {program} is taken for the C++ compiler, but {why}: set CXX to a C++ compiler, or unset it."


def ask_compiler() -> Callable[[], str]:
    """Begins to ask the compiler for its version and for what ``-march=native`` means here; call the result to wait.

    The answer is a part of the kernel's name, since unlike machines may share a cache. Asking takes as long as tracing
    a small step, so both can be done at once.
    """
    return _asked(_command(), os.getpid())


@functools.cache
def _asked(command: tuple[str, ...], process: int) -> Callable[[], str]:
    """Asks once in each process: a fork shares the pipe with the process that it comes from."""
    query = [*command, "-E", "-dM", "-x", "c++", os.devnull]
    try:
        asked = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError as error:  # an executable file that is no program
        raise BuildError(_no_compiler(command[0], f"can't be run ({error.strerror})")) from error
    lock = threading.Lock()  # only one thread may read the answer

    @functools.cache
    def answer() -> str:
        return asked.communicate()[0]

    def wait() -> str:
        with lock:
            return answer()

    return wait
