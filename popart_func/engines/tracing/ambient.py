"""Ambient settings: what changes the meaning of a function's code, beside its arguments.

A graph is valid for the settings under which it was traced.

Left out is what tracing sets itself, so that no graph depends on it: whether gradients are recorded, inference mode,
MKL-DNN, the backend of attention, argument validation of `torch.distributions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch

__all__ = ["ambient_settings", "module_modes", "without_autocast"]

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def ambient_settings() -> Hashable:
    """PyTorch's settings of this thread and process that decide what a function computes, or how exactly."""
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES
    )
    backends: Any = torch.backends
    einsum = backends.opt_einsum
    parts = (
        *(getattr(backends.mkldnn, op) for op in ("matmul", "conv", "rnn")),
        backends.cuda.matmul,
        backends.cudnn.conv,
    )
    memory: Any = torch.utils.deterministic
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        autocast,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        tuple(part.fp32_precision.replace("none", "ieee") for part in parts),  # what is not set is computed as "ieee"
        (einsum.enabled, einsum.strategy),
    )


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within it, ops run as they are: those of a graph have had their casts where they were recorded."""
    with contextlib.ExitStack() as off:
        for device in filter(torch.is_autocast_enabled, _DEVICES):
            off.enter_context(torch.autocast(device, enabled=False))
        yield


def module_modes(function: Any) -> Hashable:
    """Which parts of a module are in training; None for any other function, whose modules are read while tracing."""
    if not isinstance(function, torch.nn.Module):
        return None
    return tuple(module.training for module in function.modules())
