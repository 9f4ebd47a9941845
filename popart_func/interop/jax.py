"""JAX: pytrees of tensors as arrays and back, PyTorch functions as JAX functions and back.

>>> import torch
>>> import jax
>>> f = to_jax_function(torch.func.grad(lambda x: (x ** 3).sum()))
>>> jax.jit(f)(to_jax(torch.ones(2)))
Array([3., 3.], dtype=float32)
"""

from __future__ import annotations

from popart_func._extras import require

require("popart_func.interop.jax", "jax", ["jax"])

from popart_func.interop.callbacks import to_jax_callback  # noqa: E402
from popart_func.interop.from_jax import from_jax  # noqa: E402
from popart_func.interop.functions import to_jax_function  # noqa: E402
from popart_func.interop.lowerings.table import register_lowering  # noqa: E402
from popart_func.interop.trees import register_dataclass, to_jax, to_torch  # noqa: E402

__all__ = [
    "from_jax",
    "register_dataclass",
    "register_lowering",
    "to_jax",
    "to_jax_callback",
    "to_jax_function",
    "to_torch",
]
