"""Errors of scans and of steps name the function that was called."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from runnable import RUNNABLE

from popart_func.engines import (
    UnsupportedError,
    scan,
    scan_lanes,
)

TABLE = torch.zeros(3)


def changes_its_input(carry, x):
    y = x[:1]
    y += carry  # HERE
    return carry + x.sum(), ()


def changes_its_carry(carry, x):
    carry.mul_(2)  # HERE
    carry = carry + x.sum()
    return carry, ()


def changes_what_it_closes_over(carry, x):
    TABLE[0] = x[0]  # HERE
    return carry + TABLE.sum(), ()


@pytest.mark.parametrize("step", [changes_its_input, changes_its_carry, changes_what_it_closes_over])
@pytest.mark.parametrize("engine", RUNNABLE)
def test_a_step_that_changes_what_it_is_given_is_refused(engine, step):
    """With its line, where it is traced; `eager` does not see what a step closes over."""
    if (engine, step) == ("eager", changes_what_it_closes_over):
        pytest.skip("eager can't see it")
    message = r"scan_lanes: `step` changes an argument.* in place.*: a step must be pure\. Write `x = x \+ 1` instead"
    with pytest.raises(TypeError, match=message) as caught:
        scan_lanes(step, torch.ones(2), torch.ones(2, 2, 3), engine=engine)
    assert engine == "eager" or "# HERE`" in str(caught.value)


Z = torch.zeros(3)


LEAF = torch.tensor(2.0, requires_grad=True)


def keep(carry, x):
    return carry, ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda e: scan_lanes(lambda c, x: c, Z, Z, engine=e),
            TypeError,
            r"`step` must return \(carry, y\), got a tensor",
        ),
        (
            lambda e: scan_lanes(lambda c, x: ({"a": c}, ()), Z, Z, engine=e),
            TypeError,
            r"carry of the structure it took, PyTreeSpec\(\*\), got PyTreeSpec\(\{'a': \*\}\)",
        ),
        (
            lambda e: scan_lanes(lambda c, x: ({"w": c["w"].double()}, ()), {"w": Z}, Z, engine=e),
            TypeError,
            r"at \('w',\) it took torch.float32 \(\) and returned torch.float64 \(\)",
        ),
        (lambda e: scan_lanes(lambda c, x: (c[None], ()), Z, Z, engine=e), TypeError, r"returned torch.float32 \(1,\)"),
        (
            lambda e: scan_lanes(lambda c, x: (c, 1.0), Z, Z, engine=e),
            TypeError,
            "return tensors, got float at .* of y",
        ),
    ],
)
@pytest.mark.parametrize("engine", RUNNABLE)
def test_errors_of_steps(engine, call, error, message):
    with pytest.raises(error, match=message):
        call(engine)


def branches(carry, x):
    return (carry if x > 0 else -carry), ()


def draws(carry, x):
    return carry + torch.rand(()), ()


def is_narrow(carry, x):
    return carry + x.bfloat16().float(), ()


def looks_up(carry, x):
    return carry + torch.arange(3.0)[x.long() + 5], ()


@pytest.mark.parametrize("caller", [scan, scan_lanes])
@pytest.mark.parametrize(
    ("step", "engine", "error", "message"),
    [
        (lambda c, x: c, "eager", TypeError, "`step` must return"),
        (lambda c, x: c, "native", TypeError, "`step` must return"),
        (lambda c, x: (c, 1.0), "native", TypeError, "`step` must return tensors, got float"),
        (lambda c, x: (c.add_(1), ()), "eager", TypeError, "`step` changes an argument in place: a step must be pure"),
        (lambda c, x: (c.add_(1), ()), "native", TypeError, "`step` changes an argument, or a tensor"),
        (branches, "native", TypeError, "the value of a tensor is read in"),
        (branches, "inductor", TypeError, "the value of a tensor is read in"),
        (draws, "eager", TypeError, "random numbers can't be drawn inside .*popart_func.random"),
        (draws, "native", TypeError, "random numbers can't be drawn inside"),
        (lambda c, x: (c + torch.nonzero(x[None]).sum(), ()), "native", TypeError, "a shape depends on values in"),
        (is_narrow, "native", UnsupportedError, r"native: no dtype torch.bfloat16"),
        (looks_up, "native", IndexError, "native: an index was out of range"),
        (keep, "warp", ValueError, "`engine` must be 'auto' or one of"),
        (lambda c, x: (LEAF * c, ()), "native", UnsupportedError, "native: no gradient .* use the engine 'eager'"),
    ],
)
@pytest.mark.skipif("native" not in RUNNABLE, reason="no C++ compiler")
def test_errors_name_the_function_that_was_called(caller, step, engine, error, message):
    start = torch.tensor(1.0) if caller is scan else Z
    with pytest.raises(error, match=f"^{caller.__name__}: {message}"):
        caller(step, start, torch.ones(4), engine=engine)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scan_lanes("step", Z, Z), TypeError, "scan_lanes: `step` must be a function, got str"),
        (lambda: scan(keep, 0.0, Z), TypeError, "scan: every leaf of `carry` must be a tensor, got float"),
        (lambda: scan_lanes(keep, (), Z), ValueError, "`carry` must have at least one tensor"),
        (lambda: scan_lanes(keep, {"a": Z, "b": 1.0}, Z), TypeError, r"every leaf of `carry` .* got float at \('b',\)"),
        (lambda: scan_lanes(keep, Z, [1.0]), TypeError, r"every leaf of `xs` must be a tensor, got float at \(0,\)"),
        (
            lambda: scan_lanes(keep, {"a": Z, "b": torch.zeros(4)}, Z),
            ValueError,
            r"same leading lane axis: got \(3,\) at \('a',\) and \(4,\) at \('b',\)",
        ),
        (lambda: scan_lanes(keep, torch.tensor(1.0), Z), ValueError, r"leading lane axis: got \(\)"),
        (lambda: scan_lanes(keep, Z, (Z, torch.zeros(2))), ValueError, "same leading time axis"),
        (lambda: scan_lanes(keep, Z), ValueError, "`xs` has no tensors, so `length` must say how many"),
        (lambda: scan_lanes(keep, Z, Z, length=5), ValueError, "`length` must be the leading axis of `xs`, 3, got 5"),
        (lambda: scan_lanes(keep, Z, Z[:0]), ValueError, "at least one step and one lane, got 0 steps and 3 lanes"),
        (
            lambda: scan_lanes(keep, Z, Z, hparams=torch.zeros(2)),
            ValueError,
            r"number or have shape \(3,\), got shape \(2,\)",
        ),
        (lambda: scan_lanes(keep, Z, Z, hparams=2**63), ValueError, "must fit into 64 bits, got 9223372036854775808"),
        (lambda: scan_lanes(keep, Z, Z, hparams="a"), ValueError, r"number or have shape \(3,\), got str"),
        (
            lambda: scan_lanes(keep, Z, torch.zeros(2, 4), shared=False),
            ValueError,
            r"not shared must have shape \[time, lanes = 3, ...\], got \(2, 4\)",
        ),
        (
            lambda: scan_lanes(keep, Z, Z.to("meta")),
            ValueError,
            r"all tensors must lie on one device, got \['cpu', 'meta'\]",
        ),
        (
            lambda: scan_lanes(keep, Z, Z, engine="warp"),
            ValueError,
            r"`engine` must be 'auto' or one of \[.*\], got 'warp'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
