"""The input of an engine: one step, scanned over time in many lanes, with its arguments checked and flattened."""

from __future__ import annotations

import contextlib
import functools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from popart_func.engines.lane_errors import named_errors
from popart_func.engines.loops.arguments import check_function, check_tensors
from popart_func.engines.only_eager import FREED, why_context_needs_eager, why_tensor_needs_eager
from popart_func.engines.tracing.batchable import Batchable
from popart_func.engines.tracing.plain_paths import further_paths
from popart_func.engines.tracing.source_lines import describe_line, error_line
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec, TraceError, describe
from popart_func.engines.tracing.tracer import trace_step
from popart_func.tree import PyTree

__all__ = [
    "PURE",
    "EngineUnavailableError",
    "LaneScan",
    "NotLoweredError",
    "UnsupportedError",
    "check_carry",
    "make_lane_scan",
    "refuse_gradient",
    "summary",
]


class EngineUnavailableError(RuntimeError):
    """The engine that the user named can't run here; the message says why and what to do."""


class UnsupportedError(NotImplementedError):
    """An engine lacks an op, dtype or shape that a step needs; the message names it and the line of the step."""


class NotLoweredError(NotImplementedError):
    """A lowering refuses its arguments; the message says which. Simpler ops compose the op then, if they can."""


PURE = "a step must be pure. Write `x = x + 1` instead of `x += 1`, or change a copy, `x = x.clone()`."


@dataclass(frozen=True)
class LaneScan:
    """A scan over time in many lanes, flattened in the order of optree's leaves.

    Attributes:
        caller: the function that the user has called, for errors.
        step: pure, of one lane: ``step(carry, x)`` or ``step(carry, x, hparams)`` -> ``(carry, y)``.
        structure: the structure of the step's tuple of arguments.
        carry: leaves ``[lanes, ...]``.
        xs: leaves ``[steps, ...]`` where `shared`, else ``[steps, lanes, ...]``.
        shared: for each leaf of ``xs`` whether all lanes read the same.
        hparams: leaves ``[lanes]``.
        lanes: how many lanes.
        steps: how many time steps.
        device: the device of all tensors.
    """

    caller: str
    step: Callable[..., Any]
    structure: optree.PyTreeSpec
    carry: tuple[Tensor, ...]
    xs: tuple[Tensor, ...]
    shared: tuple[bool, ...]
    hparams: tuple[Tensor, ...]
    lanes: int
    steps: int
    device: torch.device
    _graphs: list[StepGraph] = field(default_factory=list, init=False, repr=False, compare=False)  # one, once traced

    def one_lane(self) -> tuple[TensorSpec, ...]:
        """The specs of one lane's arguments of the step, flat."""
        leaves = (*self.carry, *self.xs, *self.hparams)
        return tuple(
            TensorSpec(tuple(leaf.shape[outer:]), leaf.dtype, leaf.device)
            for leaf, outer in zip(leaves, self.outer_axes(), strict=True)
        )

    def outer_axes(self) -> list[int]:
        """How many axes of each argument, time and lanes, lie outside of what one lane reads in one step."""
        return [1] * len(self.carry) + [1 if shared else 2 for shared in self.shared] + [1] * len(self.hparams)

    def graph(self) -> StepGraph:
        """The step's graph. It is traced in the first scan of these shapes, and looked up once in each scan.

        Raises:
            TraceError: the step can't be a graph, or changes an argument in place.
            UnsupportedError: it uses something of PyTorch that can't be traced, or a tensor that only eager can read.
            TypeError: it does not return a carry of the structure, shapes and dtypes that it takes.
        """
        if not self._graphs:
            self._graphs.append(self._traced())
        return self._graphs[0]

    def _traced(self) -> StepGraph:
        inputs = self.one_lane()
        check = functools.partial(check_carry, self)
        try:
            graph = trace_step(self.step, self.structure, inputs, caller=self.caller, check=check)
        except (TraceError, UnsupportedError, Warning):  # a warning, where filters make errors of them
            raise
        except Exception as error:
            failure = error
        else:
            self._refuse(graph)
            return graph
        advice = "The engine 'eager' runs it as it is."
        if "HigherOrderOperator" in str(failure):
            advice = "Use scan, while_loop, fori_loop or cond of popart_func instead of PyTorch's own loops."
        else:
            self._run_first_step()  # raises an error of the step's own
        raise UnsupportedError(
            f"{self.caller}: the step can't be traced, in {describe_line(error_line(failure))}: {summary(failure)} "
            f"{advice}"
        ) from failure

    def _run_first_step(self) -> None:
        """Runs the first step as `eager` does."""

        def step(*leaves: Tensor) -> list[Tensor]:
            result: PyTree = check_carry(self, self.step(*optree.tree_unflatten(self.structure, leaves)))
            return optree.tree_leaves(result)

        with named_errors(self.caller), Batchable(), contextlib.ExitStack() as others:
            for other in further_paths:
                others.enter_context(other())
            vmap(step, in_dims=self.lane_axes())(*self.carry, *(leaf[0] for leaf in self.xs), *self.hparams)

    def _refuse(self, graph: StepGraph) -> None:
        """Raises if no compiled engine may run a graph."""
        reason = next(filter(None, map(why_tensor_needs_eager, graph.constants)), None)
        if reason == FREED:
            raise ValueError(f"{self.caller}: the step closes over a tensor whose memory has been freed.")
        if reason is not None:
            raise UnsupportedError(f"{self.caller}: the step closes over a tensor: {reason}. Use the engine 'eager'.")
        if graph.change is not None:
            raise TraceError(
                f"{self.caller}: `step` changes an argument, or a tensor that it closes over, in place in "
                f"{describe(graph.change)}: {PURE}"
            )

    def why_only_eager(self) -> str | None:
        """Why no compiled engine can run it, or None; `only_eager` has the reasons beside autograd.

        What the step closes over is known once it is traced: `graph` refuses that.
        """
        tensors = (*self.carry, *self.xs, *self.hparams)
        reason = why_context_needs_eager() or next(filter(None, map(why_tensor_needs_eager, tensors)), None)
        if reason is not None:
            return reason
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tensors):
            return "no gradient flows through it, and an input requires one"
        return None

    def lane_axes(self) -> tuple[int | None, ...]:
        """The lane axis of each argument of one time step: 0, or None where all lanes share it."""
        return (
            *(0 for _ in self.carry),
            *(None if shared else 0 for shared in self.shared),
            *(0 for _ in self.hparams),
        )


