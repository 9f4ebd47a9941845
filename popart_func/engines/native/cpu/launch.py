"""A loaded kernel as a function."""

from __future__ import annotations

import ctypes

import torch

from popart_func.engines.native.target import KernelArguments, Launch

__all__ = ["launcher"]


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
    """A loaded kernel as a function; ``torch.get_num_threads()`` threads run it."""

    def launch(arguments: KernelArguments) -> int:
        inputs, lane_strides, time_strides, outputs, lanes, steps = arguments
        run = _KernelArguments(
            (ctypes.c_void_p * len(inputs))(*(leaf.data_ptr() for leaf in inputs)),
            (ctypes.c_int64 * len(inputs))(*lane_strides),
            (ctypes.c_int64 * len(inputs))(*time_strides),
            (ctypes.c_void_p * len(outputs))(*(leaf.data_ptr() for leaf in outputs)),
            lanes,
            steps,
        )
        return int(library.run(ctypes.byref(run), torch.get_num_threads()))

    return launch
