"""Outputs that are equal, share memory, or are inputs: right on every engine, and no two results share memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import pytest
import torch

from popart_func.engines import ENGINES, UnsupportedError, available_engines, inductor, scan_lanes
from popart_func.engines.selection import _say_once

RUNNABLE = [name for name in ENGINES if available_engines()[name] is None]
CLOSED_OVER = torch.tensor(3.0)
LANES, STEPS = 3, 4


class Case(NamedTuple):
    step: Any
    leaves: int  # of the carry; a second one is another tensor
    shape: tuple[int, ...]


CASES = {
    "equal leaves": Case(lambda c, x: ((c[0] * 0.5, c[0] * 0.5), ()), 2, ()),
    "computed in two ways": Case(lambda c, x: ((c[0].reshape(4) * 2, c[0].view(4) * 2), ()), 2, (4,)),
    "sums in two ways": Case(lambda c, x: ((c[0].sum() + x, c[0].sum(()) + x), ()), 2, ()),
    "y is the carry": Case(lambda c, x: ((c[0] * 0.5 + x,), c[0] * 0.5 + x), 1, ()),
    "ys are the old carry": Case(lambda c, x: (c, (c[0], c[0], x, x)), 1, (2,)),
    "swapped": Case(lambda c, x: ((c[1], c[0]), c[0]), 2, ()),
    "one overwrites the other": Case(lambda c, x: ((c[0], c[0]), ()), 2, ()),
    "no lane axis": Case(lambda c, x: ((x * 2,), c), 1, ()),
    "both are x": Case(lambda c, x: ((x, x), (x,)), 2, ()),
    "constants": Case(lambda c, x: ((torch.zeros(()),), torch.ones(2)), 1, ()),
    "closed over": Case(lambda c, x: ((CLOSED_OVER, CLOSED_OVER), CLOSED_OVER), 2, ()),
    "views": Case(lambda c, x: ((c[0].mT * 0.5, (c[0].mT * 0.5).mT), c[0].mT), 2, (2, 2)),
    "views of y": Case(
        lambda c, x: ((c[0] * 2 + x,), ((c[0] * 2 + x).reshape(4), (c[0] * 2 + x)[0], c[0].mT)), 1, (2, 2)
    ),
    "expanded": Case(lambda c, x: ((c[0].sum(0, keepdim=True).expand(2, 2),), ()), 1, (2, 2)),
    "products": Case(lambda c, x: ((c[0] @ c[0], c[0] @ c[0]), c[0] @ c[0]), 2, (2, 2)),
}  # fmt: skip
FOR_INTEGERS = [(name, torch.int64) for name in ("ys are the old carry", "swapped", "one overwrites the other")]


def check_aliases(cases: dict[str, Case], dtype: torch.dtype, engines: list[str]) -> None:
    """Runs cases side by side in one step."""

    def carry_of(case: Case) -> tuple[torch.Tensor, ...]:
        first = torch.arange(LANES * torch.Size(case.shape).numel()).reshape(LANES, *case.shape).to(dtype)
        return tuple(first + 5 * number for number in range(case.leaves))

    def step(carry: Any, x: Any) -> Any:
        found = {name: case.step(carry[name], x) for name, case in cases.items()}
        return {name: new for name, (new, _) in found.items()}, {name: y for name, (_, y) in found.items()}

    carry = {name: carry_of(case) for name, case in cases.items()}
    xs = torch.arange(1, STEPS + 1).to(dtype)
    inputs = [*optree.tree_leaves(carry), xs]
    before = [leaf.clone() for leaf in inputs]
    expected = scan_lanes(step, carry, xs, shared=True, engine="eager")
    for engine in engines:
        result = scan_lanes(step, carry, xs, shared=True, engine=engine)
        leaves = optree.tree_leaves(result)
        assert len({leaf.untyped_storage().data_ptr() for leaf in (*leaves, *inputs)}) == len(leaves) + len(inputs)
        assert all(map(torch.equal, inputs, before))
        for name in cases:
            for part, expected_part in zip(result, expected, strict=True):
                torch.testing.assert_close(part[name], expected_part[name], msg=f"{engine}: {name}")


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), *FOR_INTEGERS])
def test_outputs_that_alias(name: str, dtype: torch.dtype) -> None:
    check_aliases({name: CASES[name]}, dtype, [name for name in RUNNABLE if name != "inductor"])


@pytest.mark.skipif("inductor" not in RUNNABLE, reason="no C++ compiler")
def test_outputs_that_alias_on_inductor() -> None:
    """In one step for each dtype: inductor takes most of a second for each step."""
    check_aliases(CASES, torch.float32, ["inductor"])
    check_aliases({name: CASES[name] for name, _ in FOR_INTEGERS}, torch.int64, ["inductor"])


@pytest.mark.skipif("inductor" not in RUNNABLE, reason="no C++ compiler")
def test_what_inductor_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ``auto`` goes on, saying so once."""

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("broken on purpose\nand more")

    monkeypatch.setattr(inductor, "_scan", broken)
    step = lambda c, x: (c + x.to(torch.bfloat16).float(), ())  # noqa: E731  # which native refuses
    with pytest.raises(UnsupportedError, match="scan_lanes: inductor: it can't run this step: "):
        scan_lanes(step, torch.zeros(2), torch.ones(3), engine="inductor")
    _say_once.cache_clear()
    message = r"(native: no dtype torch.bfloat16|inductor: it can't run this step: ).* Going on with (inductor|eager)"
    with pytest.warns(UserWarning, match=message) as said:
        assert scan_lanes(step, torch.zeros(2), torch.ones(2100))[0].tolist() == [2100, 2100]
    assert "Going on with eager" in str(said[-1].message)
