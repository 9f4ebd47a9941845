"""The table of ops: each ATen op that the engine has, as expressions and statements.

A lowering is called as ``lowering(kernel, out, *arguments)``: with the `Kernel`, the `TensorSpec` of its result (a list
of them if there are several), and the op's arguments in its schema's order, tensors among them as expressions. It
returns an expression of that shape and dtype, or a list of them. To add an op, add an entry to the table of its kind.

An op that `composed` has needs no lowering.
"""

from __future__ import annotations

from torch import fx

from popart_func.engines.native.kernel import Lowering
from popart_func.engines.native.ops.creation import CREATION
from popart_func.engines.native.ops.indexing import INDEXING
from popart_func.engines.native.ops.movement import MOVEMENT, VIEWS
from popart_func.engines.native.ops.order import ORDER
from popart_func.engines.native.ops.pointwise import POINTWISE
from popart_func.engines.native.ops.products import PRODUCTS
from popart_func.engines.native.ops.reductions import REDUCTIONS

__all__ = ["OPS", "is_view"]

OPS: dict[str, Lowering] = {
    **POINTWISE,
    **CREATION,
    **REDUCTIONS,
    **PRODUCTS,
    **MOVEMENT,
    **INDEXING,
    **ORDER,
}
"""Every op that the engine has, by its name in ATen, or ``namespace::name`` for an op of another library."""


def is_view(node: fx.Node) -> bool:
    """Whether a node shows elements of one tensor, each at most once, so that nothing is computed twice through it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name.removeprefix("aten::") not in VIEWS:
        return False
    (source,) = node.all_input_nodes
    return bool(node.meta["val"].numel() <= source.meta["val"].numel())
