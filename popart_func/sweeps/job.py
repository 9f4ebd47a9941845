"""Job: a sweep as data and pure functions, which can be sent to another process and run there chunk by chunk.

A chunk is a run of whole lanes of one learner. All chunks have the same number of lanes (the last one is filled up with
copies of its last lane, which are dropped afterwards). So a lane's bits depend on its seed and its hyper-parameters
alone, whichever process runs the chunk and whenever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, vmap

from popart_func._torch import postpone_dynamo
from popart_func._version import __version__
from popart_func.engines import cost_model, scan_lanes
from popart_func.engines.engine import name_and_options
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.learners import Learner
from popart_func.sweeps.dry_run import kept_variable, over_lanes, recorded_first_step
from popart_func.sweeps.inputs import Inputs, SeedInputs
from popart_func.sweeps.records import Record
from popart_func.sweeps.schema import DIVERGED, NEVER, NOT_RUN, Arrays, Chunk, LaneAxes, Variable
from popart_func.tree import PyTree, stack

__all__ = ["Job", "threads"]


@dataclass(frozen=True, eq=False)
class Job:
    """What a sweep computes.

    Attributes:
        learners: name to ``make_learner(**hparams)``; the name is empty where the sweep has one learner without a name.
        inputs: parameters and stream of each seed.
        lanes: each learner's lanes.
        record: the records by name.
        chunk_size: lanes in a chunk.
        engine: one of `popart_func.engines.ENGINES`, as text with its options.
    """

    learners: Mapping[str, Callable[..., Learner]]
    inputs: Inputs
    lanes: LaneAxes
    record: Mapping[str, Record]
    chunk_size: int
    engine: str
    _steps: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}

    @property
    def device(self) -> torch.device:
        """The device on which the lanes run."""
        return self.inputs.device

    def seed_inputs(self, seed: int) -> SeedInputs:
        """One seed's parameters and stream."""
        return self.inputs.of([seed])[seed]

    def steps(self) -> int:
        """The number of samples that a lane learns from."""
        return int(optree.tree_leaves(self.seed_inputs(self.lanes.seeds[0])[1])[0].shape[0])

    def environment(self) -> dict[str, str]:
        """What a lane's bits depend on besides the job: the versions, and the kind of processor."""
        if self.device.type == "cuda":
            processor = torch.cuda.get_device_name(self.device)
        else:
            processor = torch.backends.cpu.get_cpu_capability()
        return {"popart_func": __version__, "torch": torch.__version__, "processor": processor}

    def variables(self) -> dict[str, Variable]:
        """The variables that `run` gives, the same for all learners, found by a dry run of each learner."""
        description = f"first sample at which what is recorded is not finite; {NEVER}: never, {NOT_RUN}: not run yet"
        variables = {DIVERGED: Variable((), np.dtype(np.int32), None, description)}
        params, stream = self.seed_inputs(self.lanes.seeds[0])
        one_lane = optree.tree_map(lambda leaf: leaf[None], params), optree.tree_map(lambda leaf: leaf[:1], stream)
        for learner, make in self.learners.items():
            hparams = self._hparams(self._coordinates(learner, slice(0, 1)))
            with torch.no_grad(), postpone_dynamo():
                found = recorded_first_step(learner, make, self.record, *one_lane, hparams)
                kept = {name: kept_variable(name, one, found[name], self.steps()) for name, one in self.record.items()}
            for name, one in kept.items():
                first = variables.setdefault(name, one)
                if (one.shape, one.dtype) != (first.shape, first.dtype):
                    raise ValueError(
                        f"run: all learners must keep the same under one name: {name!r} is {first.dtype} "
                        f"{first.shape}, but {one.dtype} {one.shape} for {learner!r}."
                    )
        return variables

    def faster_schedule(self) -> str:
        """The schedule of the engine `native` that should be faster on a CPU for all lanes of all learners together."""
        seconds = []
        for learner in self.learners:
            with torch.no_grad():
                state, xs, hparams = self._arguments(learner, slice(0, 1), 1)
            one = make_lane_scan("run", self._step(learner), state, xs, hparams, shared=self.inputs.shared)
            # The number of threads must not change a lane's bits: the prediction is for one.
            seconds.append(cost_model.predict_here(one.graph(), self.lanes.count(learner), threads=1))
        total = cost_model.PredictedSeconds(*map(sum, zip(*seconds, strict=True)))
        return total.schedule

    def try_engine(self) -> None:
        """Runs one step of each learner on the engine, which compiles it or raises the reason why it can't."""
        for learner in self.learners:
            with torch.no_grad():
                self.scan(learner, slice(0, self.chunk_size), self.engine, steps=1, padded=True)

    def run(self, chunk: Chunk) -> Arrays:
        """Runs one chunk, and returns what is kept of its lanes, ``[lanes, ...]`` by variable."""
        with torch.no_grad(), threads(None if name_and_options(self.engine)[0] == "native" else 1):
            _, series = self.scan(chunk.learner, slice(chunk.start, chunk.stop), self.engine, padded=True)
        # The number of threads that share a sum shows in its last bits.
        with torch.no_grad(), threads(1):
            results = {name: vmap(record.keep, in_dims=1)(series[name]) for name, record in self.record.items()}
            results[DIVERGED] = _first_diverged((series[name], record.gaps) for name, record in self.record.items())
            lanes = chunk.stop - chunk.start
            return {name: result[:lanes].cpu().contiguous().numpy() for name, result in results.items()}

    def scan(
        self, learner: str, lanes: slice, engine: str, *, steps: int | None = None, padded: bool = False
    ) -> tuple[PyTree, dict[str, Tensor]]:
        """Runs some lanes of a learner; returns their last states and, by record, the series ``[time, lanes, ...]``.

        Args:
            learner: its name.
            lanes: which of its lanes.
            engine: which engine.
            steps: how many steps; by default all.
            padded: fill the lanes up to a whole chunk with copies of the last one.
        """
        with postpone_dynamo() if engine == "eager" else nullcontext():
            state, xs, hparams = self._arguments(learner, lanes, steps, padded=padded)
            state, found = scan_lanes(
                self._step(learner), state, xs, hparams=hparams, shared=self.inputs.shared, engine=engine
            )
        series = dict(zip(self._quantities(), found, strict=True))
        return state, {name: series[record.of] for name, record in self.record.items()}

    def _arguments(
        self, learner: str, lanes: slice, steps: int | None, *, padded: bool = False
    ) -> tuple[PyTree, PyTree, dict[str, Tensor]]:
        """The states of some lanes before the first step, their xs and their hyper-parameters; see `scan`."""
        coordinates = self._coordinates(learner, lanes)
        if padded:
            missing = self.chunk_size - len(coordinates["seed"])
            coordinates = {name: np.pad(values, (0, missing), mode="edge") for name, values in coordinates.items()}
        hparams = self._hparams(coordinates)
        distinct, which = np.unique(coordinates["seed"], return_inverse=True)
        inputs = list(self.inputs.of(distinct.tolist()).values())
        place = torch.from_numpy(which).to(self.device)
        params = optree.tree_map(lambda leaf: leaf[place], stack([params for params, _ in inputs]))
        if self.inputs.shared:
            xs = inputs[0][1]
        else:
            xs = optree.tree_map(lambda *leaves: torch.stack(leaves, 1)[:, place], *(stream for _, stream in inputs))
        if steps is not None:
            xs = optree.tree_map(lambda leaf: leaf[:steps], xs)
        make = self.learners[learner]

        def initial(params: Any, hparams: Any) -> Any:
            return make(**hparams).init(params)

        return over_lanes(initial, params, hparams), xs, hparams

    def _step(self, learner: str) -> Callable[..., Any]:
        """The step of a learner: always the same function object, so that an engine compiles it once for all chunks."""
        if learner not in self._steps:
            make, quantities = self.learners[learner], self._quantities()

            def step(state: Any, x: Any, hparams: dict[str, Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
                state, info = make(**hparams).update(state, x)
                return state, tuple(of(state, info) for of in quantities)

            self._steps[learner] = step
        return self._steps[learner]

    def _quantities(self) -> list[Callable[[Any, Any], Tensor]]:
        """The records' quantities; one that several records share is computed once."""
        return list(dict.fromkeys(record.of for record in self.record.values()))

    def _coordinates(self, learner: str, lanes: slice) -> Arrays:
        return {name: values[lanes] for name, values in self.lanes.coordinates(learner).items()}

    def _hparams(self, coordinates: Arrays) -> dict[str, Tensor]:
        return {
            name: torch.tensor(values, dtype=self.inputs.dtype, device=self.device)
            for name, values in coordinates.items()
            if name != "seed"
        }


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Runs a block in so many threads; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_diverged(recorded: Iterable[tuple[Tensor, bool]]) -> Tensor:
    """The first time at which one of the series ``[time, lanes, ...]`` is not finite, or `NEVER`: ``[lanes]``.

    Args:
        recorded: pairs of a series and its `Record.gaps`, whether NaN only means that a step has no value.
    """
    wrong = [one.isinf() if gaps else ~one.isfinite() for one, gaps in recorded]
    bad = functools.reduce(torch.logical_or, (one.flatten(2).any(2) if one.ndim > 2 else one for one in wrong))
    first = torch.full((bad.shape[1],), NEVER, dtype=torch.int32, device=bad.device)
    lanes = bad.any(0)
    first[lanes] = bad[:, lanes].int().argmax(0).int()
    return first
