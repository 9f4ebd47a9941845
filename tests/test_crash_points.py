"""A sweep at every crash point, sampled, and any order of run, kill, damage, resume, grow and load."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import small_sweep
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from popart_func import sweeps
from popart_func.sweeps import lanes_zarr, load
from popart_func.sweeps.job import Job
from popart_func.sweeps.records import every, last

SCRIPT = Path(__file__).parent / "support" / "crash_points.py"


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc on Linux")
@pytest.mark.parametrize("distance", [300, pytest.param(20, marks=pytest.mark.slow)])
def test_after_a_fault_the_next_start_gives_the_uninterrupted_result(distance):
    """All points: ``python tests/support/crash_points.py``."""
    command = [sys.executable, SCRIPT, "--every", str(distance)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "crash points, 0 differences" in found.stdout


class Interrupted(BaseException):
    """Ends a run where it is, as Ctrl-C does."""


class Lives(RuleBasedStateMachine):
    """What may happen to a store. Whatever does, a run that ends has the bits of one that nothing happened to."""

    SEEDS, RATES, STEPS = (0, 1, 2, 3), (0.01, 0.1, 0.3), (6, 10)
    memory: dict[Any, Any] = {}  # noqa: RUF012  # what each grid gives, the same for all examples

    @initialize()
    def empty(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = Path(self.folder.name) / "store"
        self.seeds, self.rates, self.steps = 1, 1, 0
        self.begun = self.damaged = False

    def arguments(self, **changes: Any) -> dict[str, Any]:
        steps, data = self.STEPS[self.steps], small_sweep.arguments()["data"]
        return small_sweep.arguments(
            self.SEEDS[: self.seeds],
            learning_rate=self.RATES[: self.rates],
            data=lambda seed: tuple(leaf[:steps] for leaf in data(seed)),
            record={"final": last(5), "curve": every(3)},
            chunk_size=2,
            **changes,
        )

    def expected(self) -> Any:
        key = self.seeds, self.rates, self.steps
        if key not in self.memory:
            self.memory[key] = sweeps.run(**self.arguments())
        return self.memory[key]

    @rule()
    def run(self) -> None:
        assert sweeps.run(**self.arguments(store=self.store)).equals(self.expected())
        self.begun, self.damaged = True, False

    @rule(after=st.integers(0, 6), written=st.booleans())
    def interrupted(self, after: int, written: bool) -> None:
        """Ended before a chunk is run, or once its first file is there."""
        patch, left = pytest.MonkeyPatch(), [after]

        def strike(place: Any, name: str) -> None:
            method = getattr(place, name)

            def struck(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted
                return method(*arguments)

            patch.setattr(place, name, struck)

        strike(*((lanes_zarr.LanesZarr, "_flush") if written else (Job, "run")))
        try:
            sweeps.run(**self.arguments(store=self.store))
        except Interrupted:
            self.damaged = self.damaged or written
        else:
            self.damaged = False
        finally:
            patch.undo()
        self.begun = (self.store / "configuration.json").exists()

    @rule(number=st.integers(0, 1000), place=st.floats(0, 0.999), cut=st.booleans())
    @precondition(lambda self: self.begun)
    def damage(self, number: int, place: float, cut: bool) -> None:
        """Flips a byte of a file, or cuts it there; but not of both copies of the configuration."""
        kept = {".lock", "labels.json"}
        files = sorted(path for path in self.store.rglob("*") if path.is_file() and path.name not in kept)
        files = [path for path in files if path != self.store / "lanes.zarr" / "zarr.json" and path.stat().st_size]
        chosen = files[number % len(files)]
        if chosen.name == "configuration.json" and not (self.store / "labels.json").exists():
            return
        content = bytearray(chosen.read_bytes())
        at = int(place * len(content))
        content[at] ^= 1
        chosen.write_bytes(content[:at] if cut else content)
        self.damaged = True

    @rule()
    @precondition(lambda self: self.seeds < len(self.SEEDS))
    def more_seeds(self) -> None:
        self.seeds += 1

    @rule()
    @precondition(lambda self: self.rates < len(self.RATES))
    def more_values(self) -> None:
        self.rates += 1

    @rule()
    @precondition(lambda self: self.steps == 0)
    def more_steps(self) -> None:
        self.steps = 1

    @invariant()
    def what_is_read_is_right(self) -> None:
        """Lanes that are done have the right bits, whatever else the store lacks."""
        if not getattr(self, "begun", False):
            return
        try:
            found = load(self.store)
        except sweeps.StoreError:
            assert self.damaged, "only damage and interrupted writing of labels make it unreadable"
            return
        done = found["done"]
        if found.sizes["sample"] != len(range(0, self.STEPS[self.steps], 3)):
            return  # it has not yet grown to the steps that were asked for
        expected = self.expected().sel({dim: found[dim] for dim in done.dims})
        for name in ("final", "curve", "diverged_at"):
            assert found[name].where(done).equals(expected[name].where(done)), name

    def teardown(self) -> None:
        self.folder.cleanup()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("examples", "steps"), [(3, 8), pytest.param(40, 20, marks=pytest.mark.slow)])
def test_any_order_of_events(examples, steps):
    profile = settings(max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None)
    run_state_machine_as_test(Lives, settings=profile)
