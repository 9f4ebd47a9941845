"""Checks of arguments: what can be known is checked where it enters, and nothing is ever asked of a traced value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["check_scalar", "is_known"]


def is_known(*tensors: Tensor) -> bool:
    """Whether the tensors' values can be read here at no cost: on the CPU, outside of every transform and trace."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return False
    return not any(
        isinstance(tensor, FakeTensor) or is_functorch_wrapped_tensor(tensor) or tensor.device.type != "cpu"
        for tensor in tensors
    )


def check_scalar(
    caller: str,
    name: str,
    value: float | Tensor,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Raises unless a hyper-parameter is a number within bounds, or a real 0-d tensor (whose value is left alone)."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{caller}: `{name}` must be a number or a real 0-d tensor, got a tensor of shape {tuple(value.shape)} and "
                f"dtype {value.dtype}. For one value per lane, take the lanes apart with torch.vmap."
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: `{name}` must be a number or a 0-d tensor, got {type(value).__name__}.")
    fits = (
        (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
        and value == value
    )
    if not fits:
        low = "" if above is None and least is None else f"> {above}" if least is None else f">= {least}"
        high = "" if below is None and most is None else f"< {below}" if most is None else f"<= {most}"
        expected = " and ".join(part for part in (low, high) if part)
        raise ValueError(f"{caller}: `{name}` must be {expected}, got {value}.")
