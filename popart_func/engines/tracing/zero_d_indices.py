"""Indexing by a 0-d integer tensor, as in ``q[action]``, without reading its value.

PyTorch reads such an index as a number, which a traced tensor can't give. Under `torch.vmap` it does not read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ZeroDIndices"]


class ZeroDIndices(TorchFunctionMode):
    """Gives each 0-d index an axis of length 1, and removes that axis from the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return func(*args, **(kwargs or {}))
        x, index, *value = args
        index = index if isinstance(index, tuple) else (index,)
        if not any(_is_zero_d(part) for part in index):
            return func(*args)
        if any(isinstance(part, Tensor) and part.ndim for part in index):
            # It is broadcast against the other tensors, which hides its axis.
            return func(x, tuple(part.reshape(1) if _is_zero_d(part) else part for part in index), *value)
        if Ellipsis in [part for part in index if not isinstance(part, Tensor)]:
            at = next(position for position, part in enumerate(index) if part is Ellipsis)
            missing = x.ndim - sum(part is not None and part is not Ellipsis for part in index)
            index = (*index[:at], *(slice(None) for _ in range(missing)), *index[at + 1 :])
        part = x[tuple(slice(None) if _is_zero_d(part) else part for part in index)]
        kept = [part for part in index if not isinstance(part, int)]
        axes = [(axis, part) for axis, part in enumerate(kept) if _is_zero_d(part)]
        if not value:
            for axis, position in reversed(axes):
                part = part[(*(slice(None) for _ in range(axis)), position.reshape(1))].squeeze(axis)
            return part
        new = value[0].to(x.dtype) if isinstance(value[0], Tensor) else value[0]
        if len(axes) == 1:  # without `movedim`, behind which engines would copy the whole tensor
            ((axis, position),) = axes
            after = part.ndim - axis - 1
            if isinstance(new, Tensor) and new.ndim > after:
                new = new.unsqueeze(new.ndim - after)
            part[(*(slice(None) for _ in range(axis)), position.reshape(1))] = new
            return None
        front = part.movedim([axis for axis, _ in axes], list(range(len(axes))))
        front[tuple(position.reshape(1) for _, position in axes)] = new
        return None


def _is_zero_d(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 0 and not part.is_floating_point() and part.dtype != torch.bool
