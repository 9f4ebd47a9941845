"""Memory shared by buffers that are not needed at the same time, so that what a step stores stays in cache."""

from __future__ import annotations

from popart_func.engines.native.expressions import Buffer
from popart_func.engines.native.plan import KernelPlan
from popart_func.engines.native.statements import reads, writes

__all__ = ["share_memory"]


def share_memory(plan: KernelPlan) -> KernelPlan:
    """The plan with the memory of some buffers given to later ones.

    A buffer that only one time step needs lies where an earlier one of the same dtype and at least its size has lain,
    if the loop nests that use the two do not overlap. A plan with loops inside the step stays as it is.
    """
    if plan.nested:  # the bodies of loops use the plan's buffers, too, at times that are not followed here
        return plan
    lives = _lives(plan)
    merged, left = dict(plan.merged), []
    free: list[tuple[int, Buffer]] = []  # the nest after which a buffer's memory is free, and the buffer
    for buffer in sorted(plan.buffers, key=lambda buffer: lives.get(buffer, (-1, -1))):
        if buffer not in lives:
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


def _lives(plan: KernelPlan) -> dict[Buffer, tuple[int, int]]:
    """For each buffer that only one time step needs, the first and the last loop nest that uses it."""
    kept = {*plan.program.inputs, *plan.program.carry, *plan.program.ys}
    kept |= {writes(statement) for nest in plan.once for statement in nest.statements}
    kept |= {load.buffer for nest in plan.once for statement in nest.statements for load in reads(statement)}
    lives: dict[Buffer, tuple[int, int]] = {}
    for index, nest in enumerate(plan.always):
        for statement in nest.statements:
            for buffer in (writes(statement), *(load.buffer for load in reads(statement))):
                if buffer not in kept and buffer not in plan.local:
                    lives[buffer] = (lives.get(buffer, (index, index))[0], index)
    return lives
