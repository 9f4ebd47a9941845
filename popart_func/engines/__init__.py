"""Engines: one step, written for one lane, scanned over time in thousands of lanes.

`eager` defines what is right; every other engine is tested to agree with it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import optree
import torch

from popart_func.engines.lane_scan import (
    EngineUnavailableError,
    LaneScan,
    UnsupportedError,
    check_tensors,
    make_lane_scan,
)
from popart_func.engines.tracing.start_up import without_collector
from popart_func.tree import PyTree

__all__ = [
    "ENGINES",
    "EngineUnavailableError",
    "UnsupportedError",
    "available_engines",
    "resolve_engine",
    "scan",
    "scan_lanes",
]

ENGINES = ("native", "inductor", "eager")
"""All engines, in the order in which ``engine="auto"`` prefers them."""

Step = Callable[..., tuple[PyTree, PyTree]]


def scan(
    step: Step, carry: PyTree, xs: PyTree = None, *, length: int | None = None, engine: str = "auto"
) -> tuple[PyTree, PyTree]:
    """Applies a step along the leading axis of ``xs``, handing a carry on: `jax.lax.scan`.

    It is `scan_lanes` with one lane.

    Args:
        step: pure, ``step(carry, x) -> (carry, y)``; the carry keeps its structure, shapes and dtypes.
        carry: a pytree of tensors.
        xs: a pytree of tensors ``[time, ...]``, or None.
        length: how many steps; needed only without ``xs``.
        engine: one of `ENGINES`, or ``"auto"``; see `scan_lanes`.

    Returns:
        The last carry, and the ys stacked on a leading time axis.

    Raises:
        TypeError, ValueError: as `scan_lanes`.
        EngineUnavailableError: the engine can't run here.

    >>> scan(lambda total, x: (total + x, total), torch.tensor(0), torch.arange(4))
    (tensor(6), tensor([0, 0, 1, 3]))
    """
    check_tensors("scan", "carry", carry)
    one = optree.tree_map(lambda leaf: leaf[None], carry)
    lanes = make_lane_scan("scan", step, one, xs, shared=True, length=length)
    carry, ys = _run(engine, lanes)
    return optree.tree_map(lambda leaf: leaf[0], carry), optree.tree_map(lambda leaf: leaf[:, 0], ys)


def scan_lanes(
    step: Step,
    carry: PyTree,
    xs: PyTree = None,
    *,
    hparams: PyTree = None,
    shared: bool | PyTree | None = None,
    length: int | None = None,
    engine: str = "auto",
) -> tuple[PyTree, PyTree]:
    """`scan` in many lanes at once: a lane is one seed with one setting of the hyper-parameters.

    Engines other than `eager` trace a step once for its shapes and dtypes, as `jax.jit` does: a name or an entry of a
    dictionary that it closes over and that is bound to something else afterwards is not seen. The values of tensors
    that it closes over are read anew by each call, so that what is written into them is seen. What changes from call to
    call belongs into the carry, the xs or the hyper-parameters. Gradients flow through `eager` only, which ``"auto"``
    then picks.

    Args:
        step: pure, written for one lane: ``step(carry, x)``, or ``step(carry, x, hparams)`` with this lane's 0-d
            hyper-parameters, so that a learner can be built inside the step.
        carry: a pytree of tensors ``[lanes, ...]``.
        xs: a pytree of tensors, ``[time, lanes, ...]`` or, read by all lanes alike and stored once, ``[time, ...]``.
        hparams: a pytree of tensors ``[lanes]``, or of numbers and 0-d tensors, the same in all lanes.
        shared: which leaves of ``xs`` all lanes share: True, False, or a tree of them (a prefix of ``xs`` will do).
            If not given, a leaf is taken to be per lane when its second axis is as long as there are lanes: say it
            where a shared leaf's second axis may have that length by chance.
        length: how many steps; needed only without ``xs``.
        engine: one of `ENGINES`, or ``"auto"``: the first of them that can run here and pays off; but `inductor` where
            few lanes of large matrix products make that faster (the rule is in `popart_func.engines.cost_model`).

    Returns:
        The last carry, leaves ``[lanes, ...]``, and the ys, leaves ``[time, lanes, ...]``.

    Raises:
        TypeError: the step returns something else than a carry as it took it, and tensors; or it is not pure.
        ValueError: axes that do not fit, several devices, or an unknown engine.
        EngineUnavailableError: the engine can't run here; the message says why.

    >>> carry, ys = scan_lanes(lambda c, x, h: (c + h * x, c), torch.zeros(3), torch.ones(5), hparams=torch.arange(3.0))
    >>> carry, ys.shape
    (tensor([ 0.,  5., 10.]), torch.Size([5, 3]))
    """
    lanes = make_lane_scan("scan_lanes", step, carry, xs, hparams, shared=shared, length=length)
    return _run(engine, lanes)


def available_engines(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Each engine, and why it can't run on a device, or None where it can.

    >>> available_engines()["eager"] is None
    True
    """
    return {name: _module(name).why_not(torch.device(device)) for name in ENGINES}


