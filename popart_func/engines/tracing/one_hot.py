"""`one_hot` as a comparison, which does not read the values of its classes.

PyTorch reads them to check that they are in range. It can't in a traced step, nor of tensors that `torch.func.grad` or
`torch.vmap` wraps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["OneHot"]


class OneHot(TorchFunctionMode):
    """Replaces `one_hot` by a comparison, as `torch.compile` does: a class out of range gives a row of zeros.

    Attributes:
        used: whether `one_hot` has been called within it.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.one_hot:
            self.used = True
            func = _compared
        return func(*args, **(kwargs or {}))


def _compared(input: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0 or input.dtype != torch.int64:  # PyTorch raises, or counts the classes
        return torch.nn.functional.one_hot(input, num_classes)
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()
