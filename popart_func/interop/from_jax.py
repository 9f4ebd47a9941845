"""`from_jax`: a JAX function as a PyTorch function, for autograd and every transform of `torch.func`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.autograd import forward_ad

from popart_func._torch import FakeTensor, is_functorch_wrapped_tensor
from popart_func.interop.trees import (
    array_to_tensor,
    check_dense,
    has_64_bits,
    is_tracing,
    jax_dtype,
    plain_array,
    tensor_to_array,
)

__all__ = ["from_jax"]

_WHILE_TRACING = (
    "from_jax: a JAX function can't be called while PyTorch traces (torch.compile, torch.export, make_fx, "
    "torch.jit.trace, to_jax_function, an engine other than eager): its result would be taken for a constant. Use the "
    "engine 'eager', or call it outside."
)


def from_jax(jax_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pure JAX function as a PyTorch function.

    It works under autograd, `torch.func.grad`, `vjp`, `jvp`, `vmap` with any ``in_dims``, `jacrev`, `jacfwd`,
    `hessian`, and nestings of them: each asks JAX for the transformed function. A contiguous tensor is not copied: JAX
    reads its memory. The function is jitted once for each structure, shapes and dtypes.

    Args:
        jax_fn: from pytrees of arrays to a pytree of arrays. Leaves that are not tensors (numbers, strings) reach it
            as they are, and must be hashable; it is compiled again for each value of theirs.

    Returns:
        A function of pytrees of tensors.

    Raises:
        RuntimeError: called while `torch.export`, `make_fx` or an engine other than eager traces, which would take its
            result for a constant. `torch.compile` breaks its graph there, and with ``fullgraph`` refuses.
        TypeError: float64 or int64 tensors with JAX's 64-bit types off.

    >>> f = from_jax(lambda x: jnp.sin(x).sum())
    >>> torch.func.grad(f)(torch.zeros(2))
    tensor([1., 1.])
    """
    if not callable(jax_fn):
        raise TypeError(f"from_jax: `jax_fn` must be a function, got {type(jax_fn).__name__}.")
    functions: dict[Any, tuple[_Flat, list[Any]]] = {}

    @functools.wraps(jax_fn)
    def torch_fn(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten((args, kwargs))
        are_tensors = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        _check(tensors)
        real = tuple(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)
        specs = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        key = (structure, are_tensors, tuple(map(_constant_key, others)), specs)
        try:
            hash(key)
        except TypeError:
            kinds = sorted({type(other).__name__ for other in others})
            raise TypeError(
                f"from_jax: leaves that are not tensors must be hashable, got {', '.join(kinds)}; `to_torch` makes "
                f"tensors of arrays."
            ) from None
        if key not in functions:
            functions[key] = _flatten(jax_fn, structure, are_tensors, others, real)
        flat, out_structures = functions[key]
        outputs = flat(*tensors)
        return jax.tree_util.tree_unflatten(out_structures[0], outputs)

    # torch.compile breaks its graph here, and with fullgraph refuses.
    return torch.compiler.disable(torch_fn, reason=_WHILE_TRACING)


def _constant_key(value: Any) -> Any:
    """Equal for equal constants; NaN equals NaN here, but -0.0 differs from 0.0, and 1.0 from 1, unlike in Python."""
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _check(tensors: list[Tensor]) -> None:
    if is_tracing() or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise RuntimeError(_WHILE_TRACING)
    for tensor in tensors:
        check_dense("from_jax", tensor)
        if jax_dtype(tensor.dtype).name != str(tensor.dtype).removeprefix("torch.") and not has_64_bits():
            raise TypeError(f"from_jax: JAX would narrow {tensor.dtype}: cast it, or enable jax_enable_x64.")


def _flatten(
    jax_fn: Callable[..., Any], structure: Any, are_tensors: tuple[bool, ...], others: Any, real: tuple[bool, ...]
) -> tuple[_Flat, list[Any]]:
    out_structures: list[Any] = []

    def flat(*arrays: Any) -> tuple[Any, ...]:
        given, rest = iter(arrays), iter(others)
        leaves = [next(given) if is_tensor else next(rest) for is_tensor in are_tensors]
        args, kwargs = jax.tree_util.tree_unflatten(structure, leaves)
        out_leaves, out_structure = jax.tree_util.tree_flatten(jax_fn(*args, **kwargs))
        out_structures[:] = [out_structure]
        return tuple(map(plain_array, out_leaves))

    return _Flat(flat, real), out_structures


class _Flat:
    """A function of flat arrays as one of flat tensors, with its transformed functions, each made once."""

    def __init__(self, function: Callable[..., tuple[Any, ...]], real: tuple[bool, ...]) -> None:
        self.function, self.real = function, real
        self.run = jax.jit(function)
        self.derived: dict[Any, _Flat] = {}
        self.bridge = _bridge(self)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.bridge.apply(*tensors) if any(map(_is_followed, tensors)) else self.evaluate(*tensors)

    def evaluate(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = self.run(*(tensor_to_array(tensor, copy=False) for tensor in tensors))
        return tuple(array_to_tensor(array, copy=False) for array in arrays)

    def mapped(self, axes: tuple[int | None, ...]) -> _Flat:
        key = ("vmap", axes)
        if key not in self.derived:
            self.derived[key] = _Flat(jax.vmap(self.function, in_axes=axes), self.real)
        return self.derived[key]

    def pulled_back(self, outs: tuple[int, ...]) -> _Flat:
        """``(inputs, cotangents of some outputs) -> cotangents of the real inputs``."""

        def pull_back(*arrays: Any) -> tuple[Any, ...]:
            inputs, cotangents = arrays[: len(self.real)], arrays[len(self.real) :]

            def some(*reals: Any) -> tuple[Any, ...]:
                results = self.function(*self._with(inputs, reals))
                return tuple(results[position] for position in outs)

            # JAX's cotangent of a complex number is the conjugate of PyTorch's.
            pulled = jax.vjp(some, *self._real(inputs))[1](tuple(map(jnp.conj, cotangents)))
            return tuple(map(jnp.conj, pulled))

        key = ("vjp", outs)
        if key not in self.derived:
            self.derived[key] = _Flat(pull_back, (*self.real, *(True for _ in outs)))
        return self.derived[key]

    def pushed_forward(self) -> _Flat:
        """``(inputs, tangents of the real inputs) -> tangents of the real outputs``."""

        def push_forward(*arrays: Any) -> tuple[Any, ...]:
            inputs, tangents = arrays[: len(self.real)], arrays[len(self.real) :]

            def some(*reals: Any) -> tuple[Any, ...]:
                results = self.function(*self._with(inputs, reals))
                return tuple(result for result in results if jnp.issubdtype(result.dtype, jnp.inexact))

            return jax.jvp(some, self._real(inputs), tuple(tangents))[1]

        if "jvp" not in self.derived:
            self.derived["jvp"] = _Flat(push_forward, (*self.real, *(True for _ in range(sum(self.real)))))
        return self.derived["jvp"]

    def _real(self, inputs: Any) -> tuple[Any, ...]:
        return tuple(value for value, is_real in zip(inputs, self.real, strict=True) if is_real)

    def _with(self, inputs: Any, reals: Any) -> list[Any]:
        given = iter(reals)
        return [next(given) if is_real else value for value, is_real in zip(inputs, self.real, strict=True)]


def _is_followed(tensor: Tensor) -> bool:
    """Whether a transform or autograd has to see what is computed of a tensor."""
    return (
        is_functorch_wrapped_tensor(tensor)
        or (tensor.requires_grad and torch.is_grad_enabled())
        or forward_ad.unpack_dual(tensor).tangent is not None
    )


def _bridge(flat: _Flat) -> Any:
    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            return flat.evaluate(*tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.real_outputs = tuple(n for n, out in enumerate(output) if out.is_floating_point() or out.is_complex())
            ctx.outputs = len(output)
            ctx.mark_non_differentiable(*(out for n, out in enumerate(output) if n not in ctx.real_outputs))

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            chosen = [cotangents[position] for position in ctx.real_outputs]
            grads = iter(flat.pulled_back(ctx.real_outputs)(*ctx.saved_tensors, *chosen))
            return tuple(next(grads) if is_real else None for is_real in flat.real)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            inputs = [forward_ad.unpack_dual(value).primal for value in ctx.saved_tensors]
            given = [
                torch.zeros_like(value) if tangent is None else tangent
                for value, tangent, is_real in zip(inputs, tangents, flat.real, strict=True)
                if is_real
            ]
            results = iter(flat.pushed_forward()(*inputs, *given))
            return tuple(next(results) if n in ctx.real_outputs else None for n in range(ctx.outputs))

        @staticmethod
        def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
            results = flat.mapped(tuple(in_dims))(*tensors)
            return results, tuple(0 for _ in results)

    return Bridge
