"""What a step closes over: its gradients, its changes, and the traces that are kept."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F  # noqa: N812
from runnable import COMPILED, RUNNABLE, inductor_slow

from popart_func.engines import (
    UnsupportedError,
    scan,
    scan_lanes,
)


def test_gradients_of_what_a_step_closes_over_are_not_lost():
    weight = torch.tensor(2.0, requires_grad=True)

    def step(carry, x):
        return carry + weight * x, ()

    with pytest.warns(UserWarning, match="closes over a tensor that requires one.* Going on with eager"):
        carry, _ = scan(step, torch.tensor(0.0), torch.ones(600))
    carry.backward()
    assert weight.grad == 600
    for engine in COMPILED:
        with pytest.raises(UnsupportedError, match=f"{engine}: no gradient flows"):
            scan(step, torch.tensor(0.0), torch.ones(3), engine=engine)
        with torch.no_grad():
            assert scan(step, torch.tensor(0.0), torch.ones(3), engine=engine)[0] == 6


@pytest.mark.parametrize("engine", RUNNABLE)
def test_one_hot_reads_no_values(engine):
    """PyTorch would: of classes from outside in a trace, and of those that `grad` wraps, also under `vmap`."""
    classes = torch.tensor([2, 0])

    def step(carry, x):
        slope = torch.func.grad(lambda weight: (weight * F.one_hot(x, 3)).sum())(torch.ones(3))
        return carry + F.one_hot(classes, 4), (F.one_hot(classes[1], 3), slope)

    carry, (of_zero, slopes) = scan(step, torch.zeros(2, 4), torch.tensor([1, 0, 1]), engine=engine)
    assert torch.equal(carry, 3.0 * torch.eye(4)[classes])
    assert torch.equal(of_zero, torch.eye(3).long()[[0, 0, 0]])
    assert torch.equal(slopes, torch.eye(3)[[1, 0, 1]])


@pytest.mark.parametrize("engine", COMPILED)
def test_what_is_changed_in_place_after_being_closed_over(engine):
    """A copy of a constant may be written to inside; a change of the constant itself is seen by the next call."""
    table = torch.zeros(3)

    def step(carry, x):
        own = table.clone()
        own[0] = x
        own += 1
        return carry + own.sum(), ()

    assert scan(step, torch.tensor(0.0), torch.tensor([5.0, 7.0]), engine=engine)[0] == 18
    table[2] = 10
    assert scan(step, torch.tensor(0.0), torch.tensor([5.0, 7.0]), engine=engine)[0] == 38
    assert table.tolist() == [0, 0, 10]


@pytest.mark.parametrize("engine", inductor_slow(COMPILED))
def test_what_is_bound_anew_after_being_closed_over_is_not_seen(engine):
    """As under `jax.jit`; `eager` sees it. A function that is made anew is another step."""
    held = {"tensor": torch.tensor(2.0), "number": 3.0}

    def make():
        return lambda carry, x: (carry + held["tensor"] * held["number"], ())

    step, zero = make(), torch.tensor(0.0)
    assert scan(step, zero, length=1, engine=engine)[0] == 6
    held.update(tensor=torch.tensor(20.0), number=30.0)
    assert scan(step, zero, length=1, engine=engine)[0] == 6
    assert scan(step, zero, length=1, engine="eager")[0] == 600
    assert scan(make(), zero, length=1, engine=engine)[0] == 600


@pytest.mark.parametrize("engine", inductor_slow(COMPILED))
def test_the_default_dtype_and_identity_are_part_of_a_trace(engine):
    def step(carry, x):
        return carry, torch.ones(()) * 3

    start = torch.zeros(2)
    assert scan_lanes(step, start, length=2, engine=engine)[1].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert scan_lanes(step, start, length=2, engine=engine)[1].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)

    @dataclasses.dataclass(frozen=True)
    class Equal:
        factor: float = dataclasses.field(compare=False)

        def __call__(self, carry, x):
            return carry + self.factor, ()

    assert [scan(Equal(f), torch.tensor(0.0), length=1, engine=engine)[0].item() for f in (2.0, 3.0)] == [2, 3]


def test_threads_may_trace_at_once():
    def run(number):
        return scan(lambda c, x: (c + number * torch.tanh(x), c), torch.tensor(0.0), torch.ones(3), engine=RUNNABLE[0])[
            0
        ]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(8)))
    np.testing.assert_allclose(results, [3 * number * np.tanh(1.0) for number in range(8)], rtol=1e-5)