def summary(error: Exception) -> str:
    """The type and the first sentence of an error of PyTorch's, without addresses, so that it reads alike each time."""
    first = next(filter(None, str(error).splitlines()), "")
    plain = re.sub(r" object at 0x[0-9a-f]+", "", first).split(".Hint")[0].removesuffix(".")
    return f"{type(error).__name__}: {textwrap.shorten(plain, 300, placeholder=' ...')}."


def refuse_gradient(engine: str, wants_gradient: bool) -> None:
    """Raises if a step closes over a tensor that requires a gradient while gradients are recorded."""
    if wants_gradient and torch.is_grad_enabled():
        raise UnsupportedError(
            f"{engine}: no gradient flows through it, and the step closes over a tensor that requires one: run it "
            f"under torch.no_grad(), detach the tensor, or use the engine 'eager'."
        )


def make_lane_scan(
    caller: str,
    step: Callable[..., Any],
    carry: PyTree,
    xs: PyTree,
    hparams: PyTree = None,
    *,
    shared: bool | PyTree | None = None,
    length: int | None = None,
) -> LaneScan:
    """Checks and flattens the arguments of `scan_lanes`."""
    check_function(caller, "step", step)
    carry_leaves = tuple(check_tensors(caller, "`carry`", carry))
    xs_leaves = tuple(check_tensors(caller, "`xs`", xs))
    if not carry_leaves:
        raise ValueError(f"{caller}: `carry` must have at least one tensor, which says how many lanes there are.")
    lanes = _common_axis(caller, "carry", carry, carry_leaves, "lane")
    steps = _common_axis(caller, "xs", xs, xs_leaves, "time") if xs_leaves else length
    if steps is None:
        raise ValueError(f"{caller}: `xs` has no tensors, so `length` must say how many steps to take.")
    if length is not None and length != steps:
        raise ValueError(f"{caller}: `length` must be the leading axis of `xs`, {steps}, got {length}.")
    if steps < 1 or lanes < 1:
        raise ValueError(
            f"{caller}: there must be at least one step and one lane, got {steps} steps and {lanes} lanes."
        )
    arguments: PyTree = (carry, xs) if hparams is None else (carry, xs, hparams)
    doubles = any(leaf.dtype == torch.float64 for leaf in carry_leaves)
    dtype, device = torch.float64 if doubles else torch.get_default_dtype(), carry_leaves[0].device
    hparam_leaves = tuple(_hparam(caller, leaf, lanes, dtype, device) for leaf in optree.tree_leaves(hparams))
    devices = {leaf.device for leaf in (*carry_leaves, *xs_leaves, *hparam_leaves)}
    if len(devices) > 1:
        raise ValueError(f"{caller}: all tensors must lie on one device, got {sorted(map(str, devices))}.")
    return LaneScan(
        caller=caller,
        step=step,
        structure=optree.tree_structure(arguments),
        carry=carry_leaves,
        xs=xs_leaves,
        shared=_which_are_shared(caller, xs, xs_leaves, shared, lanes),
        hparams=hparam_leaves,
        lanes=lanes,
        steps=steps,
        device=devices.pop(),
    )


