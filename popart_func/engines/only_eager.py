"""Finds what only the eager engine can run: tensors without memory of their own, and contexts that see each operation.

A compiled engine reads and writes the memory of tensors while PyTorch sees nothing of it. A tensor without memory would
crash the process, and a context that follows each operation, such as a derivative or a tracer, would miss the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from popart_func._torch import (
    dispatch_modes,
    function_modes,
    is_forward_derivative_on,
    is_functorch_wrapped_tensor,
    is_jit_tracing,
    is_make_fx_tracing,
    is_transforming,
)
from popart_func.engines.tracing.recorder import is_recording
from popart_func.engines.tracing.traced import Traced

__all__ = ["FREED", "why_context_needs_eager", "why_tensor_needs_eager"]

FREED = "it can't read a tensor whose memory has been freed, or was never allocated"
"""A reason for which `eager` may fail too: PyTorch reads such a tensor without a check."""

_TRANSFORM = "it can't run inside a transform such as torch.vmap or torch.func.grad"
_RECORDING = "it can't run on tensors that are being traced, as inside a step or to_jax_function: they have no values"


def why_context_needs_eager() -> str | None:
    """Why no compiled engine can run in the present context of this thread, or None."""
    if is_recording():
        return _RECORDING
    if torch.compiler.is_dynamo_compiling() or is_jit_tracing() or is_make_fx_tracing():
        return "it can't run inside a function that torch.compile, torch.jit.trace or make_fx traces"
    if is_transforming():
        return _TRANSFORM
    if is_forward_derivative_on():
        return "no forward-mode derivative flows through it, and one is being computed"
    if torch.is_anomaly_enabled():
        return "anomaly mode must see each gradient"
    modes = [*dispatch_modes(), *function_modes()]
    if modes:
        return f"{type(modes[-1]).__name__} must see each operation"
    return None


def why_tensor_needs_eager(tensor: Tensor) -> str | None:
    """Why no compiled engine can read a tensor, or None."""
    wrapped = is_functorch_wrapped_tensor(tensor)
    plain = type(tensor) is Tensor and not wrapped and tensor.layout == torch.strided and not tensor.is_nested
    if plain and _has_memory(tensor):
        return None  # as nearly all are: a short call asks this of many
    if isinstance(tensor, Traced):
        return _RECORDING
    if wrapped:
        return _TRANSFORM
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it can't read a {type(tensor).__name__}, a subclass of torch.Tensor"
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"it can't read a tensor whose layout is {layout}"
    if not _has_memory(tensor):
        return FREED
    return None


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage holds all elements: one that was resized to 0 does not, and a symbolic zero has none.

    On `meta` no tensor has values, and the device itself is refused.
    """
    elements = tensor.numel()
    if elements == 0 or tensor.is_meta:
        return True
    if not tensor.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + elements) * tensor.itemsize
    return tensor.data_ptr() != 0 and tensor.untyped_storage().nbytes() >= needed
