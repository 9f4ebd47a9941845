"""Ops that users add to the native engine."""

from __future__ import annotations

from typing import Any

from popart_func.engines.composed import COMPOSED
from popart_func.engines.native.kernel import Lowering
from popart_func.engines.native.ops import OPS
from popart_func.engines.tracing.decompositions import name_to_register

__all__ = ["register_op", "registrations"]

_count = 0


def registrations() -> int:
    """How many ops have been registered: kernels that were built before the last registration are built anew."""
    return _count


def register_op(op: Any, lower: Lowering, *, replace: bool = False) -> None:
    """Adds an op to the native engine: a custom one, or one of ATen's that the engine lacks.

    ``lower(kernel, out, *arguments)`` is called while a kernel is built. It receives

    - ``kernel``, a `popart_func.engines.native.Kernel`, whose methods make expressions: ``kernel.pointwise(c,
      dtype, *operands)`` from a line of C++, ``kernel.reduce``, ``kernel.matmul``, ``kernel.reshape``, ...;
    - ``out``, the shape and dtype of the op's result, a `TensorSpec`; a list of them where there are several results;
    - the op's arguments in its schema's order, defaults filled in. A tensor is an expression with a ``shape`` and a
      ``dtype``, which is *not* broadcast or promoted; numbers, lists and None are what they are.

    It returns an expression of the result's shape and dtype, or a list of them. It sees one lane, and no values. It
    refuses arguments by raising `popart_func.engines.native.NotLoweredError`.

    The C++ is compiled for CPUs and CUDA devices alike, and each operand is one number: it can use operators and the
    functions of `arithmetic.hpp` (``maximum``, ``math_sqrt``, ``math_fma``, ``vector_exp``, ``vector_log``, ...).

    Args:
        op: the op: its name, ``"namespace::name"`` or ``"name"`` of an ATen op; what `torch.library.custom_op` returns;
            or ``torch.ops.namespace.name``. All of its overloads are meant.
        lower: see above.
        replace: whether to replace what the engine has for this op.

    Raises:
        TypeError: ``lower`` is not a function.
        ValueError: PyTorch has no op of this name; tracing replaces it by simpler ones, so that no kernel contains it;
            or the engine has it already and ``replace`` is not given.

    >>> import torch
    >>> @torch.library.custom_op("demo::cube", mutates_args=())
    ... def cube(x: torch.Tensor) -> torch.Tensor:
    ...     return x**3
    >>> _ = cube.register_fake(torch.empty_like)
    >>> register_op(cube, lambda kernel, out, x: kernel.pointwise("{0} * {0} * {0}", out.dtype, x))
    >>> from popart_func.engines import native
    >>> from popart_func.engines.lane_scan import make_lane_scan
    >>> scan = make_lane_scan("scan", lambda c, x: (cube(c) + x, c), torch.ones(2, 5), torch.ones(9, 5))
    >>> print(native.listing(scan).loops.splitlines()[4])
        t1 = ((in0 * in0 * in0) + in1)
    """
    global _count
    if not callable(lower):
        raise TypeError(
            f"register_op: `lower` must be a function (kernel, out, *arguments), got {type(lower).__name__}."
        )
    name = name_to_register("register_op", op)
    if (name in OPS or name in COMPOSED) and not replace:
        raise ValueError(f"register_op: native has the op {name!r} already: pass replace=True to replace it.")
    OPS[name] = lower
    _count += 1
