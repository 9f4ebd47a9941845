"""The schedule: which loop nests a step has, which statements share one, and which buffers may share memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from popart_func.engines.native.expressions import Buffer, Load, index_names, leaves
from popart_func.engines.native.layouts import Shape
from popart_func.engines.native.statements import Nested, NestedResult, Pointwise, Scatter, Statement, reads, writes

__all__ = ["LARGE", "LoopNest", "in_place", "invariant", "is_idle", "schedule", "stay_in_registers"]

LARGE = 16
"""From how many statements on a loop nest is large: with 32, 16 layers of 16 with Adam take 1.2 times as long."""


@dataclass
class LoopNest:
    """Statements in one loop nest: pointwise ones that have the same shape, or a single statement of another kind.

    Attributes:
        shape: of the loops; None where the nest has a single statement, which brings its own loops.
        statements: in the order in which they run.
    """

    shape: Shape | None
    statements: list[Statement] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(statement) for statement in self.statements]
        if not self.shape:
            return "\n".join(lines)
        head = ", ".join(f"{name} < {size}" for name, size in zip(index_names(self.shape), self.shape, strict=True))
        return "\n".join([f"for {head}:", *(f"  {line}" for line in lines)])


def schedule(statements: Iterable[Statement]) -> list[LoopNest]:
    """Merges loops: a pointwise statement joins the last nest of its shape in which all that it reads is known.

    A statement that joins an earlier nest overtakes the statements between. That is sound, because a statement only
    goes to nests that come after, or compute, everything it reads. A value that its own nest has just computed at the
    same index is never loaded: it is still in a register.

    A nest of `LARGE` statements takes only more that have an operand in common with it. So the optimizer of a deep
    network has small nests, which are alike for many layers, and not one nest for all layers.
    """
    nests: list[LoopNest] = []
    operands: list[set[Buffer]] = []  # of each nest: what it reads in order, and what it writes
    written: dict[Buffer, int] = {}  # the last nest that writes to a buffer
    for statement in statements:
        earliest = 0  # the first nest that the statement may be in
        indices = _index_loads(statement)
        for load in reads(statement):
            if load.buffer in written:
                nest = written[load.buffer]
                fits = load not in indices and _same_index(nests[nest], statement, load)
                earliest = max(earliest, nest if fits else nest + 1)
        # What changes a buffer must come after the statement that filled it: the two visit its elements in different
        # orders, so they can't share a loop.
        if isinstance(statement, Scatter) or (isinstance(statement, Pointwise | NestedResult) and statement.overwrites):
            earliest = max(earliest, written[writes(statement)] + 1)
        # Only pointwise loops are merged. The last fitting nest, not the first: its operands were computed most
        # recently, so they are most likely to be in registers or in cache.
        shape = statement.target.shape if isinstance(statement, Pointwise) else None
        own = {load.buffer for load in reads(statement) if load.is_whole} | {writes(statement)}
        fitting = [
            index
            for index in range(earliest, len(nests))
            if shape is not None
            and nests[index].shape == shape
            and (len(nests[index].statements) < LARGE or own & operands[index])
        ]
        if fitting:
            index = fitting[-1]
        else:
            index = len(nests)
            nests.append(LoopNest(shape))
            operands.append(set())
        nests[index].statements.append(statement)
        operands[index] |= own
        # Several statements may fill one buffer piece by piece (`cat`); readers must wait for the last of them.
        written[writes(statement)] = max(index, written.get(writes(statement), 0))
    return nests


def _index_loads(statement: Statement) -> set[Load]:
    """The loads from which a statement computes indices: their buffers are filled in an earlier loop nest.

    GCC 12 miscompiles a vectorized loop that turns a bool into an index and looks it up in a table without a lane axis.
    """
    values = (index.value for load in reads(statement) for index in load.dynamic)
    return {leaf for value in values for leaf in leaves(value) if isinstance(leaf, Load)}


def _same_index(nest: LoopNest, statement: Statement, load: Load) -> bool:
    """Whether a statement, put into a nest, would read an element in the very round of the loops that computes it.

    It must read the whole buffer in order, with the shape of the loops, and so must all writes to it in the nest: a
    read through a view (`flip`, `expand`) would need an element of a round that is over, or has not begun.
    """
    return (
        isinstance(statement, Pointwise)
        and load.is_whole
        and load.shape == statement.target.shape == nest.shape
        and all(other.target.is_whole for other in nest.statements if writes(other) is load.buffer)
    )


def invariant(statements: Sequence[Statement], moving: Iterable[Buffer]) -> set[Buffer]:
    """The buffers that are the same at every time step, so that they are computed once, before the time loop.

    Args:
        statements: of a step.
        moving: the inputs that change from step to step: carry and xs.
    """
    changing = set(moving)
    # Repeated until nothing is added: a buffer may be filled by several statements, and a later one that depends on
    # the time makes it changing for the statements between as well.
    while True:
        again = [statement for statement in statements if any(load.buffer in changing for load in reads(statement))]
        more = set(map(writes, again))
        # A loop inside the step begins anew each time, also with a carry whose last value nothing reads.
        more.update(*(statement.changed for statement in again if isinstance(statement, Nested)))
        if more <= changing:
            return {writes(statement) for statement in statements} - changing
        changing |= more


def in_place(nests: Sequence[LoopNest], old: Sequence[Buffer], new: Sequence[Buffer | None]) -> dict[Buffer, Buffer]:
    """Which leaves of the new carry can be written over the old ones, so that no copy is needed after a step.

    That is right if nothing reads the old leaf after the new one has been written. Within the nest that writes it, a
    round of the loops loads everything before it stores anything; so that nest may read the old leaf, but only at the
    index that it writes. Other indices may have been written by earlier rounds: ``c.flip(0) + x`` is not in place.

    Args:
        nests: of a step, without those that run before the time loop.
        old: the buffers of the carry.
        new: the buffer that becomes each of them; None for a leaf that stays as it is.

    Returns:
        new buffer -> the old one whose memory it takes. The others must be copied at the end of a step.
    """
    first_write: dict[Buffer, int] = {}
    for index, nest in enumerate(nests):
        for statement in nest.statements:
            for buffer in (writes(statement), *(statement.stacks if isinstance(statement, Nested) else ())):
                first_write.setdefault(buffer, index)
    merged: dict[Buffer, Buffer] = {}
    for before, after in zip(old, new, strict=True):
        # A buffer that no nest writes is an input or is computed before the time loop; one that is merged already
        # stands for two leaves of the carry and can lie in one place only.
        if after is None or after not in first_write or after in merged:
            continue
        first = first_write[after]
        writers = [statement for statement in nests[first].statements if writes(statement) is after]
        late = (
            load
            for index, nest in enumerate(nests[first:], start=first)
            for statement in nest.statements
            for load in reads(statement)
            if load.buffer is before and not (index == first and _same_index(nest, statement, load))
        )
        # A new leaf that is filled piece by piece reads the old one at shifted places (`cat([c[1:], x])`).
        if all(writer.target.is_whole for writer in writers) and not any(late):
            merged[after] = before
    return merged


def is_idle(statement: Pointwise, merged: dict[Buffer, Buffer]) -> bool:
    """Whether a statement copies a buffer onto itself, which `in_place` makes of a leaf that is only copied."""
    value = statement.value
    same = isinstance(value, Load) and merged.get(statement.target.buffer) is value.buffer
    return same and statement.target.is_whole and value.is_whole  # type: ignore[union-attr]


def stay_in_registers(nests: Sequence[LoopNest]) -> set[Buffer]:
    """The buffers that only their own nest reads: their values need no memory."""
    where = {writes(statement): nest for nest in nests if nest.shape is not None for statement in nest.statements}
    elsewhere = {
        load.buffer
        for nest in nests
        for statement in nest.statements
        for load in reads(statement)
        if where.get(load.buffer) is not nest
    }
    return where.keys() - elsewhere
