"""The words for dtypes and shapes in annotations, ``Float[Tensor, "batch tasks"]``.

They are jaxtyping's where it is loaded, as it is under pytest, where every annotation is enforced. Elsewhere
annotations are never evaluated, and jaxtyping need not be installed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["Float", "Int", "Num", "Scalar", "Shaped"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int, Num, Shaped
else:

    class Shaped:
        """Stands for the tensor type alone."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Float = Int = Num = Shaped

Scalar = int | float | Num[Tensor, ""]
"""A hyper-parameter: a number, or a 0-d tensor, so that every lane can have its own."""
