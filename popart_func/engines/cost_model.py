"""The cost model: predicts a step's time on a CPU, by which `native` chooses its schedule and ``"auto"`` an engine.

The rule counts operations and values in the step graph. A register holds ``width`` numbers, and a *vector* is a
row of numbers cut into whole registers. In nanoseconds for a step of all lanes, with the names of `Constants`:

    lanes in registers = (lane_product · products + lane_other · others) · ⌈⌈lanes / width⌉ / threads⌉ · spilling
    elements in registers = (loop · loops + vector_product · product vectors + vector_other · other vectors
                             + scalar · scalars) · ⌈lanes / threads⌉
    inductor = inductor_node · nodes + (inductor_product · products / threads + inductor_other · others) · lanes / width

``products`` are the multiplications in matrix products, ``others`` the numbers that all other nodes compute, ``loops``
the nodes that compute at least `FEW` numbers, and ``scalars`` what the others compute. ``spilling`` is 1 where the
values of ``width`` lanes take at most `CACHED` bytes, and `SPILLING` where they take more: a block of lanes then leaves
the second-level cache. A loop inside the step computes as often as it runs, and takes memory once.

With one schedule a lane's bits depend on nothing but the lane, so the schedule may not depend on the number of threads:
it is the faster one on `SHARED` threads. ``"auto"`` takes `inductor` where it saves more than `COMPILE`, the time that
it may take to compile.

`tests/benchmarks/fit_cost_model.py` measures steps on the machine that it runs on, fits the constants to them and
prints what the rule chooses and how far it is from the best.
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

__all__ = [
    "CONSTANTS",
    "Constants",
    "OperationCounts",
    "PredictedSeconds",
    "faster_schedule",
    "predict",
    "predict_here",
    "register_bytes",
    "spilling",
    "why_inductor",
]


class Constants(NamedTuple):
    """Nanoseconds that an operation takes on one thread.

    Attributes:
        lane_product: a multiplication in a product, with lanes in registers.
        lane_other: any other operation, with lanes in registers.
        loop: a node of the graph that computes at least `FEW` numbers, with elements in registers.
        vector_product: a multiplication of a register in a product, with elements in registers.
        vector_other: any other operation on a register, with elements in registers.
        scalar: any other number, with elements in registers.
        inductor_node: a node of the graph, however small, on `inductor`.
        inductor_product: a multiplication of a register in a product, on `inductor`.
        inductor_other: any other operation on a register, on `inductor`.
    """

    lane_product: float
    lane_other: float
    loop: float
    vector_product: float
    vector_other: float
    scalar: float
    inductor_node: float
    inductor_product: float
    inductor_other: float


CONSTANTS = Constants(0.308, 0.294, 2.88, 0.208, 0.204, 0.0679, 47.8, 0.72, 0.343)
"""Found by `tests/benchmarks/fit_cost_model.py` on one thread of an AVX-512 machine (AMD EPYC), torch 2.13, float32.

In 78 points (Pop-Art on networks 4 to 256 wide, batches of 1 to 128, 1 to 256 lanes, SGD and Adam, and Q-learning with
its environment inside) the chosen schedule takes 1.015 times as long as the better one on average, and 2.16 times at
most, on another such machine than the one that the constants come from. `inductor`, measured in four of the points, was
slower in each: it may win where few lanes have large products and many threads share them.
"""

SHARED = 2
"""The threads for which a schedule is chosen. One block of lanes is work for one thread, so that with few lanes the two
schedules differ; on one thread the choice takes at most twice as long as the other schedule would."""

CACHED, SPILLING = 12e6, 1.5
"""Bytes of a block's values, and how many times as long its operations take where it has more.

All values of the graph count, of which a half to a third have memory at once. Of the benchmark's workloads, those below
the limit took 0.85 to 1.29 times the time predicted without the factor, and those above it 1.2 to 2 times, or far more.
"""

COMPILE = 10.0
"""Seconds that `inductor` may take to compile: 7 for the paper's step, 15 in a new process."""

