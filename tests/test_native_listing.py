"""What the native engine shows of a step."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from popart_func.engines import native
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native import Listing, listing
from popart_func.engines.native.cpu import target


def step(carry: Any, x: Any, rate: Any) -> Any:
    weight, count = carry
    table = torch.linspace(0, 1, 7) * 2
    product = (x[None] @ weight.T)[0]
    hidden = torch.tanh(product) * table[count % 7]
    return (weight - rate * torch.outer(hidden, x), count + 1), (hidden.sum(), weight.argmax(), product.cumsum(0))


def list_step(schedule: str = "lanes") -> Listing:
    carry = (torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.int64))
    return listing(make_lane_scan("scan", step, carry, torch.ones(9, 3, 5), torch.full((3,), 0.1)), schedule=schedule)


def test_shows_the_loops_and_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no compiler is installed, and nothing may be started."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(subprocess, "run", None)
    assert native.why_not(torch.device("cpu")) is not None
    shown = list_step()
    before, always = shown.loops.split("at each time step:\n")
    assert "carry in0: float32[20]" in before
    assert "x in2: float32[5]" in before
    assert "input in3: float32[1]" in before
    assert "before the time loop:" in before
    assert "vector_tanh(t1)" in always
    assert "* t2[t3[0]])" in always
    assert "for i0 < 4, i1 < 5:" in always
    assert "in2[1, 1, 5] @ in0[i1 + i2 * 5][1, 5, 4]" in always
    assert "reduce(so_far + value, from 0; i0 < 4; " in always
    assert "position of the first best(" in always
    assert "cumulate(so_far + value; " in always
    assert "carry in0 <- " in always
    assert ", in place" in always
    assert "static void run_block" in shown.source
    assert (shown.language, shown.variant) == ("C++", "lanes")


def test_shows_the_source_of_the_other_schedule() -> None:
    lanes, elements = list_step(), list_step("elements")
    assert elements.loops == lanes.loops
    assert elements.variant == "elements"
    assert "multiply<1, 4, 5, 0, 1, 1, 5>" in elements.own_source
    assert "multiply<" not in lanes.own_source


def test_counts_bytes() -> None:
    shown = list_step()
    assert shown.state_bytes == 4 * 20 + 8
    assert shown.memory_bytes > shown.state_bytes + 4 * 5 + 4  # the inputs of a step, the rate, and what is stored
    assert "88 bytes of state" in str(shown)


def test_lists_the_source_that_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(source: str) -> None:
        built.append(source)
        raise native.BuildError("not today")

    monkeypatch.setattr(target, "build", build)
    monkeypatch.setattr(target, "ask_compiler", lambda: None)
    scan = make_lane_scan("scan", lambda c, x: (c * x, c + x), torch.zeros(3, 2), torch.ones(4, 2))
    with pytest.raises(native.BuildError, match="not today"):
        native.run(scan)
    assert built == [listing(scan).source]


def test_says_what_the_engine_lacks() -> None:
    scan = make_lane_scan("scan", lambda c, x: (c, c.bfloat16()), torch.zeros(2), torch.ones(3))
    with pytest.raises(native.UnsupportedError, match=r"no dtype torch.bfloat16; .*test_native_listing.py"):
        listing(scan)
    elsewhere = make_lane_scan("scan", lambda c, x: (c, c), torch.zeros(2, device="meta"), None, length=3)
    with pytest.raises(native.UnsupportedError, match="it runs on CPUs and on CUDA devices, not on meta"):
        listing(elsewhere)
