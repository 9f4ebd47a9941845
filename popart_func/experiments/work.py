"""What a sweep computes: the grid of lanes, cut into chunks, and one chunk's results.

A chunk is a run of whole lanes of one learner. All chunks have the same number of lanes (the last one is filled up with
its last lane, whose copies are dropped), so that a lane's bits depend on its seed and its hyper-parameters alone,
whichever process runs the chunk and whenever.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, vmap

import popart_func
from popart_func.engines import scan_lanes
from popart_func.engines.lane_scan import check_tensors
from popart_func.experiments.grid import DIVERGED, NEVER, NOT_RUN, Chunk, Grid, Values, Variable
from popart_func.experiments.records import Record
from popart_func.learners import Learner
from popart_func.tree import PyTree, stack

__all__ = ["Work"]

_PROBED_STEPS, _PROBED_LANES = 3, 64


@dataclass(frozen=True, eq=False)
class Work:
    """A sweep as data and pure functions: it can be sent to another process, and any of its chunks be run there.

    Attributes:
        learners: name to ``make_learner(**hparams)``; the one name is empty where the sweep has but one learner.
        data: a tree of tensors ``[time, ...]``, or a function from a seed to such a tree.
        init: from a seed to parameters, a tree of tensors.
        grid: the lanes.
        record: name to what is kept.
        chunk_size: lanes in a chunk.
        engine: one of `popart_func.engines.ENGINES`.
        device: where to run.
        dtype: of parameters and hyper-parameters.
    """

    learners: Mapping[str, Callable[..., Learner]]
    data: PyTree
    init: Callable[[int], PyTree]
    grid: Grid
    record: Mapping[str, Record]
    chunk_size: int
    engine: str
    device: torch.device
    dtype: torch.dtype
    _steps: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _starts: dict[int, tuple[PyTree, PyTree]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}, "_starts": {}}

    def steps(self) -> int:
        """How many samples a lane learns from."""
        return int(optree.tree_leaves(self._start(self.grid.seeds[0])[1])[0].shape[0])

    def variables(self) -> dict[str, Variable]:
        """What `run` gives for each lane."""
        _, series = self._scan(next(iter(self.learners)), slice(0, 1), "eager", steps=1)
        steps = self.steps()
        description = f"first sample at which what is recorded is not finite; {NEVER}: never, {NOT_RUN}: not run yet"
        variables = {DIVERGED: Variable((), np.dtype(np.int32), None, description)}
        for name, record in self.record.items():
            one = series[name].new_zeros(steps, *series[name].shape[2:])
            kept = record.keep(one)
            if not isinstance(kept, Tensor):
                raise TypeError(f"run: a record must keep a tensor, got {type(kept).__name__} for {name!r}.")
            samples = None if record.samples is None else record.samples(steps)
            dtype = torch.empty(0, dtype=kept.dtype).numpy().dtype
            variables[name] = Variable(tuple(kept.shape), dtype, samples, record.description)
        return variables

    def run(self, chunk: Chunk) -> Values:
        """One chunk's results."""
        with torch.no_grad(), _threads(None if self.engine == "native" else 1):
            _, series = self._scan(chunk.learner, slice(chunk.start, chunk.stop), self.engine, padded=True)
        # How a sum is shared among threads is seen in its last bits.
        with torch.no_grad(), _threads(1):
            values = {name: vmap(record.keep, in_dims=1)(series[name]) for name, record in self.record.items()}
            values[DIVERGED] = _first_not_finite(series.values())
            lanes = chunk.stop - chunk.start
            return {name: value[:lanes].cpu().contiguous().numpy() for name, value in values.items()}

    def fingerprint(self) -> dict[str, str]:
        """What the user's functions do, as hashes: what functions compute can be compared, and they themselves not.

        Each seed's data and parameters, each learner's first few steps in lanes from all over the grid, and what each
        record keeps of one series.
        """
        with torch.no_grad(), _threads(1):
            starts = [tuple(map(_digest, self._start(seed))) for seed in self.grid.seeds]
            found = dict(zip(("init", "data"), map(_joined, zip(*starts, strict=True)), strict=True))
            for name in self.learners:
                lanes = len(self.grid.coordinates(name)["seed"])
                some = slice(0, lanes, -(-lanes // _PROBED_LANES))
                steps = min(_PROBED_STEPS, self.steps())
                found[f"learner {name}".strip()] = _digest(self._scan(name, some, "eager", steps=steps))
            _, series = self._scan(next(iter(self.learners)), slice(0, 1), "eager", steps=1)
            for name, record in self.record.items():
                found[f"record {name}"] = _digest(record.keep(_wave(series[name], self.steps())))
        return found

    def try_engine(self) -> None:
        """One step of each learner on the engine, which compiles it or says why it can't."""
        for learner in self.learners:
            with torch.no_grad():
                self._scan(learner, slice(0, self.chunk_size), self.engine, steps=1, padded=True)

    def environment(self) -> dict[str, str]:
        """What else a lane's bits depend on: the versions, and what kind of processor."""
        if self.device.type == "cuda":
            processor = torch.cuda.get_device_name(self.device)
        else:
            processor = torch.backends.cpu.get_cpu_capability()
        return {"popart_func": popart_func.__version__, "torch": torch.__version__, "processor": processor}

    def _scan(
        self, learner: str, lanes: slice, engine: str, *, steps: int | None = None, padded: bool = False
    ) -> tuple[PyTree, dict[str, Tensor]]:
        """The last states and, by record, the series ``[time, lanes, ...]`` of some lanes."""
        coordinates = {name: values[lanes] for name, values in self.grid.coordinates(learner).items()}
        if padded:
            missing = self.chunk_size - len(coordinates["seed"])
            coordinates = {name: np.pad(values, (0, missing), mode="edge") for name, values in coordinates.items()}
        seeds = coordinates.pop("seed").tolist()
        hparams = {
            name: torch.tensor(values, dtype=self.dtype, device=self.device) for name, values in coordinates.items()
        }
        distinct, which = np.unique(seeds, return_inverse=True)
        starts = self._starts_of(distinct.tolist())
        place = torch.from_numpy(which).to(self.device)
        params = optree.tree_map(lambda leaf: leaf[place], stack([starts[seed][0] for seed in distinct.tolist()]))
        shared = not callable(self.data)
        if shared:
            xs = starts[seeds[0]][1]
        else:
            streams = [starts[seed][1] for seed in distinct.tolist()]
            _check_lengths(distinct.tolist(), streams)
            xs = optree.tree_map(lambda *leaves: torch.stack(leaves, 1)[:, place], *streams)
        if steps is not None:
            xs = optree.tree_map(lambda leaf: leaf[:steps], xs)
        make = self.learners[learner]

        def initial(params: Any, hparams: Any) -> Any:
            return make(**hparams).init(params)

        state = vmap(initial, in_dims=(0, 0 if hparams else None))(params, hparams)
        state, found = scan_lanes(self._step(learner), state, xs, hparams=hparams, shared=shared, engine=engine)
        measures = dict.fromkeys(record.of for record in self.record.values())
        series = dict(zip(measures, found, strict=True))
        return state, {name: series[record.of] for name, record in self.record.items()}

    def _step(self, learner: str) -> Callable[..., Any]:
        """One function object per learner, so that an engine compiles it once for all chunks."""
        if learner not in self._steps:
            make, measures = self.learners[learner], list(dict.fromkeys(record.of for record in self.record.values()))

            def step(state: Any, x: Any, hparams: dict[str, Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
                state, info = make(**hparams).update(state, x)
                return state, tuple(of(state, info) for of in measures)

            self._steps[learner] = step
        return self._steps[learner]

    def _start(self, seed: int) -> tuple[PyTree, PyTree]:
        return self._starts_of([seed])[seed]

    def _starts_of(self, seeds: list[int]) -> dict[int, tuple[PyTree, PyTree]]:
        """Each seed's parameters and stream; those of the chunk before are kept, since chunks share seeds."""
        shared = None if callable(self.data) else self._placed("data", self.data)
        starts = {}
        for seed in seeds:
            if seed in self._starts:
                starts[seed] = self._starts[seed]
                continue
            params = optree.tree_map(
                lambda leaf: leaf.to(self.dtype) if leaf.is_floating_point() else leaf,
                self._placed("init", self.init(seed)),
            )
            starts[seed] = params, self._placed("data", self.data(seed)) if shared is None else shared
        if len(seeds) >= len(self._starts):
            self._starts.clear()
            self._starts.update(starts)
        return starts

    def _placed(self, name: str, tree: PyTree) -> PyTree:
        check_tensors("run", name, tree)
        return optree.tree_map(lambda leaf: leaf.to(self.device), tree)


def _check_lengths(seeds: list[int], streams: list[PyTree]) -> None:
    first, *others = [int(optree.tree_leaves(stream)[0].shape[0]) for stream in streams]
    for seed, length in zip(seeds[1:], others, strict=True):
        if length != first:
            raise ValueError(
                f"run: `data` must give streams of one length, got {first} samples for seed {seeds[0]} and "
                f"{length} for seed {seed}."
            )


def _first_not_finite(series: Iterable[Tensor]) -> Tensor:
    """The first time at which one of the series ``[time, lanes, ...]`` is not finite, or `NEVER`: ``[lanes]``."""
    wrong = [~one.isfinite() for one in series]
    bad = functools.reduce(torch.logical_or, (one.flatten(2).any(2) if one.ndim > 2 else one for one in wrong))
    first = torch.full((bad.shape[1],), NEVER, dtype=torch.int32, device=bad.device)
    lanes = bad.any(0)
    first[lanes] = bad[:, lanes].int().argmax(0).int()
    return first


def _wave(one: Tensor, steps: int) -> Tensor:
    """A series ``[steps, ...]`` of which no two samples are alike, for one of ``[1, 1, ...]``."""
    shape = steps, *one.shape[2:]
    return torch.arange(math.prod(shape), device=one.device).mul(0.7).sin().mul(10).reshape(shape).to(one.dtype)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(tree: PyTree) -> str:
    found = hashlib.sha256()
    for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
        found.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
        found.update(leaf.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Runs a block in so many threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