FEW = 4
"""Fewer numbers than this are computed one by one, without a loop."""

REGISTERS = {"AVX512": 64, "AVX2": 32}
"""Bytes of a vector register; 16 elsewhere."""


class OperationCounts(NamedTuple):
    """Counts the operations of one lane in a step.

    Attributes:
        nodes: nodes of the graph; those of a loop's body, as all else in it, count as often as the loop runs it.
        products: multiplications in matrix products.
        others: numbers that all other nodes compute, views left out.
        bytes: the size of the widest floating-point number.
        product_vectors: multiplications of registers in matrix products.
        loops: matrix products, and other nodes that compute at least `FEW` numbers.
        other_vectors: registers that these other nodes compute.
        scalars: numbers that the nodes compute which compute fewer.
        values: the numbers of all inputs and results, those in the body of a loop once.
    """

    nodes: int
    products: int
    others: int
    bytes: int
    product_vectors: int
    loops: int
    other_vectors: int
    scalars: int
    values: int

    @classmethod
    def of(cls, graph: StepGraph, register: int | None = None) -> OperationCounts:
        """The counts of a graph, which are kept with it.

        Args:
            graph: of a step.
            register: the bytes of a vector register; by default this machine's.
        """
        register = register_bytes() if register is None else register
        return graph.cached(_CountsKey(register), lambda: cls._count(graph.graph, register))

    @classmethod
    def _count(cls, graph: fx.Graph, register: int) -> OperationCounts:
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        floats = (value for node in nodes for value in _values(node) if value.dtype.is_floating_point)
        widest = max((value.dtype.itemsize for value in floats), default=4)
        width = register // widest
        sizes = [size for size in map(_product_size, nodes) if size is not None]
        others = [value.numel() for node in nodes if _computes(node) for value in _values(node)]
        own = cls(
            nodes=len(nodes),
            products=sum(map(math.prod, sizes)),
            others=sum(others),
            bytes=widest,
            product_vectors=sum(_vectors(size, width) for size in sizes),
            loops=len(sizes) + sum(numel >= FEW for numel in others),
            other_vectors=sum(-(-numel // width) for numel in others if numel >= FEW),
            scalars=sum(numel for numel in others if numel < FEW),
            values=sum(value.numel() for node in graph.nodes if not _is_view(node) for value in _values(node)),
        )
        inside = [(rounds_of(node), cls._count(body.graph, register)) for node in nodes for _, body in bodies_of(node)]
        counts = {
            name: getattr(own, name) + sum(rounds * getattr(one, name) for rounds, one in inside)
            for name in cls._fields
        }
        values = own.values + sum(one.values for _, one in inside)
        return cls(**{**counts, "bytes": max([widest, *(one.bytes for _, one in inside)]), "values": values})


@dataclass(frozen=True)
class _CountsKey(CacheKey[OperationCounts]):
    register: int


class PredictedSeconds(NamedTuple):
    """The predicted time of a step of all lanes: on `native` with each of its schedules, and on `inductor`."""

    lanes: float
    elements: float
    inductor: float

    @property
    def schedule(self) -> str:
        """The faster schedule of `native`."""
        return "lanes" if self.lanes <= self.elements else "elements"

    @property
    def native(self) -> float:
        """The time of the faster schedule."""
        return min(self.lanes, self.elements)


def faster_schedule(graph: StepGraph, lanes: int) -> str:
    """The schedule of `native` that should be faster on this machine's processor: ``"lanes"`` or ``"elements"``."""
    return predict_here(graph, lanes, SHARED).schedule


def why_inductor(scan: LaneScan) -> str | None:
    """Why a scan should be faster on `inductor` than on `native`, a sentence; None where it should not be."""
    if scan.device.type != "cpu":
        return None
    seconds = predict_here(scan.graph(), scan.lanes)
    if (seconds.native - seconds.inductor) * scan.steps <= COMPILE:
        return None
    native, inductor = (f"{1e3 * value:.2g}" for value in (seconds.native, seconds.inductor))
    return f"a step should take {inductor} ms on inductor and {native} ms on native (lanes: {scan.lanes})."


def predict_here(graph: StepGraph, lanes: int, threads: int | None = None) -> PredictedSeconds:
    """The predicted time of a step on this machine's processor.

    Args:
        graph: of the step.
        lanes: how many.
        threads: by default PyTorch's number of threads.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return predict(OperationCounts.of(graph), lanes, threads, register_bytes())


def predict(counts: OperationCounts, lanes: int, threads: int, register: int) -> PredictedSeconds:
    """The predicted time of a step by the rule above, with vector registers of so many bytes."""
    width, of = register // counts.bytes, CONSTANTS
    blocks = math.ceil(lanes / width)
    in_lanes = spilling(counts, register) * (of.lane_product * counts.products + of.lane_other * counts.others)
    in_elements = (
        of.loop * counts.loops
        + of.vector_product * counts.product_vectors
        + of.vector_other * counts.other_vectors
        + of.scalar * counts.scalars
    )
    on_inductor = of.inductor_product * counts.products / threads + of.inductor_other * counts.others
    return PredictedSeconds(
        lanes=1e-9 * in_lanes * math.ceil(blocks / threads),
        elements=1e-9 * in_elements * math.ceil(lanes / threads),
        inductor=1e-9 * (of.inductor_node * counts.nodes + on_inductor * lanes / width),
    )


def spilling(counts: OperationCounts, register: int) -> float:
    """How many times as long a block of lanes takes as it would with all its values in the second-level cache."""
    return SPILLING if counts.values * register > CACHED else 1.0


def register_bytes() -> int:
    """The bytes of a vector register of this machine."""
    return REGISTERS.get(torch.backends.cpu.get_cpu_capability(), 16)


def _values(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]  # an op may leave out a result: None


def _product_size(node: fx.Node) -> tuple[int, int, int, int] | None:
    """The batch, rows, columns and summands of a matrix product or a convolution; None for another node."""
    if op_name(node) in ("convolution", "convolution_backward"):
        return _convolution_size(node)
    left = {"mm": 0, "bmm": 0, "addmm": 1, "addmv": 1}.get(op_name(node))
    if left is None:
        return None
    factor = node.args[left].meta["val"]  # type: ignore[union-attr]
    batch, inner = factor.shape[:-2].numel(), factor.shape[-1]
    rows = factor.shape[-2]
    return batch, rows, node.meta["val"].numel() // max(batch * rows, 1), inner


def _convolution_size(node: fx.Node) -> tuple[int, int, int, int]:
    """The size of the product of a weight and all windows of an input; a backward has two such products."""
    backward = op_name(node) == "convolution_backward"
    weight = node.args[2 if backward else 1].meta["val"]  # type: ignore[union-attr]
    result = (node.args[0] if backward else node).meta["val"]  # type: ignore[union-attr]
    channels, *window = weight.shape
    return 1 + backward, channels, result.numel() // max(channels, 1), math.prod(window)


def _vectors(size: tuple[int, int, int, int], width: int) -> int:
    """The multiplications of registers in a product: along its columns, or of few columns along the longest side."""
    _, rows, columns, inner = size
    along = columns if min(rows, columns) > 1 and 4 * columns > width else max(rows, columns, inner)
    return math.prod(size) // max(along, 1) * -(-along // width)


def _computes(node: fx.Node) -> bool:
    """Whether a node computes new numbers, and is neither a view nor a matrix product nor a loop."""
    return not (_is_view(node) or _product_size(node) or bodies_of(node))


def _is_view(node: fx.Node) -> bool:
    """Whether a node's values are those of its arguments."""
    return node.op == "call_function" and (op_name(node) == "getitem" or getattr(node.target, "is_view", False))
