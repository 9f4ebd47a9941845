"""The fastest engine: the step as one kernel, the time loop inside, the lanes in SIMD registers or in a GPU's threads.

On a CPU, a block of lanes, one register wide, is run from the first step to the last before the next block begins, so
that its parameters stay in cache; blocks are spread over ``torch.get_num_threads()`` threads. On a CUDA device each
lane is run by a thread or, where there are few lanes or large ones, by a block of threads. Results are bit-equal for
any number of lanes and threads. Floating-point arithmetic is IEEE's; sums of products are fused where the hardware can.
"""

from __future__ import annotations

from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from popart_func.engines.lane_scan import LaneScan, UnsupportedError, refuse_gradient
from popart_func.engines.native.arguments import Arguments, Launch
from popart_func.engines.native.build import BuildError, ask_compiler, build, why_not_here
from popart_func.engines.native.cpu import cpu_kernel
from popart_func.engines.native.emit import emit
from popart_func.engines.native.lower import lower
from popart_func.engines.tracing.start_up import without_collector
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, describe, op_name
from popart_func.tree import PyTree

__all__ = ["BuildError", "UnsupportedError", "pays_off_after", "run", "why_not"]

pays_off_after = 500
"""Steps from which on the engine is worth its compile time, 1 s: `eager` takes 200 of 1000 lanes, 700 of 50 lanes."""

# As in arithmetic.hpp; and which ops look at it.
BAD_INDEX, BAD_DIVISOR = 1, 2
INDEXED = ("gather", "index", "index_select", "index_put", "embedding", "scatter", "scatter_add", "scatter_reduce")
DIVISIONS = ("div", "floor_divide", "remainder", "fmod")


def why_not(device: torch.device) -> str | None:
    """Why the engine can't run on a device, or None where it can."""
    if device.type == "cuda":
        from popart_func.engines.native.cuda import why_not_cuda

        return why_not_cuda(device)
    if device.type != "cpu":
        return f"it runs on CPUs and on CUDA devices, not on {device}."
    return why_not_here()


def run(scan: LaneScan) -> tuple[PyTree, PyTree]:
    """Runs a scan: ``(carry, ys)``, with ``ys`` leaves ``[steps, lanes, ...]``. Not differentiable.

    The step is traced and compiled once for its shapes and dtypes; how many lanes, steps and threads there are, and
    what its hyper-parameters and inputs hold, is told at run time.

    Raises:
        UnsupportedError: an op, dtype or shape that the engine lacks.
        BuildError: the compiler refused the kernel.
        IndexError, ZeroDivisionError: an index out of range, or an integer divided by zero, in some lane.
    """
    inputs = (*scan.carry, *scan.xs, *scan.hparams)
    if scan.device.type == "cpu":
        ask_compiler()
    graph, carries = scan.graph(), len(scan.carry)
    refuse_gradient("native", graph.wants_gradient)
    tensors = [_inner_contiguous(leaf, outer) for leaf, outer in zip(inputs, _outer_axes(scan), strict=True)]
    tensors += [constant.to(scan.device).resolve_neg().contiguous() for constant in graph.constants]
    outputs = [
        torch.empty(
            (*((scan.lanes,) if index < carries else (scan.steps, scan.lanes)), *spec.shape),
            dtype=spec.dtype,
            device=scan.device,
        )
        for index, spec in enumerate(graph.outputs)
    ]
    uniform = _uniform(scan, graph)
    moving = range(carries, carries + len(scan.xs))
    lane_strides = [
        0 if same else leaf.stride(1 if i in moving else 0)
        for i, (leaf, same) in enumerate(zip(tensors, uniform, strict=True))
    ]
    time_strides = [leaf.stride(0) if i in moving else 0 for i, leaf in enumerate(tensors)]
    arguments = Arguments(tensors, lane_strides, time_strides, outputs, scan.lanes, scan.steps)
    launch = _kernel(scan, graph)
    _check_values(graph, launch(arguments))
    carry, ys = optree.tree_unflatten(graph.out_structure, outputs)
    return carry, ys


@dataclass(frozen=True)
class _KernelKey(CacheKey[Launch]):
    device: torch.device
    shared: tuple[bool, ...]
    team: bool


def _kernel(scan: LaneScan, graph: StepGraph) -> Launch:
    """The step's kernel, built unless that has been done."""
    team = scan.device.type == "cuda" and _in_teams(scan)
    return graph.cached(_KernelKey(scan.device, scan.shared, team), lambda: _built(scan, graph, team))


def _in_teams(scan: LaneScan) -> bool:
    from popart_func.engines.native.cuda import lanes_in_teams

    return scan.lanes <= lanes_in_teams(scan.device)


@without_collector()
def _built(scan: LaneScan, graph: StepGraph, team: bool) -> Launch:
    program, carries, xs = lower(graph, len(scan.carry), _uniform(scan, graph)), len(scan.carry), len(scan.xs)
    if scan.device.type == "cuda":
        from popart_func.engines.native.cuda import cuda_kernel, shared_memory
        from popart_func.engines.native.emit_cuda import emit_cuda

        return cuda_kernel(emit_cuda(program, carries, xs, shared_memory(scan.device), team=team), scan.device)
    return cpu_kernel(build(emit(program, carries, xs)))


def _uniform(scan: LaneScan, graph: StepGraph) -> tuple[bool, ...]:
    """For each input and constant whether all lanes share it."""
    return (*(axis is None for axis in scan.lane_axes()), *(True for _ in graph.constants))


def _outer_axes(scan: LaneScan) -> list[int]:
    """How many axes of each input lie outside of one lane's step."""
    return [1] * len(scan.carry) + [1 if shared else 2 for shared in scan.shared] + [1] * len(scan.hparams)


def _inner_contiguous(leaf: Tensor, outer: int) -> Tensor:
    """The tensor with what one lane reads in one step contiguous; its outer axes may have any stride."""
    leaf = leaf.resolve_neg()
    strides = torch.empty(leaf.shape[outer:], device="meta").stride()
    return leaf if leaf.stride()[outer:] == strides else leaf.contiguous()


def _check_values(graph: StepGraph, bad: int) -> None:
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    if bad & BAD_INDEX:
        lines = dict.fromkeys(describe(node) for node in nodes if op_name(node) in INDEXED)
        raise IndexError(f"native: an index was out of range in some lane, in {', or in '.join(lines)}.")
    if bad & BAD_DIVISOR:
        lines = dict.fromkeys(describe(node) for node in nodes if op_name(node) in DIVISIONS)
        raise ZeroDivisionError(f"native: an integer was divided by zero in some lane, in {', or in '.join(lines)}.")
