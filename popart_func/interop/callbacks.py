"""`to_jax_callback`: a PyTorch function that can't be traced as a JAX function, which JAX calls back in Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from popart_func._torch import FakeTensorMode
from popart_func.interop.trees import (
    argument_to_array,
    has_64_bits,
    jax_dtype,
    numpy_to_tensor,
    torch_dtype,
    with_plain_tuples,
)

__all__ = ["to_jax_callback"]


def to_jax_callback(torch_fn: Callable[..., Any], *, vmap_method: str = "sequential") -> Callable[..., Any]:
    """A pure PyTorch function as a JAX function that calls it on the host, once for each evaluation.

    It is for functions that `to_jax_function` can't trace. It is slower, and stays on the CPU. Gradients come from
    `torch.func.vjp`, in reverse mode and of any order: `jax.grad`, `vjp`, `jacrev`. **It has no forward mode** (`jvp`,
    `jacfwd`, `hessian`): JAX raises there. A run on fake tensors finds the shapes of the result; if the function reads
    values, a run on ones does.

    Args:
        torch_fn: from pytrees of tensors to a pytree of tensors; shapes must not depend on values.
        vmap_method: how `jax.vmap` calls the function, as in `jax.pure_callback`: ``"sequential"``, once for each
            element, or ``"sequential_unrolled"``.

    Returns:
        A function of pytrees of arrays.

    Raises:
        TypeError: an argument is neither an array nor a number, a result is not a tensor, or it is of float64 with
            JAX's 64-bit types off.
        ValueError: another ``vmap_method``, which would call the function with a batch.

    >>> f = to_jax_callback(lambda x: x.sum() if x[0] > 0 else -x.sum())
    >>> jax.grad(f)(-jnp.ones(2))
    Array([-1., -1.], dtype=float32)
    """
    if not callable(torch_fn):
        raise TypeError(f"to_jax_callback: `torch_fn` must be a function, got {type(torch_fn).__name__}.")
    if vmap_method not in ("sequential", "sequential_unrolled"):
        raise ValueError(
            f"to_jax_callback: `vmap_method` must be 'sequential' or 'sequential_unrolled', got {vmap_method!r}."
        )
    functions: dict[Any, tuple[_Callback, list[Any]]] = {}

    @functools.wraps(torch_fn)
    def jax_fn(*args: Any, **kwargs: Any) -> Any:
        paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
        arrays = [argument_to_array("to_jax_callback", path, leaf) for path, leaf in paths_and_leaves]
        key = structure, _specs(arrays)
        if key not in functions:
            functions[key] = _flatten(torch_fn, structure, vmap_method)
        callback, out_structures = functions[key]
        outputs = callback.call(*arrays)
        return jax.tree_util.tree_unflatten(out_structures[0], outputs)

    return jax_fn


def _flatten(torch_fn: Callable[..., Any], structure: Any, vmap_method: str) -> tuple[_Callback, list[Any]]:
    out_structures: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = jax.tree_util.tree_unflatten(structure, tensors)
        out_leaves, out_structure = jax.tree_util.tree_flatten(with_plain_tuples(torch_fn(*args, **kwargs)))
        for leaf in out_leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"to_jax_callback: every leaf of the result must be a tensor, got {type(leaf).__name__}."
                )
        out_structures[:] = [out_structure]
        return tuple(out_leaves)

    return _Callback(flat, vmap_method), out_structures


def _specs(arrays: Any) -> tuple[Any, ...]:
    """All that the shapes and dtypes of results depend on."""
    return has_64_bits(), *((array.shape, array.dtype.name) for array in arrays)


class _Callback:
    """A function of tensors as one of arrays, with derivatives of any order in reverse mode."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], vmap_method: str) -> None:
        self.function, self.vmap_method = function, vmap_method
        self.hosts: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        self.derived: dict[Any, _Callback] = {}

        @jax.custom_vjp
        def call(*arrays: Any) -> tuple[Any, ...]:
            return self.on_host(*arrays)

        def forward(*arrays: Any) -> tuple[Any, Any]:
            return self.call(*arrays), arrays

        def backward(arrays: Any, cotangents: Any) -> tuple[Any, ...]:
            real = tuple(jnp.issubdtype(array.dtype, jnp.inexact) for array in arrays)
            outs = tuple(n for n, value in enumerate(cotangents) if value.dtype != jax.dtypes.float0)
            grads = iter(self.pulled_back(real, outs).call(*arrays, *(cotangents[n] for n in outs)))
            return tuple(
                next(grads) if is_real else np.zeros(array.shape, jax.dtypes.float0)
                for array, is_real in zip(arrays, real, strict=True)
            )

        call.defvjp(forward, backward)
        self.call = call

    def on_host(self, *arrays: Any) -> tuple[Any, ...]:
        key = _specs(arrays)
        if key not in self.hosts:  # JAX compiles a callback once, if it is the same function each time
            self.hosts[key] = self._host(arrays)
        host, shapes = self.hosts[key]
        return jax.pure_callback(host, shapes, *arrays, vmap_method=self.vmap_method)

    def _host(self, arrays: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        shapes = self._shapes(arrays)

        def host(*values: Any) -> tuple[Any, ...]:
            with torch.inference_mode(False), torch.enable_grad():  # the function may compute gradients
                results = self.function(*map(_as_tensor, values))
            return tuple(_as_numpy(result, shape.dtype) for result, shape in zip(results, shapes, strict=True))

        return host, shapes

    def _shapes(self, arrays: Any) -> tuple[Any, ...]:
        def run(make: Callable[..., Tensor]) -> tuple[Any, ...]:
            results = self.function(*(make(array.shape, dtype=torch_dtype(array.dtype)) for array in arrays))
            return tuple((tuple(result.shape), result.dtype) for result in results)

        try:
            with FakeTensorMode(allow_non_fake_inputs=True):  # for the tensors that it closes over
                specs = run(torch.empty)
        except Exception:  # it reads values; if it is wrong, it raises again here
            with torch.inference_mode(False), torch.enable_grad():
                specs = run(torch.ones)
        if not has_64_bits() and any(dtype in (torch.float64, torch.complex128) for _, dtype in specs):
            raise TypeError("to_jax_callback: a result is of 64 bits: cast it to 32, or enable jax_enable_x64.")
        return tuple(jax.ShapeDtypeStruct(shape, jax_dtype(dtype)) for shape, dtype in specs)

    def pulled_back(self, real: tuple[bool, ...], outs: tuple[int, ...]) -> _Callback:
        def pull_back(*tensors: Tensor) -> tuple[Tensor, ...]:
            inputs, cotangents = tensors[: len(real)], tensors[len(real) :]

            def some(*reals: Tensor) -> tuple[Tensor, ...]:
                given = iter(reals)
                pairs = zip(inputs, real, strict=True)
                results = self.function(*(next(given) if is_real else value for value, is_real in pairs))
                return tuple(results[position] for position in outs)

            _, pull = vjp(some, *(value for value, is_real in zip(inputs, real, strict=True) if is_real))  # type: ignore[misc]
            # JAX's cotangent of a complex number is the conjugate of PyTorch's.
            return tuple(value.conj() for value in pull(tuple(value.conj() for value in cotangents)))

        if (real, outs) not in self.derived:
            self.derived[real, outs] = _Callback(pull_back, self.vmap_method)
        return self.derived[real, outs]


def _as_tensor(value: Any) -> Tensor:
    """An argument as a tensor, through numpy: a callback that calls JAX can deadlock.

    It is copied, since a function may write to its argument.
    """
    return numpy_to_tensor(np.asarray(value), copy=True)


def _as_numpy(tensor: Tensor, dtype: Any) -> Any:
    tensor = tensor.detach().to(torch_dtype(dtype)).resolve_conj().resolve_neg().contiguous()
    if dtype.isbuiltin == 1:
        return tensor.numpy()
    return tensor.view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)  # bfloat16 and float8
