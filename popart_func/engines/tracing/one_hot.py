"""``one_hot`` by comparison, so that the values of its classes are not read.

PyTorch reads them, to see that they are in range, from tensors that come from outside of a traced step and from those
that `torch.func.grad` has wrapped: neither a trace nor `torch.vmap` has values to read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["OneHot"]


class OneHot(TorchFunctionMode):
    """Compares, as PyTorch itself does under `torch.compile`: a class out of range has no 1 then.

    Attributes:
        used: whether there was something to compare.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            self.used = True
            func = _compared
        return func(*args, **(kwargs or {}))


def _compared(input: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0 or input.dtype != torch.int64:  # PyTorch says what is wrong, or counts them
        return torch.nn.functional.one_hot(input, num_classes)
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()
