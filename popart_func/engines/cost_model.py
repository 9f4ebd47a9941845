"""Whether `inductor` would be faster than `native`: what ``"auto"`` asks before it takes `native` on a CPU.

`native` fills a vector register with lanes and gives blocks of lanes to threads, `inductor` fills it with what one lane
computes and shares out matrix products. With few lanes and large matrices most of what `native` computes is thrown
away. The rule counts operations in the step graph, and nothing else:

    native = 0.5 ns · operations · ⌈blocks / threads⌉,  blocks = ⌈lanes / width⌉
    inductor = 50 ns · nodes + 0.5 ns · (products / threads + 3 · others) · lanes / width

where ``width`` is how many numbers a register holds, ``products`` the multiplications in matrix products, ``others``
the numbers that all other nodes compute. `inductor` is taken where it saves more than the 10 s that it may take to
compile. Its constants come from this measurement: Pop-Art on a network with two layers, float32, one thread of an
AVX-512 machine (AMD EPYC), torch 2.13, microseconds of processor time per step, what is predicted in brackets:

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

What it ignores: caches (`native` takes twice as long per operation where layers of 512 leave the second-level cache),
what unlike operations cost (a sort takes `native` the square of a row's length), that a kernel may have been compiled
by an earlier call, and GPUs. More than two threads, float64 and other processors were not measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import fx

from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.tracing.step_graph import StepGraph, op_name

__all__ = ["Seconds", "Work", "predict", "why_inductor"]

PER_OPERATION = 0.5e-9
"""Seconds for an operation on one register."""

PER_NODE = 50e-9
"""Seconds that `inductor` spends on a node of the graph, however small."""

OTHERS = 3
"""How many times as long as `native` `inductor` takes for what is not in a matrix product: that goes through memory."""

COMPILE = 10.0
"""Seconds that `inductor` may take to compile: 3 to 10."""

REGISTERS = {"AVX512": 64, "AVX2": 32}
"""Bytes of a vector register; 16 elsewhere."""


class Work(NamedTuple):
    """What one lane computes in a step.

    Attributes:
        nodes: of the graph.
        products: multiplications in matrix products.
        others: numbers that all other nodes compute, views left out.
        bytes: of the widest floating-point number.
    """

    nodes: int
    products: int
    others: int
    bytes: int

    @classmethod
    def of(cls, graph: StepGraph) -> Work:
        """The work in a graph."""
        if cls not in graph.compiled:
            nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
            floats = (value for node in nodes for value in _values(node) if value.dtype.is_floating_point)
            widest = max((value.dtype.itemsize for value in floats), default=4)
            graph.compiled[cls] = cls(len(nodes), sum(map(_products, nodes)), sum(map(_others, nodes)), widest)
        work: Work = graph.compiled[cls]
        return work


class Seconds(NamedTuple):
    """What a step of all lanes is predicted to take."""

    native: float
    inductor: float


def why_inductor(scan: LaneScan) -> str | None:
    """Why a scan had better run on `inductor` than on `native`, or None."""
    if scan.device.type != "cpu":
        return None
    register = REGISTERS.get(torch.backends.cpu.get_cpu_capability(), 16)
    seconds = predict(Work.of(scan.graph()), scan.lanes, torch.get_num_threads(), register)
    if (seconds.native - seconds.inductor) * scan.steps <= COMPILE:
        return None
    native, inductor = (f"{1e3 * value:.2g}" for value in seconds)
    return f"a step should take {inductor} ms on inductor and {native} ms on native (lanes: {scan.lanes})."


def predict(work: Work, lanes: int, threads: int, register: int) -> Seconds:
    """What a step takes by the rule above, with a vector register of so many bytes."""
    width = register // work.bytes
    rounds = math.ceil(math.ceil(lanes / width) / threads)
    shared_out = work.products / threads + OTHERS * work.others
    return Seconds(
        native=PER_OPERATION * (work.products + work.others) * rounds,
        inductor=PER_NODE * work.nodes + PER_OPERATION * shared_out * lanes / width,
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
    if op_name(node) == "getitem" or getattr(node.target, "is_view", False) or _products(node):
        return 0
    return sum(value.numel() for value in _values(node))
