"""Runs a scan: builds the step's kernel for a kind of device, unless that has been done, and launches it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, fx

from popart_func.engines.composed.pooling import POOLS
from popart_func.engines.lane_scan import LaneScan, UnsupportedError, refuse_gradient
from popart_func.engines.native import validation
from popart_func.engines.native.cpu import CPU
from popart_func.engines.native.cuda import CUDA
from popart_func.engines.native.layouts import contiguous_strides
from popart_func.engines.native.lower import lower
from popart_func.engines.native.ops.indexing import INDEXING
from popart_func.engines.native.plan import KernelPlan, make_plan
from popart_func.engines.native.registration import registrations
from popart_func.engines.native.target import KernelArguments, Launch, Target
from popart_func.engines.tracing.loop_nodes import all_nodes
from popart_func.engines.tracing.start_up import without_collector
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, describe, op_name
from popart_func.tree import PyTree

__all__ = ["TARGETS", "planned", "run", "target_of", "why_not"]

TARGETS: dict[str, Target[Any]] = {"cpu": CPU, "cuda": CUDA}
"""The target for each type of device."""

# The bits of errors, as in arithmetic.hpp and cpu/kernel.hpp, and the ops that may raise them.
BAD_INDEX, BAD_DIVISOR, NO_MEMORY = 1, 2, 4
INDEXED = (
    *INDEXING,
    *("put", "index_reduce", "searchsorted", "lu_unpack", "linalg_lu_solve"),
    *(name for name in POOLS if "max_pool" in name and name.endswith("backward")),
)
DIVISIONS = ("div", "remainder", "fmod")


def why_not(device: torch.device) -> str | None:
    """Why the engine can't run on a device, or None where it can."""
    if device.type not in TARGETS:
        return f"it runs on CPUs and on CUDA devices, not on {device}."
    return TARGETS[device.type].why_not(device)


def target_of(device: torch.device) -> Target[Any]:
    """The target for a device.

    Raises:
        UnsupportedError: there is none.
    """
    if device.type not in TARGETS:
        raise UnsupportedError(f"native: {why_not(device)}")
    return TARGETS[device.type]


def run(scan: LaneScan, *, schedule: str = "auto") -> tuple[PyTree, PyTree]:
    """Runs a scan: ``(carry, ys)``, with ``ys`` leaves ``[steps, lanes, ...]``. Not differentiable.

    The step is traced and compiled once for its shapes and dtypes and for each schedule. The numbers of lanes, steps
    and threads, and the values of hyper-parameters and inputs, are arguments of the kernel.

    Args:
        scan: what is run.
        schedule: what fills the vector registers of a CPU; see `popart_func.engines.Native`.

    Raises:
        UnsupportedError: an op, dtype or shape that the engine lacks.
        BuildError: the compiler refused the kernel.
        MemoryError: there is no memory for a block of lanes.
        IndexError, ZeroDivisionError: an index out of range, or an integer divided by zero, in some lane.
    """
    inputs = (*scan.carry, *scan.xs, *scan.hparams)
    target_of(scan.device).prepare()
    graph, carries = scan.graph(), len(scan.carry)
    refuse_gradient("native", graph.wants_gradient)
    tensors = [_inner_contiguous(leaf, outer) for leaf, outer in zip(inputs, scan.outer_axes(), strict=True)]
    tensors += [constant.to(scan.device).resolve_neg().contiguous() for constant in graph.constants]
    outputs = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in tensors[:carries]]
    outputs += [
        torch.empty((scan.steps, scan.lanes, *spec.shape), dtype=spec.dtype, device=scan.device)
        for spec in graph.outputs[carries:]
    ]
    uniform = _uniform(scan, graph)
    moving = range(carries, carries + len(scan.xs))
    lane_strides = [
        0 if same else leaf.stride(1 if i in moving else 0)
        for i, (leaf, same) in enumerate(zip(tensors, uniform, strict=True))
    ]
    time_strides = [leaf.stride(0) if i in moving else 0 for i, leaf in enumerate(tensors)]
    arguments = KernelArguments(tensors, lane_strides, time_strides, outputs, scan.lanes, scan.steps, carries)
    launch = _kernel(scan, graph, schedule)
    _raise_errors(graph, launch(arguments))
    carry, ys = optree.tree_unflatten(graph.out_structure, outputs)
    return carry, ys


def planned(scan: LaneScan, graph: StepGraph) -> KernelPlan:
    """The plan of a step's kernel; each stage is checked where `validation.ENABLED` is True.

    Raises:
        UnsupportedError: an op, dtype or shape that the engine lacks.
    """
    program = lower(graph, len(scan.carry), len(scan.xs), _uniform(scan, graph))
    if validation.ENABLED:
        validation.check_program(program)
    plan = make_plan(program)
    if validation.ENABLED:
        validation.check_plan(plan)
    return plan


@dataclass(frozen=True)
class _KernelKey(CacheKey[Launch]):
    device: torch.device
    shared: tuple[bool, ...]
    variant: str
    registrations: int


def _kernel(scan: LaneScan, graph: StepGraph, schedule: str) -> Launch:
    """The step's kernel, built unless that has been done."""
    target = target_of(scan.device)
    variant = target.variant(scan, schedule)
    key = _KernelKey(scan.device, scan.shared, variant, registrations())
    with without_collector():
        return graph.cached(
            key, lambda: target.build(target.source(planned(scan, graph), scan.device, variant), scan.device)
        )


def _uniform(scan: LaneScan, graph: StepGraph) -> tuple[bool, ...]:
    """For each input and constant whether all lanes share it."""
    return (*(axis is None for axis in scan.lane_axes()), *(True for _ in graph.constants))


def _inner_contiguous(leaf: Tensor, outer: int) -> Tensor:
    """The tensor with what one lane reads in one step contiguous; its outer axes may have any stride."""
    leaf = leaf.resolve_neg()
    if leaf.is_contiguous() or leaf.stride()[outer:] == contiguous_strides(leaf.shape[outer:]):
        return leaf
    return leaf.contiguous()


def _raise_errors(graph: StepGraph, bad: int) -> None:
    """Raises for the bits of errors that a kernel returned, naming the lines that may have caused them."""
    if bad & NO_MEMORY:
        raise MemoryError("native: there is no memory for a block of lanes, which holds all that its lanes compute.")
    nodes = [node for node in all_nodes(graph.graph) if node.op == "call_function"] if bad else []
    if bad & BAD_INDEX:
        raise IndexError(f"native: an index was out of range in some lane, in {_lines(nodes, INDEXED)}.")
    if bad & BAD_DIVISOR:
        raise ZeroDivisionError(f"native: an integer was divided by zero in some lane, in {_lines(nodes, DIVISIONS)}.")


def _lines(nodes: Iterable[fx.Node], ops: Collection[str]) -> str:
    """The user's lines that call one of these ops."""
    return ", or in ".join(dict.fromkeys(describe(node) for node in nodes if op_name(node) in ops)) or "the step"
