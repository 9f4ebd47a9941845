"""CUDA source to machine code through NVRTC, the compiler that comes with PyTorch's CUDA builds; it needs no toolkit.

NVRTC's C interface is public and stable. `torch.cuda._compile_kernel` is neither; it needs a toolkit's headers, and its
integers have 32 bits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from popart_func.engines.native.cache import cache_directory, cache_key, keep_source, shares_cache
from popart_func.engines.native.target import BuildError

__all__ = ["compile_cubin", "why_no_nvrtc"]

OPTIONS = ("--std=c++17", "--fmad=false")
"""IEEE arithmetic: no contraction. NVRTC computes square roots, quotients and subnormal numbers exactly by default."""


def why_no_nvrtc() -> str | None:
    """Why nothing can be compiled for CUDA here, or None."""
    if _library() is None:
        return "NVRTC, CUDA's run-time compiler, was not found: pip install nvidia-cuda-nvrtc, or set CUDA_HOME."
    return None


@shares_cache
def compile_cubin(source: str, architecture: str) -> bytes:
    """Compiles a kernel, or reads it from the cache on disk.

    Args:
        source: CUDA C++ without includes.
        architecture: such as ``"sm_90"``.

    Raises:
        BuildError: there is no NVRTC, or it refused the kernel.
    """
    library = _library()
    if library is None:
        raise BuildError(f"native: {why_no_nvrtc()}")
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    options = (f"--gpu-architecture={architecture}", *OPTIONS)
    parts = ("nvrtc", f"{major.value}.{minor.value}", *options, source)
    kept = cache_directory() / f"{cache_key(parts)}.cubin"
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")
        made.write_bytes(_compile(library, source, options))
        os.replace(made, kept)
    keep_source(kept.with_suffix(".cu"), source)
    return kept.read_bytes()


def _compile(library: ctypes.CDLL, source: str, options: tuple[str, ...]) -> bytes:
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    _check(library, created)
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), array):
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, library, program)
            raise BuildError(f"native: NVRTC {' '.join(options)} failed:\n{log.decode(errors='replace')[-4000:]}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, library, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Any, get: Any, library: ctypes.CDLL, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(library, size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, get(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BuildError(f"native: NVRTC failed: {library.nvrtcGetErrorString(result).decode()}.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _candidates() -> Iterator[str]:
    """Where NVRTC of the version that PyTorch was built with may be: loaded already, in a wheel, or in a toolkit."""
    version = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{version}" if version else "libnvrtc.so"
    yield name
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (wheels.submodule_search_locations if wheels else None) or ()]
    patterns = [f"*/lib/{name}*", f"*/lib64/{name}*"]
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [(folder, pattern) for folder in folders for pattern in patterns]
    places += [(Path(torch.__file__).parent, "lib/libnvrtc[-.]*"), (Path(toolkit), f"lib64/{name}*")]
    for folder, pattern in places:
        yield from (str(path) for path in sorted(folder.glob(pattern)) if "builtins" not in path.name)
