"""`scan` and `scan_lanes`: one step over time, in one lane or in thousands."""

from __future__ import annotations

from collections.abc import Callable

import optree

from popart_func._checks import check_count
from popart_func._torch import is_transforming
from popart_func.engines.engine import EngineLike
from popart_func.engines.lane_scan import EngineUnavailableError, make_lane_scan
from popart_func.engines.loops.api import inner_scan
from popart_func.engines.loops.arguments import check_tensors
from popart_func.engines.loops.torch_loops import torch_loops
from popart_func.engines.only_eager import why_context_needs_eager
from popart_func.engines.selection import resolve_engine, run_scan
from popart_func.engines.tracing.plain_paths import further_paths
from popart_func.engines.tracing.recorder import is_recording
from popart_func.tree import PyTree

__all__ = ["Step", "scan", "scan_lanes"]

further_paths.append(torch_loops)

Step = Callable[..., tuple[PyTree, PyTree]]
"""``step(carry, x) -> (carry, y)``, or ``step(carry, x, hparams) -> (carry, y)``."""


def scan(
    step: Step,
    carry: PyTree,
    xs: PyTree = None,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int = 1,
    checkpoint: int | None = None,
    engine: EngineLike = "auto",
) -> tuple[PyTree, PyTree]:
    """Applies a step along the leading axis of ``xs`` and passes a carry from step to step, as `jax.lax.scan` does.

    The outermost scan is `scan_lanes` with one lane. Inside a step it becomes one node of the graph, whose body is
    traced once, whatever its length, and which all transforms of `torch.func` may transform; inside a transform alone
    it runs in Python.

    Args:
        step: pure, ``step(carry, x) -> (carry, y)``; the carry keeps its structure, shapes and dtypes.
        carry: a pytree of tensors.
        xs: a pytree of tensors ``[time, ...]``, or None.
        length: how many steps; needed only without ``xs``.
        reverse: whether the last x comes first; the ys stay in the order of the xs.
        unroll: how many steps JAX may write as one, a hint.
        checkpoint: if given, the gradient of a scan in a traced step stores the carry every so many steps, and computes
            what is between again: less memory, up to twice the time.
        engine: one of `ENGINES`, an object with its options, or ``"auto"``; see `scan_lanes`. Only the outermost scan
            may name one.

    Returns:
        The last carry, and the ys stacked on a leading time axis.

    Raises:
        TypeError, ValueError: as `scan_lanes`; or ``unroll`` or ``checkpoint`` is no integer of at least 1.
        EngineUnavailableError: the engine can't run here.

    >>> import torch
    >>> scan(lambda total, x: (total + x, total), torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 1, 3]))
    """
    check_count("scan", "unroll", unroll)
    if checkpoint is not None:
        check_count("scan", "checkpoint", checkpoint)
    has_rounds = length != 0 and all(leaf.shape[:1] != (0,) for leaf in check_tensors("scan", "`xs`", xs))
    if is_recording() or is_transforming() or not has_rounds:
        reason = why_context_needs_eager()
        if resolve_engine(engine, "cpu", 1, caller="scan") != "eager" and reason is not None:
            raise EngineUnavailableError(
                f"scan: the engine {engine!r} can't do this: {reason}. Use the engine 'eager', or name one for the "
                f"outermost scan."
            )
        return inner_scan(step, carry, xs, length=length, reverse=reverse, unroll=unroll, checkpoint=checkpoint)
    check_tensors("scan", "`carry`", carry)
    if reverse:
        xs = optree.tree_map(lambda leaf: leaf.flip(0), xs)
    one = optree.tree_map(lambda leaf: leaf.unsqueeze(0), carry)
    lanes = make_lane_scan("scan", step, one, xs, shared=True, length=length)
    carry, ys = run_scan(engine, lanes)
    ys = optree.tree_map(lambda leaf: leaf.squeeze(1).flip(0) if reverse else leaf.squeeze(1), ys)
    return optree.tree_map(lambda leaf: leaf.squeeze(0), carry), ys


def scan_lanes(
    step: Step,
    carry: PyTree,
    xs: PyTree = None,
    *,
    hparams: PyTree = None,
    shared: bool | PyTree | None = None,
    length: int | None = None,
    engine: EngineLike = "auto",
) -> tuple[PyTree, PyTree]:
    """Runs `scan` in many lanes at once: a lane is one seed with one setting of the hyper-parameters.

    Engines other than `eager` trace a step once for its shapes and dtypes, as `jax.jit` does. If a name or an entry of
    a dictionary that the step closes over is bound to something else afterwards, the engine does not see it. Each call
    reads the values of closed-over tensors again, so that it sees what is written into them. Pass what changes from
    call to call in the carry, the xs or the hyper-parameters. Gradients flow through `eager` only, which ``"auto"``
    takes then. Engines agree to rounding only, and ``"auto"`` may change the engine between calls of the same scan, as
    described below: name an engine where results must be equal to the bit. On a CPU ``"native"`` has two schedules, and
    takes the faster one for the shapes and the number of lanes: its bits may change with the number of lanes, unless
    ``engine=Native(schedule=...)`` names one. `popart_func.engines.explain` shows what an engine makes of a step.

    Args:
        step: pure, written for one lane: ``step(carry, x)``, or ``step(carry, x, hparams)`` with this lane's 0-d
            hyper-parameters, so that a learner can be built inside the step.
        carry: a pytree of tensors ``[lanes, ...]``.
        xs: a pytree of tensors, ``[time, lanes, ...]`` or, read by all lanes alike and stored once, ``[time, ...]``.
        hparams: a pytree of tensors ``[lanes]``, or of numbers and 0-d tensors, the same in all lanes. An integer
            becomes int64, a bool stays one, and a float takes the carry's precision.
        shared: which leaves of ``xs`` all lanes share: True, False, or a tree of them (a prefix of ``xs`` will do).
            If not given, a leaf is taken to be per lane when its second axis is as long as there are lanes: say it
            where a shared leaf's second axis may have that length by chance.
        length: how many steps; needed only without ``xs``.
        engine: one of `ENGINES`; an object with an engine's options, such as ``Native(schedule="elements")``; or
            ``"auto"``: the first of `ENGINES` that can run here and pays off, but `inductor` where large matrix
            products make that faster (the rule is in `popart_func.engines.cost_model`). The steps of all calls with the
            same step function, shapes and dtypes add up: a short scan that is repeated moves from `eager` to `native`
            once that pays off. Keep the function for that: a lambda or a bound method that is made anew in each call is
            another function.

    Returns:
        The last carry, leaves ``[lanes, ...]``, and the ys, leaves ``[time, lanes, ...]``.

    Raises:
        TypeError: the step returns a carry of another structure, shape or dtype than it takes, or something that is not
            a tensor; or it is not pure.
        ValueError: axes that do not fit, several devices, or an unknown engine.
        EngineUnavailableError: the engine can't run here; the message says why.
        UnsupportedError: the engine that ``engine`` names lacks an op, dtype or shape that the step needs.

    >>> import torch
    >>> carry, ys = scan_lanes(lambda c, x, h: (c + h * x, c), torch.zeros(3), torch.ones(5), hparams=torch.arange(3.0))
    >>> carry, ys.shape
    (tensor([ 0.,  5., 10.]), torch.Size([5, 3]))
    """
    lanes = make_lane_scan("scan_lanes", step, carry, xs, hparams, shared=shared, length=length)
    return run_scan(engine, lanes)
