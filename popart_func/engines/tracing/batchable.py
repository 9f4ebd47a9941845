"""Functions that `torch.vmap` or a trace can't run, replaced by equal ones that they can.

PyTorch reads the values of `one_hot` to check that they are in range. It can't in a traced step, nor of tensors that
`torch.func.grad` or `torch.vmap` wraps. Recurrent layers, ``x[mask] = value`` and ``out=`` have no rule for
`torch.vmap`, but consist of ops that have one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from popart_func._torch import without_mkldnn

__all__ = ["Batchable"]

_RECURRENT = {getattr(torch, name): getattr(torch.ops.aten, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


class Batchable(TorchFunctionMode):
    """Replaces `one_hot`, recurrent layers, ``x[mask] = value``, and `normalize` with ``out``.

    `one_hot` becomes a comparison, so that a class out of range gives a row of zeros.

    Attributes:
        used: whether one of them has been called within it.
    """

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            self.used = True
            return _compared(*args, **kwargs)
        if func is Tensor.__setitem__ and _is_filled_by_mask(*args):
            self.used = True
            x, mask, value = args
            mask = mask.reshape(*mask.shape, *(1 for _ in x.shape[mask.ndim :]))
            return x.copy_(torch.where(mask, value, x))  # `masked_fill_` runs lane by lane where the value is a tensor
        if func is torch.nn.functional.normalize and kwargs.get("out") is not None:  # of spectral normalization
            self.used = True
            return kwargs["out"].copy_(func(*args, **{**kwargs, "out": None}))
        if func in _RECURRENT:
            self.used = True
            is_packed = not isinstance(args[3], bool)
            op = _RECURRENT[func].data if is_packed else _RECURRENT[func].input
            with without_mkldnn():
                return op.decompose(*args, **kwargs)
        return func(*args, **kwargs)


def _is_filled_by_mask(x: Tensor, index: Any, value: Any) -> bool:
    """Whether one value is written where a mask is true, as in ``x[x < 0] = 0``."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and 0 < index.ndim <= x.ndim
    is_one = isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.ndim == 0)
    return is_mask and is_one and x.shape[: index.ndim] == index.shape


def _compared(input: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0 or input.dtype != torch.int64:  # PyTorch raises, or counts the classes
        return torch.nn.functional.one_hot(input, num_classes)
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()
