"""Ambient settings: what changes the meaning of a function's code, beside its arguments.

A graph is valid for the settings under which it was traced.

Left out is what tracing sets itself, so that no graph depends on it: whether gradients are recorded, inference mode,
MKL-DNN, the backend of attention, argument validation of `torch.distributions`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

__all__ = ["ambient_settings", "module_modes"]

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def ambient_settings() -> Hashable:
    """PyTorch's settings of this thread and process that decide what a function computes, or how exactly."""
    autocast = tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in _DEVICES
    )
    einsum: Any = torch.backends.opt_einsum
    memory: Any = torch.utils.deterministic
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        autocast,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        (einsum.enabled, einsum.strategy),
    )


def module_modes(function: Any) -> Hashable:
    """Which parts of a module are in training; None for any other function, whose modules are read while tracing."""
    if not isinstance(function, torch.nn.Module):
        return None
    return tuple(module.training for module in function.modules())
