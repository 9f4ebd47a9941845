"""Shape inference: the shapes, strides and dtypes that ops return, found by calling the ops on stand-ins.

A stand-in is an ordinary tensor on the CPU whose values mean nothing. PyTorch's kernels run on it where no value can
upset them, since they are much faster than PyTorch's shape rules (the device ``meta``), most of which are Python and
import sympy. All other ops, a user's own among them, go by those rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._torch import OpOverload, apart_from_transforms, schema

__all__ = ["TensorSpec", "blank", "blank_of", "infer", "map_tensors"]

# Ops whose kernels run on stand-ins, beside views and those that PyTorch tags as pointwise, reduction or core.
_RUN = {
    *("addbmm", "addmv", "addr", "baddbmm", "dot", "mv", "outer", "vdot"),
    *("copy", "fill", "zero", "clone", "_unsafe_view", "lift_fresh_copy", "stack", "roll", "tril", "triu", "trace"),
    *("arange", "eye", "linspace", "ones", "zeros", "full", "empty", "scalar_tensor"),
    *("empty_like", "full_like", "ones_like", "zeros_like", "new_empty", "new_full", "new_ones", "new_zeros"),
    *("select_scatter", "diagonal_scatter", "slice_scatter", "select_backward", "slice_backward", "diagonal_backward"),
    *("new_empty_strided", "cumprod", "logcumsumexp", "cummax", "cummin", "logaddexp"),
    *("_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward"),
}
# Core ops whose kernels read values, or fail on some.
_ONLY_META = {"_embedding_bag", "masked_scatter", "grid_sampler_2d"}

# Integers after the first argument are filled with this: an index that is never out of range, a divisor that is not 0.
_FILL = {
    **dict.fromkeys(("gather", "index", "index_select", "index_put", "embedding", "embedding_dense_backward"), 0),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "_unsafe_index", "_unsafe_index_put"), 0),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "take"), 0),
    **dict.fromkeys(("div", "floor_divide", "remainder", "fmod"), 1),
}


class TensorSpec(NamedTuple):
    """The shape, dtype and device of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


def infer(function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an op returns for stand-ins; an in-place op changes its stand-in.

    Raises:
        NotImplementedError: PyTorch has no shape rule for the op.
    """
    runs, fill = _how(function)
    if not runs:
        return _infer_on_meta(function, args, kwargs)
    if fill is not None:
        args = (args[0], *(map_tensors(functools.partial(_filled, fill), part) for part in args[1:]))
    try:
        return function(*args, **kwargs)
    except NotImplementedError:  # PyTorch computes this dtype on GPUs only
        return _infer_on_meta(function, args, kwargs)


def blank(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new stand-in."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return torch.zeros(max(size, 0), dtype=dtype, device="cpu").as_strided(shape, strides)


def blank_of(spec: TensorSpec) -> Tensor:
    """A new contiguous stand-in, made also while a recorder, or a transform of `torch.func`, is entered."""
    with apart_from_transforms():
        return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies a function to each tensor in the arguments or results of an op."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        mapped = [map_tensors(function, part) for part in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    return value


@functools.cache
def _how(function: OpOverload) -> tuple[bool, int | None]:
    """Whether an op's kernel runs on stand-ins, and what integers are filled with for that."""
    namespace, _, name = schema(function).name.partition("::")
    if schema(function).is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    tags = {
        torch.Tag.pointwise,
        torch.Tag.core,
        torch.Tag.inplace_view,
        getattr(torch.Tag, "reduction", torch.Tag.core),
    }
    known = function.is_view or name in _RUN or name in _FILL or not tags.isdisjoint(function.tags)
    # A draw would move PyTorch's generator on.
    runs = known and name not in _ONLY_META and torch.Tag.nondeterministic_seeded not in function.tags
    return namespace == "aten" and runs, _FILL.get(name)


def _filled(value: int, tensor: Tensor) -> Tensor:
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return torch.full_like(tensor, value) if is_integer else tensor


def _infer_on_meta(function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, (args, kwargs))
    metas = {id(tensor): _on_meta(tensor) for tensor in tensors}
    changed = {id(metas[id(tensor)]): tensor for tensor in tensors}  # an op that works in place returns an argument
    meta_args, meta_kwargs = map_tensors(lambda tensor: metas[id(tensor)], (tuple(args), kwargs))
    if "device" in kwargs:
        meta_kwargs["device"] = torch.device("meta")
    results = function(*meta_args, **meta_kwargs)
    return map_tensors(lambda meta: changed[id(meta)] if id(meta) in changed else _blank_like(meta), results)


def _blank_like(tensor: Tensor) -> Tensor:
    return blank(tensor.shape, tensor.stride(), tensor.dtype)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