def check_carry(scan: LaneScan, result: Any) -> tuple[PyTree, PyTree]:
    """Returns the step's ``(carry, y)``.

    Raises:
        TypeError: the carry has another structure, shape or dtype than the one that went in; or a leaf is no tensor.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        name = "a tensor" if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"{scan.caller}: `step` must return (carry, y), got {name}.")
    carry, y = result
    expected = scan.structure.child(0)
    got = optree.tree_structure(carry)
    if expected != got:
        raise TypeError(f"{scan.caller}: `step` must return a carry of the structure it took, {expected}, got {got}.")
    for path, before, after in zip(optree.tree_paths(carry), scan.carry, optree.tree_leaves(carry), strict=True):
        if not isinstance(after, Tensor):
            raise TypeError(
                f"{scan.caller}: `step` must return tensors, got {type(after).__name__} at {path} of the carry."
            )
        if after.dtype != before.dtype or after.shape != before.shape[1:]:
            raise TypeError(
                f"{scan.caller}: `step` must return a carry of the shapes and dtypes it took: at {path} it took "
                f"{before.dtype} {tuple(before.shape[1:])} and returned {after.dtype} {tuple(after.shape)}."
            )
    for path, leaf in zip(optree.tree_paths(y), optree.tree_leaves(y), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{scan.caller}: `step` must return tensors, got {type(leaf).__name__} at {path} of y.")
    return carry, y


def _common_axis(caller: str, name: str, tree: PyTree, leaves: Sequence[Tensor], what: str) -> int:
    """The length of the first axis of all leaves of a tree."""
    first = leaves[0].shape[:1]
    for place, leaf in enumerate(leaves):
        if not first or leaf.shape[:1] != first:
            paths = optree.tree_paths(tree)
            raise ValueError(
                f"{caller}: every leaf of `{name}` must have the same leading {what} axis: "
                f"got {tuple(leaves[0].shape)} at {paths[0]} and {tuple(leaf.shape)} at {paths[place]}."
            )
    return int(first[0])


def _hparam(caller: str, leaf: Any, lanes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(leaf, bool | int | float):
        kept = {bool: torch.bool, int: torch.int64}.get(type(leaf), dtype)
        if kept == torch.int64 and not -(2**63) <= leaf < 2**63:
            raise ValueError(
                f"{caller}: an integer in `hparams` must fit into 64 bits, got {leaf}: write it as a float."
            )
        return torch.full((lanes,), leaf, dtype=kept, device=device)
    if isinstance(leaf, Tensor) and leaf.ndim == 0:
        return leaf.expand(lanes)
    if not isinstance(leaf, Tensor) or leaf.shape != (lanes,):
        got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        raise ValueError(f"{caller}: every leaf of `hparams` must be a number or have shape ({lanes},), got {got}.")
    return leaf


def _which_are_shared(
    caller: str, xs: PyTree, leaves: Sequence[Tensor], shared: bool | PyTree | None, lanes: int
) -> tuple[bool, ...]:
    if shared is None:
        return tuple(leaf.ndim < 2 or leaf.shape[1] != lanes for leaf in leaves)
    if isinstance(shared, bool):
        flags = [shared] * len(leaves)
    else:
        flags = optree.tree_leaves(optree.tree_broadcast_prefix(shared, xs))
    for place, (leaf, flag) in enumerate(zip(leaves, flags, strict=True)):
        if not flag and (leaf.ndim < 2 or leaf.shape[1] != lanes):
            raise ValueError(
                f"{caller}: a leaf of `xs` that is not shared must have shape [time, lanes = {lanes}, ...], "
                f"got {tuple(leaf.shape)} at {optree.tree_paths(xs)[place]}."
            )
    return tuple(flags)
