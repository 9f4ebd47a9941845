"""The inductor engine, for any model: `torch.compile` over PyTorch's scan operator, whose body is the vmapped step.

It compiles the traced step, never the user's Python. Loops inside the step are unrolled: PyTorch's operator has
gradient bugs under vmap, and a body of a few operations is best fused into what is around it.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from popart_func._torch import scan_operator
from popart_func.engines.compiler import why_no_compiler
from popart_func.engines.lane_scan import LaneScan, UnsupportedError, refuse_gradient, summary
from popart_func.engines.loops.unrolled import unrolled
from popart_func.engines.tracing.ambient import without_autocast
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph
from popart_func.tree import PyTree

__all__ = ["compiles_once", "pays_off_after", "run", "why_not"]

pays_off_after = 2000
"""Steps from which on the engine is worth its compile time, 7 s for the paper's step."""

compiles_once = False
"""It compiles for each number of lanes and steps."""

UNROLLED = 2000
"""How many operations a step may have once the loops inside it are unrolled: TorchInductor takes a minute for them."""

Leaves = tuple[Tensor, ...]
Scanned = Callable[..., tuple[Leaves, Leaves]]

_scan = scan_operator()

# One thread for pointwise loops: they are too small to share, and waiting for each other costs twelve times the work at
# 50 lanes. The C++ wrapper halves the time of a step at 50 lanes against the Python one; it can't hold a scan before
# PyTorch 2.13.
_CPU_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp.threads": 1,
    "cpp_wrapper": torch.torch_version.TorchVersion(torch.__version__) >= "2.13",
}


def why_not(device: torch.device) -> str | None:
    """Why the engine can't run on a device, or None where it can."""
    if device.type == "cpu":
        return why_no_compiler()
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed."
    return f"it runs on cpu and cuda, not on {device.type}."


def run(scan: LaneScan) -> tuple[PyTree, PyTree]:
    """Runs a scan: ``(carry, ys)``, with ``ys`` leaves ``[steps, lanes, ...]``. Not differentiable.

    Compiled once for each step, structure, shapes and number of lanes and steps; that takes several seconds.

    Raises:
        UnsupportedError: PyTorch can't compile or run the step.
    """
    graph = scan.graph()
    refuse_gradient("inductor", graph.wants_gradient)
    scanned = graph.cached(_ScannedKey(scan.lanes, scan.steps, scan.shared), lambda: _compile(graph, scan))
    carry = tuple(leaf.clone(memory_format=torch.contiguous_format) for leaf in scan.carry)
    xs = tuple(leaf.contiguous() for leaf in scan.xs)
    true = torch.ones(len(graph.outputs), dtype=torch.bool, device=scan.device)
    with torch.no_grad(), without_autocast():
        try:
            carry, ys = scanned(carry, xs or (_nothing(scan, scan.steps),), scan.hparams, graph.constants, true)
        except Exception as error:  # TorchDynamo and the C++ wrapper raise errors of any type
            raise UnsupportedError(f"inductor: it can't run this step: {summary(error)}") from error
    leaves = (*carry, *ys)[: len(graph.outputs)]
    result: Any = optree.tree_unflatten(graph.out_structure, leaves)
    return result


@dataclass(frozen=True)
class _ScannedKey(CacheKey[Scanned]):
    lanes: int
    steps: int
    shared: tuple[bool, ...]


def _nothing(scan: LaneScan, size: int) -> Tensor:
    """Takes the place of no xs or no ys: the operator needs one of each."""
    return torch.zeros(size, device=scan.device)


def _own_memory(leaf: Tensor, true: Tensor) -> Tensor:
    """A contiguous copy that shares no memory with an input or with another output, which would crash the operator.

    A clone alone is not enough: inductor merges the clones of equal values. It can't know that ``true`` is True.
    """
    leaf = leaf.clone(memory_format=torch.contiguous_format)
    return torch.where(true, leaf, torch.zeros_like(leaf))


def _compile(graph: StepGraph, scan: LaneScan) -> Scanned:
    axes = (*scan.lane_axes(), *(None for _ in graph.constants))
    carries, has_xs, module = len(scan.carry), bool(scan.xs), unrolled("inductor", graph, UNROLLED)

    step = vmap(lambda *leaves: tuple(module(*leaves)), in_dims=axes)

    def scanned(carry: Leaves, xs: Leaves, hparams: Leaves, constants: Leaves, true: Tensor) -> tuple[Leaves, Leaves]:
        def body(carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
            leaves = step(*carry, *(x if has_xs else ()), *hparams, *constants)
            leaves = tuple(_own_memory(leaf, true[index]) for index, leaf in enumerate(leaves))
            return leaves[:carries], leaves[carries:] or (_nothing(scan, 1),)

        return _scan(body, carry, xs)

    # Dynamo limits the recompilations of a code object: each compiled scan gets its own.
    own = types.FunctionType(scanned.__code__.replace(), globals(), "scanned", closure=scanned.__closure__)
    options = _CPU_OPTIONS if scan.device.type == "cpu" else {}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)