PAYS_OFF = {"native": 500, "inductor": 2000, "eager": 0}
"""From how many steps on an engine's compile time is earned back against `eager`.

`native` traces and compiles for about 1 s, in which `eager` takes 700 steps of 50 lanes or 200 of 1000 lanes;
`inductor` takes 6 to 10 s.
"""


def resolve_engine(engine: str, device: torch.device | str, steps: int, *, caller: str = "scan") -> str:
    """The engine that ``"auto"`` means for a scan of so many steps; any other name stands for itself.

    It has not seen the step: a scan that is left to ``"auto"`` takes `inductor` where that step is faster there.

    Raises:
        ValueError: no such engine.
        EngineUnavailableError: the engine can't run on the device; the message says why.

    >>> resolve_engine("auto", "cpu", steps=10)
    'eager'
    """
    device = torch.device(device)
    if engine == "auto":
        candidates = [name for name in ENGINES if steps >= PAYS_OFF[name]]
        reasons = {name: _module(name).why_not(device) for name in candidates}
        chosen = next(name for name in candidates if reasons[name] is None)
        for name in candidates[: candidates.index(chosen)]:
            _say_once(f"engine 'auto': {name} can't run on {device}: {reasons[name]} Going on with {chosen}.")
        return chosen
    if engine not in ENGINES:
        raise ValueError(f"{caller}: `engine` must be 'auto' or one of {list(ENGINES)}, got {engine!r}.")
    reason = _module(engine).why_not(device)
    if reason is not None:
        raise EngineUnavailableError(f"{caller}: the engine {engine!r} can't run on {device}: {reason}")
    return engine


def _run(engine: str, lanes: LaneScan) -> tuple[PyTree, PyTree]:
    reason = lanes.why_only_eager()
    if reason is not None and engine == "auto":
        engine = "eager"
    name = resolve_engine(engine, lanes.device, lanes.steps)
    if reason is not None and name != "eager":
        raise EngineUnavailableError(f"scan: the engine {name!r} can't do this: {reason}. Use the engine 'eager'.")
    if engine != "auto":
        return _module(name).run(lanes)
    first, *others = _in_turn(name, lanes)
    for other in others:
        try:
            return _module(first).run(lanes)
        except UnsupportedError as error:
            _say_once(f"engine 'auto': {error} Going on with {other}.", stacklevel=4)
            first = other
    return _module(first).run(lanes)


def _in_turn(first: str, lanes: LaneScan) -> list[str]:
    """The engines that ``"auto"`` tries, one after the other."""
    names = [name for name in ENGINES[ENGINES.index(first) :] if lanes.steps >= PAYS_OFF[name]]
    if first == "native":
        from popart_func.engines.cost_model import why_inductor

        reason = why_inductor(lanes)
        if reason is not None and _module("inductor").why_not(lanes.device) is None:
            _say_once(f"engine 'auto': {reason} Going on with inductor.")
            return ["inductor", *(name for name in names if name != "inductor")]
    return names


def _module(name: str) -> ModuleType:
    with without_collector():
        return importlib.import_module(f"popart_func.engines.{name}")


@functools.cache
def _say_once(message: str, stacklevel: int = 5) -> None:
    warnings.warn(message, stacklevel=stacklevel)
