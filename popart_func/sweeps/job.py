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

from popart_func._version import __version__
from popart_func.engines import scan_lanes
from popart_func.learners import Learner
from popart_func.sweeps.dry_run import measured, over_lanes, variable
from popart_func.sweeps.grid import DIVERGED, NEVER, NOT_RUN, Chunk, Grid, Values, Variable
from popart_func.sweeps.inputs import Start, Starts
from popart_func.sweeps.records import Record
from popart_func.tree import PyTree, stack

__all__ = ["Work"]

_PROBED_STEPS, _PROBED_LANES = 3, 64


@dataclass(frozen=True, eq=False)
class Work:
    """A sweep as data and pure functions: it can be sent to another process, and any of its chunks be run there.

    Attributes:
        learners: name to ``make_learner(**hparams)``; the one name is empty where the sweep has but one learner.
        starts: parameters and stream of each seed.
        grid: the lanes.
        record: name to what is kept.
        chunk_size: lanes in a chunk.
        engine: one of `popart_func.engines.ENGINES`.
    """

    learners: Mapping[str, Callable[..., Learner]]
    starts: Starts
    grid: Grid
    record: Mapping[str, Record]
    chunk_size: int
    engine: str
    _steps: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.starts.device

    def steps(self) -> int:
        """How many samples a lane learns from."""
        return int(optree.tree_leaves(self._start(self.grid.seeds[0])[1])[0].shape[0])

    def variables(self) -> dict[str, Variable]:
        """What `run` gives for each lane, the same for all learners; their functions are tried in one lane."""
        description = f"first sample at which what is recorded is not finite; {NEVER}: never, {NOT_RUN}: not run yet"
        variables = {DIVERGED: Variable((), np.dtype(np.int32), None, description)}
        params, stream = self._start(self.grid.seeds[0])
        one_lane = optree.tree_map(lambda leaf: leaf[None], params), optree.tree_map(lambda leaf: leaf[:1], stream)
        for learner, make in self.learners.items():
            hparams = self._hparams(self._coordinates(learner, slice(0, 1)))
            with torch.no_grad():
                found = measured(learner, make, self.record, *one_lane, hparams)
                kept = {name: variable(name, one, found[name], self.steps()) for name, one in self.record.items()}
            for name, one in kept.items():
                first = variables.setdefault(name, one)
                if (one.shape, one.dtype) != (first.shape, first.dtype):
                    raise ValueError(
                        f"run: all learners must keep the same under one name: {name!r} is {first.dtype} "
                        f"{first.shape}, but {one.dtype} {one.shape} for {learner!r}."
                    )
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
            init, data = list[str](), list[str]()
            for seed in self.grid.seeds:
                params, stream = self._start(seed)
                init.append(_digest(params))
                if not (self.starts.shared and data):
                    data.append(_digest(stream))
            found = {"init": _joined(init), "data": _joined(data)}
            probes = {name: self._probe(name) for name in self.learners}
            found.update({f"learner {name}".strip(): _digest(probe) for name, probe in probes.items()})
            _, series = next(iter(probes.values()))
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
        return {"popart_func": __version__, "torch": torch.__version__, "processor": processor}

    def _probe(self, learner: str) -> tuple[PyTree, dict[str, Tensor]]:
        """As `_scan`, of the first few steps in lanes from all over the grid."""
        lanes = self.grid.lanes(learner)
        some = slice(0, lanes, -(-lanes // _PROBED_LANES))
        return self._scan(learner, some, "eager", steps=min(_PROBED_STEPS, self.steps()))

    def _scan(
        self, learner: str, lanes: slice, engine: str, *, steps: int | None = None, padded: bool = False
    ) -> tuple[PyTree, dict[str, Tensor]]:
        """The last states and, by record, the series ``[time, lanes, ...]`` of some lanes."""
        coordinates = self._coordinates(learner, lanes)
        if padded:
            missing = self.chunk_size - len(coordinates["seed"])
            coordinates = {name: np.pad(values, (0, missing), mode="edge") for name, values in coordinates.items()}
        hparams = self._hparams(coordinates)
        distinct, which = np.unique(coordinates["seed"], return_inverse=True)
        starts = list(self.starts.of(distinct.tolist()).values())
        place = torch.from_numpy(which).to(self.device)
        params = optree.tree_map(lambda leaf: leaf[place], stack([params for params, _ in starts]))
        if self.starts.shared:
            xs = starts[0][1]
        else:
            xs = optree.tree_map(lambda *leaves: torch.stack(leaves, 1)[:, place], *(stream for _, stream in starts))
        if steps is not None:
            xs = optree.tree_map(lambda leaf: leaf[:steps], xs)
        make = self.learners[learner]

        def initial(params: Any, hparams: Any) -> Any:
            return make(**hparams).init(params)

        state = over_lanes(initial, params, hparams)
        state, found = scan_lanes(
            self._step(learner), state, xs, hparams=hparams, shared=self.starts.shared, engine=engine
        )
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

    def _start(self, seed: int) -> Start:
        return self.starts.of([seed])[seed]

    def _coordinates(self, learner: str, lanes: slice) -> Values:
        return {name: values[lanes] for name, values in self.grid.coordinates(learner).items()}

    def _hparams(self, coordinates: Values) -> dict[str, Tensor]:
        return {
            name: torch.tensor(values, dtype=self.starts.dtype, device=self.device)
            for name, values in coordinates.items()
            if name != "seed"
        }


def _first_not_finite(series: Iterable[Tensor]) -> Tensor:
    """The first time at which one of the series ``[time, lanes, ...]`` is not finite, or `NEVER`: ``[lanes]``."""
    wrong = [~one.isfinite() for one in series]
    bad = functools.reduce(torch.logical_or, (one.flatten(2).any(2) if one.ndim > 2 else one for one in wrong))
    first = torch.full((bad.shape[1],), NEVER, dtype=torch.int32, device=bad.device)
    lanes = bad.any(0)
    first[lanes] = bad[:, lanes].int().argmax(0).int()
    return first


def _wave(seen: Tensor, steps: int) -> Tensor:
    """A series ``[steps, ...]`` of which no two samples are alike, for series ``[time, lanes, ...]`` that were seen.

    Integers may be indices or classes: they stay between the least and the greatest that were seen.
    """
    shape = steps, *seen.shape[2:]
    wave = torch.arange(math.prod(shape), device=seen.device).mul(0.7).sin().mul(10).reshape(shape)
    if seen.is_floating_point() or seen.is_complex() or seen.dtype == torch.bool or not seen.numel():
        return wave.to(seen.dtype)
    least, most = seen.long().aminmax()
    return (least + wave.long() % (most - least + 1)).to(seen.dtype)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(tree: PyTree) -> str:
    found = hashlib.sha256()
    for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
        found.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
        # As bytes, for numpy lacks some dtypes.
        found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
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
