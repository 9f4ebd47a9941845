"""`explain`: shows what an engine makes of a step, without running it or compiling anything."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from popart_func.engines.cost_model import OperationCounts, PredictedSeconds, predict_here
from popart_func.engines.engine import ENGINES, EngineLike, name_and_options
from popart_func.engines.lane_scan import LaneScan, UnsupportedError, make_lane_scan
from popart_func.engines.scans import Step
from popart_func.engines.selection import available_engines, choose_engines
from popart_func.engines.tracing.step_graph import StepGraph, TraceError
from popart_func.tree import PyTree

__all__ = ["Explanation", "explain"]

WIDTH = 120
"""Columns of the printed text; lines of the C++ or CUDA source are left as they are."""


@dataclass(frozen=True)
class Explanation:
    """What an engine makes of a step. Print it to read all of it.

    Attributes:
        asked: the engine that was asked for, with its options, or ``"auto"``.
        engine: the engine that would run the scan; None where it can't run, and `reasons` says why.
        reasons: for each other engine, or the one that can't run, why not.
        device: the device of the scan.
        lanes: how many lanes.
        steps: how many time steps.
        state_bytes: the bytes of one lane's state, which is its carry.
        graph: the traced step, None where it can't be traced; ``graph.with_source()`` shows it with the user's lines.
        why_no_graph: the error of tracing, None without one.
        counts: the operations of one lane in a step, as the cost model counts them.
        seconds: the predicted time of a step of all lanes, on a CPU.
        loops: the native engine's loops; None, as all of the native engine, where another engine was asked for.
        source: the C++ or CUDA source of its kernel.
        own_source: the same without the headers that every kernel has, as it is printed.
        memory_bytes: the bytes of all that the kernel stores for a lane, its state and its inputs at a step included.
        why_no_source: why the native engine has none, None where it has.
    """

    asked: str
    engine: str | None
    reasons: dict[str, str]
    device: torch.device
    lanes: int
    steps: int
    state_bytes: int
    graph: StepGraph | None = None
    why_no_graph: str | None = None
    counts: OperationCounts | None = None
    seconds: PredictedSeconds | None = None
    loops: str | None = None
    source: str | None = None
    own_source: str | None = None
    memory_bytes: int | None = None
    why_no_source: str | None = None

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in self._sections())

    def _sections(self) -> Iterator[tuple[str, str]]:
        yield "Engine", _wrapped("\n".join(self._choice()))
        yield "Graph", _wrapped(self.why_no_graph if self.graph is None else self.graph.with_source())
        yield "Cost", _wrapped("\n".join(self._costs()))
        if self.why_no_source is not None:
            yield "Native kernel", _wrapped(f"none: {self.why_no_source}")
        if self.loops is not None and self.source is not None:
            yield "Native kernel: loops", _wrapped(self.loops)
            yield "Native kernel: source, without its headers", (self.own_source or self.source).rstrip()

    def _choice(self) -> Iterator[str]:
        size = f"{_count(self.lanes, 'lane')}, {_count(self.steps, 'step')}, on {self.device}"
        yield f"engine={self.asked!r} takes {self.engine or 'none'}: {size}"
        for name, reason in self.reasons.items():
            yield f"not {name}: {reason.removeprefix(f'{name}: ').removeprefix(f'{name} ')}"

    def _costs(self) -> Iterator[str]:
        memory = "" if self.memory_bytes is None else f"; the native kernel stores {self.memory_bytes:,} bytes in all"
        yield f"a lane: {self.state_bytes:,} bytes of state{memory}"
        if self.counts is not None:
            nodes, products, others, widest = self.counts[:4]
            yield (
                f"a lane's step: {products:,} multiplications in matrix products, {others:,} other numbers, in "
                f"{_count(nodes, 'node')}; the widest number has {widest} bytes"
            )
        if self.seconds is not None:
            lanes, elements, inductor = (f"{1e6 * seconds:,.3g} µs" for seconds in self.seconds)
            yield (
                f"a step of all lanes, predicted: {lanes} on native with lanes in registers, {elements} with elements "
                f"in registers, {inductor} on inductor"
            )


def explain(
    step: Step,
    carry: PyTree,
    xs: PyTree = None,
    *,
    hparams: PyTree = None,
    shared: bool | PyTree | None = None,
    length: int | None = None,
    engine: EngineLike = "auto",
) -> Explanation:
    """Shows what an engine makes of a step: graph, loops, source, costs, and what ``"auto"`` chooses.

    It takes the arguments of `scan_lanes`, runs nothing and compiles nothing, and so needs no compiler.

    Args:
        step: as in `scan_lanes`.
        carry: leaves ``[lanes, ...]``.
        xs: leaves ``[time, lanes, ...]`` or ``[time, ...]``.
        hparams: leaves ``[lanes]``, or numbers.
        shared: which leaves of ``xs`` all lanes share.
        length: how many steps; needed only without ``xs``.
        engine: as in `scan_lanes`.

    Returns:
        The parts as fields; printed, all of it.

    Raises:
        TypeError, ValueError: as `scan_lanes`; but a step that can't be traced is explained, since `eager` runs it.

    >>> explained = explain(lambda c, x: (0.5 * c + x, c), torch.zeros(3), torch.ones(5), engine="eager")
    >>> print(explained.graph)
    arg0_1: float32[]
    arg1_1: float32[]
      mul: float32[] = mul(arg0_1, 0.5)
      add: float32[] = add(mul, arg1_1)
    return add, arg0_1
    2 operations: 1 mul, 1 add
    """
    scan = make_lane_scan("explain", step, carry, xs, hparams, shared=shared, length=length)
    asked = str(engine)
    engine, options = name_and_options(engine)
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"explain: `engine` must be 'auto' or one of {list(ENGINES)}, got {engine!r}.")
    parts: dict[str, Any] = {"state_bytes": sum(leaf[0].numel() * leaf.itemsize for leaf in scan.carry)}
    try:
        graph = scan.graph()
    except (TraceError, UnsupportedError) as error:
        parts["why_no_graph"] = str(error)
    else:
        counts = OperationCounts.of(graph)
        parts |= {"graph": graph, "counts": counts}
        parts |= _native_parts(scan, options) if engine in ("auto", "native") else {}
        parts["seconds"] = predict_here(scan.graph(), scan.lanes) if scan.device.type == "cpu" else None
    chosen, reasons = _chosen(engine, scan, parts.get("why_no_graph"), parts.get("why_no_source"))
    return Explanation(asked, chosen, reasons, scan.device, scan.lanes, scan.steps, **parts)


def _native_parts(scan: LaneScan, options: dict[str, Any]) -> dict[str, Any]:
    from popart_func.engines import native

    try:
        listing = native.listing(scan, **options)
    except UnsupportedError as error:
        return {"why_no_source": str(error)}
    names = ("loops", "source", "own_source", "memory_bytes")
    return {name: getattr(listing, name) for name in names}


def _chosen(
    asked: str, scan: LaneScan, why_no_graph: str | None, why_no_source: str | None
) -> tuple[str | None, dict[str, str]]:
    """The engine that would run, and why not the others; of a named engine only why it would not."""
    lacks = {"native": why_no_source} if why_no_source is not None else {}
    if why_no_graph is not None:
        lacks = {name: why_no_graph for name in ENGINES if name != "eager"}
    if asked == "auto":
        engines, reasons, _ = choose_engines(scan)
        taken = next(name for name in engines if name not in lacks)
        passed_over = engines[: engines.index(taken)]
        return taken, {**reasons, **{name: lacks[name] for name in passed_over}}
    unable = available_engines(scan.device)[asked]
    only_eager = scan.why_only_eager() if asked != "eager" else None
    reason = unable or (only_eager and f"{only_eager}. Use the engine 'eager'.") or lacks.get(asked)
    return (asked, {}) if reason is None else (None, {asked: reason})


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _wrapped(text: str | None) -> str:
    lines = (text or "").splitlines()
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent=" " * 6, break_long_words=False, drop_whitespace=True) or line
        for line in lines
    )
