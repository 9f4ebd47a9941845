"""Memory shared by buffers that are not needed at the same time, so that what a step stores stays in cache."""

from __future__ import annotations

from collections.abc import Collection

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.statements import Nested, Statement, reads, writes

__all__ = ["share_memory"]


def share_memory(plan: KernelPlan, among: Collection[Buffer] | None = None) -> KernelPlan:
    """The plan with the memory of some buffers given to later ones; ``among``: the buffers that may share it, or all.

    A buffer that only one time step needs, or only one round of a loop inside the step, lies where an earlier one of
    the same dtype and at least its size has lain, if the loop nests that use the two do not overlap.
    """
    lives = _memory_lives(plan)
    merged, left = dict(plan.merged), []
    free: list[tuple[int, Buffer]] = []  # the nest after which a buffer's memory is free, and the buffer
    for buffer in sorted(plan.buffers, key=lambda buffer: lives.get(buffer, (-1, -1))):
        if buffer not in lives or (among is not None and buffer not in among):
            left.append(buffer)
            continue
        begin, end = lives[buffer]
        fitting = [
            (last, of) for last, of in free if last < begin and of.dtype == buffer.dtype and of.numel >= buffer.numel
        ]
        if fitting:
            # The smallest one that is large enough, so that a large one is left for a large buffer; of several the one
            # that was used last, which is in cache.
            taken = min(fitting, key=lambda pair: (pair[1].numel, -pair[0]))
            free.remove(taken)
            merged[buffer] = taken[1]
        else:
            left.append(buffer)
        free.append((end, merged.get(buffer, buffer)))
    return plan._replace(merged=merged, buffers=left)


def _memory_lives(plan: KernelPlan) -> dict[Buffer, tuple[int, int]]:
    """When the memory of each buffer is in use that no other time step needs: its first and its last loop nest."""
    storage, (lives, _) = plan.storage(), _lives(plan, 0)
    kept = {storage.place_of(buffer) for buffer in _kept(plan)} | storage.local | storage.windows.keys()
    found: dict[Buffer, tuple[int, int]] = {}
    for buffer, life in lives.items():
        place = storage.place_of(buffer)
        if place not in kept:
            found[place] = _joined(life, found.get(place, life))
    return found


def _lives(plan: KernelPlan, number: int) -> tuple[dict[Buffer, tuple[int, int]], int]:
    """The first and the last loop nest that uses each buffer, where nests count from a number; and the next number.

    The nests in the bodies of loops count, too. What a body keeps from round to round, and what it has of the program
    around it, is in use in the whole loop.
    """
    lives: dict[Buffer, tuple[int, int]] = {}
    for nest in (*plan.once, *plan.always):
        begin, used = number, {buffer for statement in nest.statements for buffer in _touched(statement)}
        for part in (part for statement in nest.statements for part in _parts(plan, statement)):
            inside, number = _lives(part, number)
            used |= _kept(part)
            lives |= {buffer: life for buffer, life in inside.items() if buffer not in used}
        lives |= {buffer: _joined((begin, number), lives.get(buffer, (begin, number))) for buffer in used}
        number += 1
    return lives, number


def _kept(plan: KernelPlan) -> set[Buffer]:
    """The buffers of a program that are needed from round to round, or come from the program around it or go there."""
    program = plan.program
    early = (writes(statement) for nest in plan.once for statement in nest.statements)
    return {*program.inputs, *program.ys, *(new for new in program.carry if new is not None), *early}


def _touched(statement: Statement) -> set[Buffer]:
    """The buffers of its own program that a statement reads or writes."""
    touched = {writes(statement), *(load.buffer for load in reads(statement))}
    if isinstance(statement, Nested):
        touched |= {window.whole for window in statement.windows}
        touched |= {load.buffer for load in statement.loads_of_results}
    return touched


def _parts(plan: KernelPlan, statement: Statement) -> list[KernelPlan]:
    return plan.nested[statement] if isinstance(statement, Nested) else []


def _joined(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], other[0]), max(one[1], other[1])
