"""Types with dtype and shape for annotations, such as ``Float[Tensor, "batch tasks"]``.

They are jaxtyping's where jaxtyping is loaded. It is under pytest, which enforces every annotation. Elsewhere
annotations are never evaluated, and jaxtyping need not be installed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["Float", "Integer", "Num", "Scalar", "Shaped"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Integer, Num, Shaped
else:

    class Shaped:
        """Stands for the tensor type alone."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Float = Integer = Num = Shaped

Scalar = int | float | Num[Tensor, ""]
"""A hyper-parameter: a number, or a 0-d tensor, so that every lane can have its own."""
