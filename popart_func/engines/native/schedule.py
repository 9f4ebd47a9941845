"""Which loops there are, which statements share one, and which values may be written where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from popart_func.engines.native.expressions import Buffer, Load, Shape, leaves
from popart_func.engines.native.statements import Pointwise, Scatter, Statement, reads, writes

__all__ = ["Group", "in_place", "invariant", "schedule"]


@dataclass
class Group:
    """Statements in one loop nest: pointwise ones of one shape, or a single other one."""

    shape: Shape | None
    statements: list[Statement] = field(default_factory=list)


def schedule(statements: Iterable[Statement]) -> list[Group]:
    """Merges loops. A statement joins the last group of its shape that comes after all that it reads.

    Within a group it may read what the group has just computed at the same index: that stays in a register.
    """
    groups: list[Group] = []
    written: dict[Buffer, int] = {}
    for statement in statements:
        earliest = 0
        indices = _index_loads(statement)
        for load in reads(statement):
            if load.buffer in written:
                group = written[load.buffer]
                fits = load not in indices and _same_index(groups[group], statement, load)
                earliest = max(earliest, group if fits else group + 1)
        if isinstance(statement, Scatter) or (isinstance(statement, Pointwise) and statement.overwrites):
            earliest = max(earliest, written[writes(statement)] + 1)
        shape = statement.target.shape if isinstance(statement, Pointwise) else None
        fitting = [
            index for index in range(earliest, len(groups)) if shape is not None and groups[index].shape == shape
        ]
        if fitting:
            index = fitting[-1]
        else:
            index = len(groups)
            groups.append(Group(shape))
        groups[index].statements.append(statement)
        written[writes(statement)] = max(index, written.get(writes(statement), 0))
    return groups


def _index_loads(statement: Statement) -> set[Load]:
    """What a statement computes indices from: that comes from a loop of its own.

    GCC 12 miscompiles a vectorized loop that makes an index out of a bool and looks it up where there is no lane axis.
    """
    values = (index.value for load in reads(statement) for index in load.dynamic)
    return {leaf for value in values for leaf in leaves(value) if isinstance(leaf, Load)}


def _same_index(group: Group, statement: Statement, load: Load) -> bool:
    """Whether a statement could read what a group computes at the very index at which it is computed."""
    return (
        isinstance(statement, Pointwise)
        and load.is_whole
        and load.shape == statement.target.shape == group.shape
        and all(other.target.is_whole for other in group.statements if writes(other) is load.buffer)
    )


def invariant(statements: Sequence[Statement], moving: Iterable[Buffer]) -> set[Buffer]:
    """The buffers that are the same at every time step.

    Args:
        statements: of a step.
        moving: the inputs that change: carry and xs.
    """
    changing = set(moving)
    while True:
        more = {
            writes(statement) for statement in statements if any(load.buffer in changing for load in reads(statement))
        }
        if more <= changing:
            return {writes(statement) for statement in statements} - changing
        changing |= more


def in_place(groups: Sequence[Group], old: Sequence[Buffer], new: Sequence[Buffer | None]) -> dict[Buffer, Buffer]:
    """Which new carry can be written over the old one: no one reads the old after the new has been written.

    Args:
        groups: of a step, without what is invariant.
        old: the carry's buffers.
        new: what becomes of each; None for one that stays.

    Returns:
        From the new buffer to the old, where it may be; the others have to be copied at the end of a step.
    """
    first_write: dict[Buffer, int] = {}
    for index, group in enumerate(groups):
        for statement in group.statements:
            first_write.setdefault(writes(statement), index)
    merged: dict[Buffer, Buffer] = {}
    for before, after in zip(old, new, strict=True):
        if after is None or after not in first_write or after in merged:
            continue
        first = first_write[after]
        writers = [statement for statement in groups[first].statements if writes(statement) is after]
        late = (
            load
            for index, group in enumerate(groups[first:], start=first)
            for statement in group.statements
            for load in reads(statement)
            if load.buffer is before and not (index == first and _same_index(group, statement, load))
        )
        if all(writer.target.is_whole for writer in writers) and not any(late):
            merged[after] = before
    return merged
