"""Loads and launches kernels through the CUDA driver's public C interface."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from popart_func.engines.native.cuda.nvrtc import compile_cubin
from popart_func.engines.native.cuda.source import CudaSource
from popart_func.engines.native.target import BuildError, KernelArguments, Launch

__all__ = ["block_size", "cuda_kernel", "lanes_in_teams", "pack", "shared_memory"]

# Members of the driver's enumeration CUfunction_attribute.
MAX_DYNAMIC_SHARED_SIZE_BYTES, PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024))


def cuda_kernel(source: CudaSource, device: torch.device) -> Launch:
    """Compiles and loads a kernel.

    Raises:
        BuildError: there is no NVRTC, or it or the driver refused the kernel.
    """
    properties = torch.cuda.get_device_properties(device)
    image = compile_cubin(source.text, f"sm_{properties.major}{properties.minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the device's context this thread's
        driver = _driver()
        _check(driver.cuModuleLoadData(ctypes.byref(module), image))
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, b"run_lanes"))
        _check(driver.cuFuncSetAttribute(function, PREFERRED_SHARED_MEMORY_CARVEOUT, 100 if source.shared else 0))
        if source.shared:
            _check(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, source.shared))

    def launch(arguments: KernelArguments) -> int:
        threads, blocks = source.threads, arguments.lanes
        if not source.team:
            threads = block_size(arguments.lanes, threads, properties.multi_processor_count)
            blocks = -(-arguments.lanes // threads)
        if source.scratch:
            blocks = min(blocks, properties.multi_processor_count)  # shared memory is full, and holds no second block
        with torch.cuda.device(device):
            bad = torch.zeros(1, dtype=torch.int32, device=device)
            scratch = torch.empty(blocks * source.scratch, dtype=torch.uint8, device=device)
            packed = pack(arguments, bad, scratch)
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
            stream = torch.cuda.current_stream(device).cuda_stream
            grid = (blocks, 1, 1, threads, 1, 1)
            _check(_driver().cuLaunchKernel(function, *grid, source.shared, stream, pointers, None))
            return int(bad.item()) if source.checked else 0

    return launch


def lanes_in_teams(device: torch.device) -> int:
    """Up to how many lanes a team for each is faster than a thread for each: while processors are left over.

    On an H100 teams took 2.3 against 2.9 ns per lane-step with 2000 lanes, and 2.4 against 1.6 with 4000.
    """
    return 20 * torch.cuda.get_device_properties(device).multi_processor_count


def pack(arguments: KernelArguments, bad: Tensor, scratch: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """The kernel's argument: the members of its `KernelArguments`, each eight bytes wide.

    ``bad`` takes the bits of errors, ``scratch`` the buffers for which shared memory is too small.
    """
    members = [
        *(leaf.data_ptr() for leaf in arguments.inputs),
        *arguments.lane_strides,
        *arguments.time_strides,
        *(leaf.data_ptr() for leaf in arguments.outputs),
        arguments.lanes,
        arguments.steps,
        bad.data_ptr(),
        scratch.data_ptr(),
    ]
    return (ctypes.c_int64 * len(members))(*members)


def block_size(lanes: int, most: int, multiprocessors: int) -> int:
    """Threads of a block where each runs a lane: few enough that every multiprocessor gets lanes.

    >>> block_size(1000, 128, 132), block_size(10**6, 128, 132)
    (8, 128)
    """
    size = 1
    while size < most and size * multiprocessors < lanes:
        size *= 2
    return size


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    uint, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[uint] * 7, pointer, pointer, pointer]
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    return driver


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise BuildError(f"native: CUDA failed: {(text.value or b'an unknown error').decode()}.")
