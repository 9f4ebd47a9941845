"""Selects the engine of a scan: the one that the user names, or for ``engine="auto"`` the first that pays off."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from popart_func.engines.cost_model import why_inductor
from popart_func.engines.engine import ENGINES, EngineLike, load_engine, name_and_options
from popart_func.engines.lane_scan import EngineUnavailableError, LaneScan, UnsupportedError
from popart_func.engines.tracing.source_lines import TraceError, user_line
from popart_func.tree import PyTree

__all__ = ["Choice", "available_engines", "choose_engines", "resolve_engine", "run_scan"]


def available_engines(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Each engine, and why it can't run on a device, or None where it can.

    >>> available_engines()["eager"] is None
    True
    """
    return {name: load_engine(name).why_not(torch.device(device)) for name in ENGINES}


def resolve_engine(engine: EngineLike, device: torch.device | str, steps: int, *, caller: str = "scan") -> str:
    """The engine that ``"auto"`` means for a scan of so many steps, as text; any other engine stands for itself.

    It has not seen the step: a scan with ``engine="auto"`` takes `inductor` where the cost model says that the step is
    faster there.

    Raises:
        ValueError: no such engine.
        EngineUnavailableError: the engine can't run on the device; the message says why.

    >>> resolve_engine("auto", "cpu", steps=10)
    'eager'
    """
    device = torch.device(device)
    if engine == "auto":
        able, unable = _worthwhile(device, steps, steps)
        for notice in _notices(able[0], unable):
            _say_once(notice)
        return able[0]
    name, _ = name_and_options(engine)
    if name not in ENGINES:
        raise ValueError(f"{caller}: `engine` must be 'auto' or one of {list(ENGINES)}, got {engine!r}.")
    reason = load_engine(name).why_not(device)
    if reason is not None:
        raise EngineUnavailableError(f"{caller}: the engine {name!r} can't run on {device}: {reason}")
    return str(engine)


class Choice(NamedTuple):
    """What ``engine="auto"`` means for a scan.

    Attributes:
        engines: the engines to try in turn; the next one is for what an engine does not support.
        reasons: why each engine before or beside them is not taken.
        notices: those of the reasons that the user is warned of.
    """

    engines: tuple[str, ...]
    reasons: dict[str, str]
    notices: tuple[str, ...]


def choose_engines(scan: LaneScan) -> Choice:
    """The engines that ``engine="auto"`` tries for a scan, and why not others."""
    only_eager = scan.why_only_eager()
    if only_eager is not None:
        return Choice(("eager",), {name: f"{only_eager}." for name in ENGINES if name != "eager"}, ())
    before = _steps_before(scan)
    able, unable = _worthwhile(scan.device, scan.steps, before + scan.steps)
    earlier = f", after {before} in earlier calls" if before else ""
    brief = {
        name: f"it pays off from {load_engine(name).pays_off_after} steps on, and this scan has {scan.steps}{earlier}."
        for name in ENGINES
        if name not in able and name not in unable
    }
    reasons = {**brief, **unable}
    if able[0] != "eager":
        try:
            scan.graph()
        except (TraceError, UnsupportedError) as error:
            lacks = {name: str(error) for name in ENGINES if name != "eager"}
            return Choice(("eager",), lacks, (f"engine 'auto': {error} Going on with eager.",))
    faster = why_inductor(scan) if able[0] == "native" else None
    if faster is None or load_engine("inductor").why_not(scan.device) is not None:
        return Choice(tuple(able), reasons, _notices(able[0], unable))
    reasons = {name: reason for name, reason in reasons.items() if name != "inductor"} | {"native": faster}
    in_turn = "inductor", *(name for name in able if name != "inductor")
    return Choice(in_turn, reasons, _notices("inductor", {"native": faster}))


