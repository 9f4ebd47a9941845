"""The table of lowerings: every ATen op that JAX computes by itself, and `register_lowering` for the ops of users.

A lowering computes an op with `jax.numpy`, as a JAX user would write it, so that JAX can transform it:
``lowering(out, *arguments)``. ``out`` is the `TensorSpec` of the op's result, a list of them if there are several; the
arguments are in the order of the op's schema, tensors among them are arrays, and those that say how a result is stored
(dtype, layout, device, ...) are left out. The lowering returns an array of the result's shape, or a list of them, which
are cast to the results' dtypes. It raises NotImplementedError, with words that follow "with", for arguments that it
can't lower; NotLoweredError, if simpler ops compose the op.
"""

from __future__ import annotations

from typing import Any

from popart_func.engines.composed import COMPOSED
from popart_func.engines.tracing.decompositions import name_to_register
from popart_func.interop.lowerings.indexing import INDEXING
from popart_func.interop.lowerings.linalg import LINALG
from popart_func.interop.lowerings.movement import MOVEMENT
from popart_func.interop.lowerings.operands import Lowering
from popart_func.interop.lowerings.order import ORDER
from popart_func.interop.lowerings.pointwise import POINTWISE
from popart_func.interop.lowerings.products import PRODUCTS
from popart_func.interop.lowerings.reductions import REDUCTIONS
from popart_func.interop.lowerings.resampling import RESAMPLING
from popart_func.interop.lowerings.special import SPECIAL

__all__ = ["LOWERINGS", "find_lowering", "is_registered", "register_lowering"]

LOWERINGS: dict[str, Lowering] = {
    **POINTWISE,
    **REDUCTIONS,
    **PRODUCTS,
    **MOVEMENT,
    **INDEXING,
    **RESAMPLING,
    **LINALG,
    **ORDER,
    **SPECIAL,
}
"""Every op that the package lowers, by its name in ATen. `evaluate` composes those of `COMPOSED` of simpler ones."""

_registered: dict[str, Lowering] = {}


def find_lowering(name: str) -> Lowering | None:
    """The lowering of an op: the one that a user has registered, else the package's, else None."""
    return _registered.get(name) or LOWERINGS.get(name)


def is_registered(name: str) -> bool:
    """Whether a user has registered the lowering of an op."""
    return name in _registered


def register_lowering(op: Any, lowering: Lowering, *, replace: bool = False) -> None:
    """Adds an op to `to_jax_function`, without a change to the package.

    Functions that `to_jax_function` has traced see it at their next call; a function that `jax.jit` has compiled keeps
    the old one (`jax.clear_caches` drops it). A custom op needs a fake implementation (``register_fake``), which says
    the shape of its result. `jax.grad` differentiates the lowering.

    Args:
        op: the op: its name, ``"namespace::name"`` or ``"name"`` of an ATen op; what `torch.library.custom_op` returns;
            or ``torch.ops.namespace.name``.
        lowering: ``lowering(out, *arguments)``, in `jax.numpy`. ``out`` has the ``shape`` and ``dtype`` of the result
            (a list of them if there are several); the arguments are in the order of the op's schema, tensors among them
            are arrays. It returns an array of that shape, or a list of them.
        replace: whether to replace a lowering that the op has already.

    Raises:
        TypeError: `lowering` is not a function.
        ValueError: there is no such op; tracing replaces it by simpler ops, so that no graph has it; or it has a
            lowering already and ``replace`` is not given.

    >>> import jax
    >>> import torch
    >>> from popart_func.interop.functions import to_jax_function
    >>> @torch.library.custom_op("example::double", mutates_args=())
    ... def double(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> _ = double.register_fake(torch.empty_like)
    >>> register_lowering(double, lambda out, x: 2 * x)
    >>> to_jax_function(double)(jax.numpy.ones(2))
    Array([2., 2.], dtype=float32)
    """
    if not callable(lowering):
        raise TypeError(f"register_lowering: `lowering` must be a function, got {type(lowering).__name__}.")
    name = name_to_register("register_lowering", op)
    if (find_lowering(name) or name in COMPOSED) and not replace:
        raise ValueError(
            f"register_lowering: there is a lowering of {name!r} already: pass replace=True to replace it."
        )
    _registered[name] = lowering
