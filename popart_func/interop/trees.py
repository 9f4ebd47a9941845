"""`to_jax`, `to_torch`: pytrees of tensors as pytrees of JAX arrays, and back.

They take every pytree of JAX: dicts, lists, tuples, NamedTuples, None, and dataclasses that `register_dataclass` has
registered. Leaves that are not arrays (numbers, strings) stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optree
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from popart_func._torch import (
    FakeTensor,
    is_functorch_wrapped_tensor,
    is_jit_tracing,
    is_make_fx_tracing,
    torch_pytree,
)
from popart_func.engines.tracing.recorder import is_recording
from popart_func.engines.tracing.traced import Traced

__all__ = [
    "argument_to_array",
    "array_to_tensor",
    "check_dense",
    "has_64_bits",
    "is_tracing",
    "jax_dtype",
    "numpy_to_tensor",
    "plain_array",
    "register_dataclass",
    "tensor_to_array",
    "to_jax",
    "to_torch",
    "torch_dtype",
    "with_plain_tuples",
]

PyTree = Any
T = TypeVar("T")

# PyTorch has names for these dtypes, and no computation.
_ONLY_NAMED = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
_NARROWED = {torch.float64: "float32", torch.int64: "int32", torch.uint64: "uint32", torch.complex128: "complex64"}


def to_jax(tree: PyTree, *, copy: bool = True, strict_dtype: bool = True) -> PyTree:
    """A pytree of tensors as one of JAX arrays, detached, on the same device.

    Args:
        tree: tensors of any strides; other leaves stay as they are.
        copy: False to share memory where the tensor's is contiguous and aligned to 64 bytes (never of float8). Then an
            in-place operation on the tensor changes the array, which JAX takes to be constant; a jitted function that
            is still running may read either value.
        strict_dtype: whether to raise where JAX, whose 64-bit types are off by default, would make float32 of float64
            or int32 of int64; else it does.

    Raises:
        TypeError: a 64-bit dtype, one that JAX lacks, or a tensor inside a transform or a trace.

    >>> to_jax({"w": torch.ones(2), "name": "head"})
    {'name': 'head', 'w': Array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(lambda leaf: _leaf_to_jax(leaf, copy, strict_dtype), with_plain_tuples(tree))


def to_torch(tree: PyTree, *, copy: bool = True) -> PyTree:
    """A pytree of JAX (or numpy) arrays as one of tensors, on the same device.

    A typed key becomes the key of `popart_func.random` that gives the same numbers, int32 ``[..., 2]``.

    Args:
        tree: arrays; other leaves stay as they are.
        copy: False to share the array's memory. Then never write to the tensor: JAX takes its arrays to be constant.

    Raises:
        TypeError: an array inside a JAX transform; a dtype that PyTorch lacks.

    >>> to_torch({"w": jnp.ones(2)})
    {'w': tensor([1., 1.])}
    """
    return jax.tree.map(lambda leaf: _leaf_to_torch(leaf, copy), tree)


def register_dataclass(cls: type[T]) -> type[T]:
    """Registers a dataclass of tensors as a pytree with PyTorch, optree and JAX; also as a decorator.

    Raises:
        TypeError: ``cls`` is not a dataclass.

    >>> import dataclasses
    >>> @register_dataclass
    ... @dataclasses.dataclass
    ... class Weights:
    ...     w: object
    >>> to_jax(Weights(torch.ones(1))).w
    Array([1.], dtype=float32)
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"register_dataclass: `cls` must be a dataclass, got {cls!r}.")
    names = [field.name for field in dataclasses.fields(cls) if field.init]

    def flatten(value: T) -> tuple[list[Any], None]:
        return [getattr(value, name) for name in names], None

    def unflatten(_: Any, children: Any) -> T:
        return cls(**dict(zip(names, children, strict=True)))

    torch_pytree.register_pytree_node(cls, flatten, lambda children, context: unflatten(context, children))
    optree.register_pytree_node(
        cls,  # type: ignore[arg-type]
        flatten,  # type: ignore[arg-type]
        unflatten,  # type: ignore[arg-type]
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])
    return cls


def is_tracing() -> bool:
    """Whether PyTorch traces here, and would take what JAX computes for a constant."""
    return is_recording() or is_make_fx_tracing() or is_jit_tracing()


def has_64_bits() -> bool:
    """Whether JAX's 64-bit types are on (``jax_enable_x64``)."""
    return jax.dtypes.canonicalize_dtype(np.int64) == np.int64


def jax_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of JAX for one of PyTorch; 32 bits for 64 with JAX's 64-bit types off.

    Raises:
        TypeError: JAX has no such dtype.
    """
    name = str(dtype).removeprefix("torch.")
    try:
        if dtype == torch.complex32 or name in _ONLY_NAMED:
            raise TypeError
        return jax.dtypes.canonicalize_dtype(jnp.dtype(name))
    except TypeError:
        raise TypeError(f"JAX has no dtype for {dtype}.") from None


def torch_dtype(dtype: Any) -> torch.dtype:
    """The dtype of PyTorch for one of JAX.

    Raises:
        TypeError: PyTorch has no such dtype.
    """
    name = jnp.dtype(dtype).name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or name in _ONLY_NAMED:
        raise TypeError(f"PyTorch has no dtype for JAX's {name}.")
    return found


def with_plain_tuples(tree: PyTree) -> PyTree:
    """Replaces `torch.return_types` in a tree, as ``x.max(0)`` returns them, by plain tuples, which JAX knows."""
    is_one = lambda leaf: isinstance(leaf, tuple) and not isinstance(leaf, torch.Size)  # noqa: E731
    return jax.tree.map(lambda leaf: tuple(leaf) if is_one(leaf) else leaf, tree)


def argument_to_array(caller: str, path: Any, leaf: Any) -> Any:
    """Checks a leaf of the arguments of a JAX function and makes it an array; typed keys become words.

    Raises:
        TypeError: neither an array nor a number.
    """
    if isinstance(leaf, Tensor) or not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float):
        where = jax.tree_util.keystr(path[1:])
        may_be_static = caller == "to_jax_function" and not isinstance(leaf, Tensor)
        raise TypeError(
            f"{caller}: every leaf of the arguments must be an array or a number, got {type(leaf).__name__} at {where}."
            + (" Name the argument in static_argnames to pass it as it is." if may_be_static else "")
        )
    return plain_array(leaf)


def plain_array(value: Any) -> Any:
    """Makes an array of an array or a number; typed keys become keys of `popart_func.random`, int32 ``[..., 2]``.

    Raises:
        TypeError: keys of another kind than threefry.
    """
    if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        return jnp.asarray(value)
    kind = str(jax.random.key_impl(value))
    if kind != "threefry2x32":
        raise TypeError(f"popart_func.random has the keys of JAX's threefry2x32 only, got a key of {kind}.")
    return jax.lax.bitcast_convert_type(jax.random.key_data(value), jnp.int32)


def check_dense(caller: str, tensor: Tensor) -> None:
    """Raises for a tensor that JAX can't hold.

    Raises:
        TypeError: a dtype that JAX lacks; a nested or sparse tensor, or one on meta.
    """
    jax_dtype(tensor.dtype)
    if tensor.is_nested or tensor.is_meta:
        what = "a nested one" if tensor.is_nested else "one on meta"
        raise TypeError(f"{caller}: a tensor must be dense, got {what}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{caller}: a tensor must be dense, got the layout {tensor.layout}.")


def tensor_to_array(tensor: Tensor, *, copy: bool) -> Any:
    """A plain tensor as an array."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # JAX takes contiguous memory only, and its own `copy=True` has been seen to alias: copy here.
    tensor = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor.contiguous()
    bits = {1: torch.uint8}.get(tensor.element_size()) if tensor.dtype.is_floating_point else None
    if bits is not None:  # float8 has no DLPack in older versions
        return jax.lax.bitcast_convert_type(jnp.from_dlpack(tensor.view(bits)), jax_dtype(tensor.dtype))
    return jnp.from_dlpack(tensor)


def array_to_tensor(array: Any, *, copy: bool) -> Tensor:
    """A plain array as a tensor."""
    dtype = torch_dtype(array.dtype)
    if array.dtype.itemsize == 1 and dtype.is_floating_point:
        tensor = from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(dtype)
    else:
        tensor = from_dlpack(array)
    return tensor.clone() if copy else tensor


def numpy_to_tensor(array: Any, *, copy: bool) -> Tensor:
    """A numpy array as a tensor."""
    dtype = torch_dtype(array.dtype)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # PyTorch takes neither read-only memory nor negative strides.
    array = array.copy() if copy or not array.flags.writeable or any(step < 0 for step in array.strides) else array
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{array.itemsize}")).view(dtype)  # bfloat16 and float8 of ml_dtypes


def _leaf_to_jax(leaf: Any, copy: bool, strict_dtype: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return _other("to_jax", leaf)
    if is_functorch_wrapped_tensor(leaf) or isinstance(leaf, FakeTensor | Traced) or is_tracing():
        raise TypeError(
            "to_jax: the values of a tensor inside torch.func.grad, vmap, jvp or a trace can't be had: call a JAX "
            "function there through `from_jax`."
        )
    if strict_dtype and leaf.dtype in _NARROWED and not has_64_bits():
        raise TypeError(
            f"to_jax: JAX would narrow {leaf.dtype} to {_NARROWED[leaf.dtype]}: cast it, enable jax_enable_x64, or "
            f"pass strict_dtype=False."
        )
    check_dense("to_jax", leaf)
    if leaf.dtype in _NARROWED and not has_64_bits():
        return tensor_to_array(leaf.to(torch_dtype(jax_dtype(leaf.dtype))), copy=copy)
    return tensor_to_array(leaf, copy=copy)


def _leaf_to_torch(leaf: Any, copy: bool) -> Any:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
            "to_torch: the values of an array inside jax.jit, grad or vmap can't be had: call a PyTorch function there "
            "through `to_jax_function`."
        )
    if isinstance(leaf, np.ndarray | np.generic):
        return numpy_to_tensor(np.asarray(leaf), copy=copy)
    if not isinstance(leaf, jax.Array):
        return _other("to_torch", leaf)
    return array_to_tensor(jax.block_until_ready(plain_array(leaf)), copy=copy)


def _other(caller: str, leaf: Any) -> Any:
    """Returns a leaf that is no array; raises TypeError if it holds arrays, which would not be converted."""
    kind = type(leaf).__name__
    fields = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) else ()
    if any(isinstance(getattr(leaf, field.name, None), Tensor | jax.Array) for field in fields):
        raise TypeError(f"{caller}: the dataclass {kind} is not registered: use `register_dataclass`.")
    if isinstance(leaf, torch.nn.Module):
        raise TypeError(f"{caller}: a module, {kind}, is no pytree: take `dict(module.named_parameters())`.")
    if isinstance(leaf, set | frozenset | deque) and any(isinstance(part, Tensor | jax.Array) for part in leaf):
        raise TypeError(f"{caller}: a {kind} is no pytree to JAX: make it a list.")
    return leaf
