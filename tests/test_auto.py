"""``engine="auto"`` over several calls: the steps of the same scan add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from popart_func.engines import explain, native, scan, scan_lanes, selection
from popart_func.engines.lane_scan import LaneScan
from popart_func.engines.tracing import tracer

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine of each scan that `selection` runs."""
    engines: list[str] = []
    load = selection.load_engine

    class Noted:
        def __init__(self, name: str) -> None:
            self.name, self.engine = name, load(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def run(self, lane_scan: LaneScan) -> Any:
            result = self.engine.run(lane_scan)
            engines.append(self.name)
            return result

    monkeypatch.setattr(selection, "load_engine", Noted)
    return engines


def new_step() -> Any:
    return lambda c, x: (c + x, ())


def test_short_scans_move_to_native_once_that_pays_off(ran: list[str]) -> None:
    """An update of PPO has three scans, of 128, 16 and 1 steps."""
    steps = {128: new_step(), 16: new_step(), 1: new_step()}
    for _ in range(500):
        for length, step in steps.items():
            assert scan(step, torch.zeros(()), torch.ones(length))[0] == length
    for number, length in enumerate(steps):
        calls = ran[number::3]
        before = -(-native.pays_off_after // length) - 1  # the call that reaches it runs on native
        assert calls == ["eager"] * before + ["native"] * (500 - before)


def test_a_scan_that_is_called_once_is_not_traced(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    monkeypatch.setattr(tracer, "_trace", lambda *arguments: pytest.fail("traced"))
    for _ in range(10):
        scan(new_step(), torch.zeros(()), torch.ones(400))
    assert ran == ["eager"] * 10


def test_only_the_same_scan_adds_up(ran: list[str]) -> None:
    step = new_step()
    for start in (torch.zeros(2), torch.zeros(2).double(), torch.zeros(2, 3)):
        scan_lanes(step, start, torch.ones(400))
    assert ran == ["eager"] * 3
    scan_lanes(step, torch.zeros(5), torch.ones(100))  # another number of lanes and of steps
    assert ran[3] == "native"


def test_explain_counts_nothing_and_says_what_has_been_counted(ran: list[str]) -> None:
    step, start, xs = new_step(), torch.zeros(2), torch.ones(400)
    for _ in range(3):
        assert explain(step, start, xs).reasons["native"].endswith("from 500 steps on, and this scan has 400.")
    scan_lanes(step, start, xs)
    assert explain(step, start, xs).engine == "native"
    assert explain(step, start, xs[:50]).reasons["native"].endswith("this scan has 50, after 400 in earlier calls.")


def test_what_native_lacks_is_not_asked_in_each_call(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    asked: list[int] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda lane_scan: asked.append(1) or run(lane_scan))
    step = lambda c, x: (c + x.bfloat16().float(), ())  # noqa: E731
    repeat = lambda: [scan(step, torch.zeros(()), torch.ones(100)) for _ in range(20)]  # noqa: E731
    with pytest.warns(UserWarning, match=r"native: no dtype torch.bfloat16.* Going on with eager"):
        repeat()
    assert ran == ["eager"] * 20
    assert len(asked) == 4


def test_steps_that_can_not_be_counted_run_all_the_same(ran: list[str]) -> None:
    class Step:
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, c: torch.Tensor, x: torch.Tensor) -> Any:
            return c + x, ()

    for _ in range(3):
        scan(Step(), torch.zeros(()), torch.ones(400))
    assert ran == ["eager"] * 3


def test_totals_live_as_long_as_the_step() -> None:
    before = len(selection._totals)
    step = new_step()
    scan(step, torch.zeros(()), torch.ones(3))
    assert len(selection._totals) == before + 1
    del step
    assert len(selection._totals) == before