def run_scan(engine: EngineLike, scan: LaneScan) -> tuple[PyTree, PyTree]:
    """Runs a scan on the engine that is asked for, or on the first of ``engine="auto"`` that supports the step.

    Raises:
        ValueError, EngineUnavailableError: as `resolve_engine`.
        UnsupportedError: the engine that is asked for lacks something that the step needs.
    """
    try:
        if engine != "auto":
            name, options = name_and_options(_named(engine, scan))
            return load_engine(name).run(scan, **options)
        choice = choose_engines(scan)
        for notice in choice.notices:
            _say_once(notice)
        for name, following in zip(choice.engines, choice.engines[1:], strict=False):
            try:
                result = load_engine(name).run(scan)
            except UnsupportedError as error:
                _say_once(f"engine 'auto': {error} Going on with {following}.")
            else:
                _add_steps(scan, name)
                return result
        _add_steps(scan, choice.engines[-1])
        return load_engine(choice.engines[-1]).run(scan)
    except Exception as error:
        message = error.args[0] if error.args else None
        if isinstance(message, str) and message.startswith(tuple(f"{name}: " for name in ENGINES)):
            error.args = (f"{scan.caller}: {message}", *error.args[1:])  # an engine does not know who has called it
        raise


_totals: weakref.WeakKeyDictionary[Callable[..., Any], dict[Hashable, int]] = weakref.WeakKeyDictionary()
"""For each step function, as long as it lives, the steps that ``engine="auto"`` has taken, by the shapes of a scan."""


def _shapes(scan: LaneScan) -> Hashable:
    leaves = (*scan.carry, *scan.xs, *scan.hparams)
    return scan.structure, scan.device, scan.shared, tuple((leaf.dtype, leaf.shape[1:]) for leaf in leaves)


def _steps_before(scan: LaneScan) -> int:
    """The steps that earlier calls of the same scan have taken."""
    try:
        return _totals.get(scan.step, {}).get(_shapes(scan), 0)
    except TypeError:  # a callable without a hash, or without weak references
        return 0


def _add_steps(scan: LaneScan, engine: str) -> None:
    """Adds a scan's steps to those of earlier calls; to none where it has run on eager although others would pay off.

    What they lack is asked again after as many steps, not in each call: finding it takes as long as tracing.
    """
    total = _steps_before(scan) + scan.steps
    refused = engine == "eager" and total >= min(
        load_engine(name).pays_off_after for name in ENGINES if name != "eager"
    )
    with contextlib.suppress(TypeError):
        _totals.setdefault(scan.step, {})[_shapes(scan)] = 0 if refused else total


def _named(engine: EngineLike, scan: LaneScan) -> str:
    text, reason = resolve_engine(engine, scan.device, scan.steps, caller=scan.caller), scan.why_only_eager()
    name, _ = name_and_options(text)
    if reason is not None and name != "eager":
        raise EngineUnavailableError(
            f"{scan.caller}: the engine {name!r} can't do this: {reason}. Use the engine 'eager'."
        )
    return text


def _worthwhile(device: torch.device, steps: int, total: int) -> tuple[list[str], dict[str, str]]:
    """The engines that pay off and can run, best first; and why others that would pay off can't run.

    ``steps`` are those of this call, ``total`` those of earlier calls of the same scan as well.
    """
    able, unable = [], {}
    for name in ENGINES:
        engine = load_engine(name)
        if (total if engine.compiles_once else steps) >= engine.pays_off_after:
            reason = engine.why_not(device)
            if reason is None:
                able.append(name)
            else:
                unable[name] = f"{name} can't run on {device}: {reason}"
    return able, unable


def _notices(chosen: str, reasons: dict[str, str]) -> tuple[str, ...]:
    """What to warn the user of: why the engines that are preferred to the chosen one are not taken."""
    better = ENGINES[: ENGINES.index(chosen)]
    return tuple(f"engine 'auto': {reasons[name]} Going on with {chosen}." for name in better if name in reasons)


@functools.cache
def _say_once(message: str) -> None:
    """Warns, with the user's line, once for each message."""
    line = user_line(sys._getframe(1))
    if line is None:
        warnings.warn(message, stacklevel=2)
    else:
        warnings.warn_explicit(message, UserWarning, *line)
