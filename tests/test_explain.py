"""`explain`: what it shows, that it runs and compiles nothing, and that it says what `auto` does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from popart_func.engines import ENGINES, compiler, explain, native, scan_lanes, selection
from popart_func.engines.lane_scan import LaneScan


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[LaneScan]:
    """The scans that the native engine lists, noted down; there is a compiler."""
    asked, listing = [], native.listing

    def noting(scan: LaneScan, **options: str) -> native.Listing:
        asked.append(scan)
        return listing(scan, **options)

    monkeypatch.setattr(native, "listing", noting)
    monkeypatch.setattr(native, "why_not", lambda device: None)
    return asked


def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(carry @ carry)  # PRODUCT
    return y * x, carry.sum()


def branches(carry: Tensor, x: Tensor) -> tuple[Tensor, tuple[()]]:
    return (carry if x > 0 else -carry), ()  # BRANCH


def narrow(carry: Tensor, x: Tensor) -> tuple[Tensor, tuple[()]]:
    return carry + x.bfloat16().float(), ()


START = torch.zeros(5, 3, 3)


def test_shows_every_part_of_a_step(listed: list[LaneScan]) -> None:
    explained = explain(step, START, torch.ones(700))
    assert (explained.engine, explained.lanes, explained.steps, explained.state_bytes) == ("native", 5, 700, 36)
    assert explained.counts[:4] == (4, 27, 9 + 9 + 1, 4)
    assert explained.seconds is not None
    assert (explained.memory_bytes, explained.why_no_source) == (76, None)
    assert len(listed) == 1
    printed = str(explained)
    for part in (
        "engine='auto' takes native: 5 lanes, 700 steps, on cpu",
        "not inductor: it pays off from 2000 steps on, and this scan has 700.",
        "arg0_1: float32[3, 3]\n",
        "test_explain.py:",
        ": `y = torch.tanh(carry @ carry)  # PRODUCT`\n",
        "  mm: float32[3, 3] = mm(arg0_1, arg0_1)\n",
        "4 operations: 1 mm, 1 tanh, 1 mul, 1 sum",
        "a lane: 36 bytes of state; the native kernel stores 76 bytes in all",
        "a lane's step: 27 multiplications in matrix products, 19 other numbers, in 4 nodes; the widest number has 4 b",
        " µs on native with lanes in registers, ",
        "at each time step:\n",
        "// arithmetic.hpp: ",
        "static void run_block(",
    ):
        assert part in printed
    assert printed.index("# PRODUCT") < printed.index("mm(arg0_1") < printed.index("return mul")


def test_fits_into_120_columns_but_for_the_source(listed: list[LaneScan]) -> None:
    def wide(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return carry, torch.stack([carry[0, 0] * number for number in range(60)])

    explained = explain(wide, START, torch.ones(700))
    assert max(map(len, str(explained.graph).splitlines())) > 120
    printed = str(explained).removesuffix((explained.own_source or "?").rstrip())
    assert max(map(len, printed.splitlines())) <= 120
    assert re.sub(r"\s+", "", str(explained.graph).splitlines()[-3]) in re.sub(r"\s+", "", printed)


@pytest.mark.usefixtures("listed")
def test_neither_runs_nor_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(native, "run", refuse)
    monkeypatch.setattr(selection, "run_scan", refuse)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "why_not", lambda device: compiler.why_no_compiler())
    explained = explain(step, START, torch.ones(2100))
    assert explained.engine == "eager"
    assert "not native: can't run on cpu: no C++ compiler was found" in str(explained)
    assert "not inductor: can't run on cpu: no C++ compiler was found" in str(explained)
    assert "static void run_block(" in str(explained), "which needs no compiler"
    asked = explain(step, START, torch.ones(700), engine="inductor")
    assert asked.engine is None
    assert "not inductor: no C++ compiler was found" in str(asked)
    assert "Native" not in str(asked)


class Case(NamedTuple):
    function: Callable[..., Any]
    steps: int
    asked: str
    engine: str | None
    reason: tuple[str, str]


CASES = {
    "few steps": Case(step, 10, "auto", "eager", ("native", "it pays off from 500 steps on, and this scan has 10.")),
    "by name": Case(step, 10, "native", "native", ("", "")),
    "with a schedule": Case(step, 10, "native:elements", "native", ("", "")),
    "an op that is lacking": Case(narrow, 700, "auto", "eager", ("native", "native: no dtype torch.bfloat16.")),
    "the same by name": Case(narrow, 700, "native", None, ("native", "native: no dtype torch.bfloat16.")),
    "no graph": Case(branches, 700, "auto", "eager", ("native", "a tensor is read in .*# BRANCH")),
    "no graph by name": Case(branches, 5, "inductor", None, ("inductor", "tensor is read in .*# BRANCH")),
    "no graph on eager": Case(branches, 700, "eager", "eager", ("", "")),
    "no graph in few steps": Case(branches, 5, "auto", "eager", ("native", "it pays off from 500 steps on")),
}  # fmt: skip


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("name", CASES)
def test_says_which_engine_and_why_not_another(name: str) -> None:
    function, steps, asked, engine, (other, reason) = CASES[name]
    explained = explain(function, torch.zeros(5, 3, 3), torch.ones(steps), engine=asked)
    assert (explained.asked, explained.engine) == (asked, engine)
    assert (other in explained.reasons) == bool(other)
    assert re.search(reason, explained.reasons.get(other, ""))
    assert (f"not {other}: " in str(explained)) == bool(other)
    assert ("Native kernel: source" in str(explained)) == (explained.source is not None)
    assert ("Native kernel\n" in str(explained)) == (explained.why_no_source is not None)


@pytest.mark.usefixtures("listed")
def test_says_that_gradients_are_for_eager() -> None:
    start = START.clone().requires_grad_()
    explained = explain(step, start, torch.ones(700))
    assert explained.engine == "eager"
    assert explained.reasons["native"] == "no gradient flows through it, and an input requires one."
    assert explained.graph is not None
    asked = explain(step, start, torch.ones(700), engine="native")
    assert asked.reasons["native"].endswith("an input requires one. Use the engine 'eager'.")


@pytest.mark.usefixtures("listed")
def test_chooses_as_auto_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run of large products in one lane, on many threads: on inductor, if that can run."""
    start = torch.zeros(1, 128, 128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr("popart_func.engines.cost_model.register_bytes", lambda: 64)
    monkeypatch.setattr("popart_func.engines.inductor.why_not", lambda device: None)
    monkeypatch.setattr("popart_func.engines.inductor.run", lambda scan: ("inductor", ()))
    explained = explain(step, start, torch.ones(10**6))
    assert explained.engine == "inductor"
    assert re.fullmatch(r"a step should take .* ms on inductor and .* ms on native .*", explained.reasons["native"])
    selection._say_once.cache_clear()
    with pytest.warns(UserWarning, match=re.escape(explained.reasons["native"])):
        assert scan_lanes(step, start, torch.ones(10**6))[0] == "inductor"


@pytest.mark.usefixtures("unchecked")
def test_errors() -> None:
    with pytest.raises(
        ValueError, match=rf"explain: `engine` must be 'auto' or one of {re.escape(str(list(ENGINES)))}"
    ):
        explain(step, START, torch.ones(3), engine="warp")
    with pytest.raises(ValueError, match="explain: `xs` has no tensors, so `length` must say"):
        explain(step, START)
    with pytest.raises(TypeError, match="explain: `step` must return a carry of the shapes and dtypes it took"):
        explain(lambda c, x: (c[0], ()), START, torch.ones(3))
