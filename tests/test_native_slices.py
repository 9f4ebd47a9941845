"""A run in slices of time steps has the same bits as one in a single call of the kernel."""

from __future__ import annotations

import optree
import pytest
import torch
from torch import Tensor

from popart_func.engines import native, scan_lanes
from popart_func.engines.native.cpu import launch

pytestmark = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")


def step(carry: tuple[Tensor, ...], x: tuple[Tensor, Tensor], rate: Tensor) -> tuple[tuple[Tensor, ...], object]:
    first, flags, count, kept = carry
    new = (first.flip(0) * rate + x[0].sin() * kept).tanh() + x[1]
    return (new, ~flags, count + 1, kept + 0.1 * new.sum()), {
        "sum": new.sum(),
        "count": count,
        "new": new,
        "flags": flags,
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_have_the_same_bits(monkeypatch: pytest.MonkeyPatch, shared: bool, dtype: torch.dtype) -> None:
    lanes, steps = 19, 50
    carry = (
        torch.randn(3, lanes, dtype=dtype).T,  # whose lanes are not contiguous
        torch.rand(lanes, 2) > 0.5,
        torch.arange(lanes),
        torch.randn(1, dtype=dtype).expand(lanes),  # whose lanes begin as one, and then differ
    )
    each = torch.randn(lanes, steps, 3, dtype=dtype).transpose(0, 1)
    xs = each[:, 0] if shared else each, torch.randn(steps, dtype=dtype)
    rates = torch.linspace(0.1, 0.9, lanes, dtype=dtype)
    calls: list[int] = []
    cut = launch._slice
    monkeypatch.setattr(launch, "_slice", lambda run, start, count: calls.append(count) or cut(run, start, count))
    results = []
    for seconds in (1e9, 1e-12):
        monkeypatch.setattr(launch, "SLICE", seconds)
        calls.clear()
        shares = (shared, True)
        results.append(scan_lanes(step, carry, xs, hparams=rates, shared=shares, engine="native"))
        assert sum(calls) == steps
    assert calls == [1] * steps
    for whole, sliced in zip(*map(optree.tree_leaves, results), strict=True):
        assert torch.equal(whole, sliced)


def test_an_error_in_any_slice_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SLICE", 1e-12)
    xs = torch.tensor([0, 7, 1])
    with pytest.raises(IndexError, match="native: an index was out of range"):
        scan_lanes(lambda c, x: (c + torch.arange(3.0)[x], ()), torch.zeros(2), xs, engine="native")
