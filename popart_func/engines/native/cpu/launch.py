"""A loaded kernel as a function."""

from __future__ import annotations

import ctypes
import time

import torch

from popart_func.engines.native.target import KernelArguments, Launch

__all__ = ["launcher"]

SLICE = 0.2
"""Seconds after which a long run gives way to Python, which may have to end it."""


class _KernelArguments(ctypes.Structure):
    """`KernelArguments` of kernel.hpp."""

    _fields_ = [
        ("inputs", ctypes.POINTER(ctypes.c_void_p)),
        ("lane_strides", ctypes.POINTER(ctypes.c_int64)),
        ("time_strides", ctypes.POINTER(ctypes.c_int64)),
        ("outputs", ctypes.POINTER(ctypes.c_void_p)),
        ("lanes", ctypes.c_int64),
        ("steps", ctypes.c_int64),
    ]


def launcher(library: ctypes.CDLL) -> Launch:
    """A loaded kernel as a function; ``torch.get_num_threads()`` threads run it.

    A long run goes in slices of time steps, each of which begins with the carry that the one before has ended with:
    Python handles Ctrl-C between two of them. Values are the same to the bit. The time of a step is taken from the run
    before, if that had as many lanes and threads; else the first slice is one step.
    """
    measured: dict[tuple[int, int], float] = {}  # seconds of a step, by lanes and threads: the last ones

    def launch(arguments: KernelArguments) -> int:
        threads = torch.get_num_threads()
        key, bad, start = (arguments.lanes, threads), 0, 0
        while start < arguments.steps:
            seconds = measured.get(key)
            steps = 1 if seconds is None else max(1, int(min(SLICE / seconds, arguments.steps - start)))
            began = time.perf_counter()
            bad |= int(library.run(ctypes.byref(_slice(arguments, start, steps)), threads))
            measured.clear()
            measured[key] = max((time.perf_counter() - began) / steps, 1e-9)
            start += steps
        return bad

    return launch


def _slice(arguments: KernelArguments, start: int, steps: int) -> _KernelArguments:
    """The argument of a kernel for some of the time steps; all but the first ones go on from the carry in outputs."""
    inputs, lane_strides, time_strides, outputs, lanes, _, carries = arguments
    begins, ends = [leaf.data_ptr() for leaf in inputs], [leaf.data_ptr() for leaf in outputs]
    if start:
        begins = [
            begin + start * stride * leaf.itemsize
            for begin, stride, leaf in zip(begins, time_strides, inputs, strict=True)
        ]
        begins[:carries] = ends[:carries]
        lane_strides = [*(leaf[0].numel() for leaf in outputs[:carries]), *lane_strides[carries:]]
        ends[carries:] = [leaf.data_ptr() + start * leaf.stride(0) * leaf.itemsize for leaf in outputs[carries:]]
    return _KernelArguments(
        (ctypes.c_void_p * len(begins))(*begins),
        (ctypes.c_int64 * len(begins))(*lane_strides),
        (ctypes.c_int64 * len(begins))(*time_strides),
        (ctypes.c_void_p * len(ends))(*ends),
        lanes,
        steps,
    )
