"""The cost model: predicts whether `inductor` is faster than `native` on a CPU, for ``engine="auto"``.

`native` fills a vector register with lanes and gives blocks of lanes to threads; `inductor` fills a register with the
elements of one lane and shares matrix products between threads. With few lanes and large matrices most of a register
of `native` is empty. The rule counts operations in the step graph, and nothing else:

    native = 0.5 ns · operations · ⌈blocks / threads⌉,  blocks = ⌈lanes / width⌉
    inductor = 50 ns · nodes + 0.5 ns · (products / threads + 3 · others) · lanes / width

where ``width`` is how many numbers a register holds, ``products`` the multiplications in matrix products, ``others``
the numbers that all other nodes compute. ``"auto"`` takes `inductor` where it saves more than the 10 s that it may take
to compile. The constants come from this measurement: Pop-Art on a network with two layers, float32, one thread of an
AVX-512 machine (AMD EPYC), torch 2.13, microseconds of processor time per step, the prediction in brackets:

    layers   batch   lanes    native             inductor
        16       1       1       1.3     (1.3)        6.8     (6.8)
        64       1      16       8.9      (13)         18      (31)
       256       1       2       150     (175)         32      (46)
       128       8      64       853     (951)       1496    (1143)
       128      32       4       794     (894)        220     (248)
       128      32      16       818     (894)        788     (971)
       256      32      64     14610   (13572)      16241   (14408)
       256     128       2     15340   (13359)       1254    (1727)
       512      32      16     24168   (13208)      13144   (13891)

In 24 such points the predicted ratio was right within a factor of 2.1. With two threads and layers of 256 it predicts
that `inductor` is 1.7 (16 lanes, batches of 32), 1.9 (16 and 128) and 15 times as fast (2 and 128), and `native` 1.1
times (64 and 32); measured were 1.7, 2.2, 17 and 1.4.

It ignores caches (`native` takes twice as long per operation where layers of 512 leave the second-level cache), the
different costs of operations (a sort takes `native` the square of a row's length), kernels that an earlier call has
compiled, and GPUs. More than two threads, float64 and other processors were not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.tracing.loop_nodes import bodies_of, rounds_of
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, op_name

__all__ = ["OperationCounts", "PredictedSeconds", "predict", "predict_here", "why_inductor"]

PER_OPERATION = 0.5e-9
"""Seconds for an operation on one register."""

PER_NODE = 50e-9
"""Seconds that `inductor` spends on a node of the graph, however small."""

OTHERS = 3
"""Times that `inductor` takes as long as `native` outside of matrix products: its values go through memory."""

COMPILE = 10.0
"""Seconds that `inductor` may take to compile: 3 to 10."""

REGISTERS = {"AVX512": 64, "AVX2": 32}
"""Bytes of a vector register; 16 elsewhere."""


class OperationCounts(NamedTuple):
    """Counts the operations of one lane in a step.

    Attributes:
        nodes: nodes of the graph; those of a loop's body, as all else in it, count as often as the loop runs it.
        products: multiplications in matrix products.
        others: numbers that all other nodes compute, views left out.
        bytes: the size of the widest floating-point number.
    """

    nodes: int
    products: int
    others: int
    bytes: int

    @classmethod
    def of(cls, graph: StepGraph) -> OperationCounts:
        """The counts of a graph, which are kept with it."""
        return graph.cached(_CountsKey(), lambda: cls._count(graph.graph))

    @classmethod
    def _count(cls, graph: fx.Graph) -> OperationCounts:
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        floats = (value for node in nodes for value in _values(node) if value.dtype.is_floating_point)
        widest = max((value.dtype.itemsize for value in floats), default=4)
        loops = [(rounds_of(node), cls._count(body.graph)) for node in nodes for _, body in bodies_of(node)]
        return cls(
            len(nodes) + sum(rounds * counts.nodes for rounds, counts in loops),
            sum(map(_products, nodes)) + sum(rounds * counts.products for rounds, counts in loops),
            sum(map(_others, nodes)) + sum(rounds * counts.others for rounds, counts in loops),
            max([widest, *(counts.bytes for _, counts in loops)]),
        )


@dataclass(frozen=True)
class _CountsKey(CacheKey[OperationCounts]):
    pass


class PredictedSeconds(NamedTuple):
    """The predicted time of a step of all lanes, on each engine."""

    native: float
    inductor: float


def why_inductor(scan: LaneScan) -> str | None:
    """Why a scan should be faster on `inductor` than on `native`, a sentence; None where it should not be."""
    if scan.device.type != "cpu":
        return None
    seconds = predict_here(OperationCounts.of(scan.graph()), scan.lanes)
    if (seconds.native - seconds.inductor) * scan.steps <= COMPILE:
        return None
    native, inductor = (f"{1e3 * value:.2g}" for value in seconds)
    return f"a step should take {inductor} ms on inductor and {native} ms on native (lanes: {scan.lanes})."


def predict_here(counts: OperationCounts, lanes: int) -> PredictedSeconds:
    """The predicted time of a step on this machine's processor, with PyTorch's number of threads."""
    register = REGISTERS.get(torch.backends.cpu.get_cpu_capability(), 16)
    return predict(counts, lanes, torch.get_num_threads(), register)


def predict(counts: OperationCounts, lanes: int, threads: int, register: int) -> PredictedSeconds:
    """The predicted time of a step by the rule above, with vector registers of so many bytes."""
    width = register // counts.bytes
    rounds = math.ceil(math.ceil(lanes / width) / threads)
    per_lane = counts.products / threads + OTHERS * counts.others
    return PredictedSeconds(
        native=PER_OPERATION * (counts.products + counts.others) * rounds,
        inductor=PER_NODE * counts.nodes + PER_OPERATION * per_lane * lanes / width,
    )


def _values(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    return list(value) if isinstance(value, list | tuple) else [value]


def _products(node: fx.Node) -> int:
    left = {"mm": 0, "bmm": 0, "addmm": 1, "addmv": 1}.get(op_name(node))
    if left is None:
        return 0
    factor: fx.Node = node.args[left]  # type: ignore[assignment]
    return int(node.meta["val"].numel() * factor.meta["val"].shape[-1])


def _others(node: fx.Node) -> int:
    if op_name(node) == "getitem" or bodies_of(node) or getattr(node.target, "is_view", False) or _products(node):
        return 0
    return sum(value.numel() for value in _values(node))
