"""What loops inside a step refuse, in Python and in a trace: the error names the function and the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loop_programs import H, traced
from torch import Tensor
from torch.func import vmap

import popart_func as pf
from popart_func.engines.tracing.source_lines import TraceError

ERRORS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "dtype": (
        lambda h: pf.scan(lambda c, _: (c.float(), ()), h, length=2),
        TypeError,
        "scan: `step` must return the shapes",
    ),
    "structure": (lambda h: pf.scan(lambda c, _: ((c, c), ()), h, length=2), TypeError, "the structure of the carry"),
    "pair": (lambda h: pf.scan(lambda c, _: c, h, length=2), TypeError, r"must return \(carry, y\), got a tensor"),
    "number": (lambda h: pf.scan(lambda c, _: (c, 1.0), h, length=2), TypeError, "as y must be a tensor, got float"),
    "length": (
        lambda h: pf.scan(lambda c, x: (c, ()), h, h, length=2),
        ValueError,
        "the leading axis of `xs`, 3, got 2",
    ),
    "lengths": (lambda h: pf.scan(lambda c, x: (c, ()), h, (h, h[:2])), ValueError, "same leading time axis"),
    "no length": (lambda h: pf.scan(lambda c, x: (c, ()), h), ValueError, "`length` must say how many"),
    "checkpoint": (lambda h: pf.scan(lambda c, x: (c, ()), h, h, checkpoint=0), ValueError, "`checkpoint` must be at"),
    "unroll": (lambda h: pf.scan(lambda c, x: (c, ()), h, h, unroll=1.5), TypeError, "`unroll` must be an integer"),
    "predicate": (lambda h: pf.while_loop(lambda c: c, lambda c: c, h), TypeError, "a bool tensor of shape"),
    "body": (lambda h: pf.while_loop(lambda c: c.sum() < 9, lambda c: c[:2], h), TypeError, "while_loop: `body` must"),
    "function": (lambda h: pf.cond(h.sum() > 0, torch.sin, 1, h), TypeError, "`false` must be a function, got int"),
    "bound": (lambda h: pf.fori_loop(0, 1.5, lambda i, c: c, h), TypeError, "`upper` must be an integer"),
    "round": (
        lambda h: pf.fori_loop(0, 2, lambda i, c: c.half(), h),
        TypeError,
        "fori_loop: `body` must return the sh",
    ),
    "carry": (lambda h: pf.fori_loop(0, 2, lambda i, c: c, 1.0), TypeError, "`carry` must be a tensor, got float"),
    "engine": (
        lambda h: pf.scan(lambda c, x: (c, ()), h, h, engine="native"),
        pf.engines.EngineUnavailableError,
        "Use the engine 'eager', or name one",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_function_and_the_argument(name: str, unchecked: None):
    call, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        vmap(call)(H[None])
    with pytest.raises(error, match=match):
        traced(call, H)


def test_branches_must_return_alike():
    with pytest.raises(TypeError, match="cond: `false` must return the shapes and dtypes of what `true` returns"):
        traced(lambda h: pf.cond(h.sum() > 0, lambda h: h, lambda h: h[:2], h), H)


def test_a_body_must_be_pure():
    with pytest.raises(TraceError, match="in place"):
        traced(lambda h: pf.scan(lambda c, _: (c.add_(1), ()), h, length=2), H)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("while_loop: .*what `cond` returns", lambda x: pf.while_loop(lambda c: c < 10, lambda c: 2 * c, x)),
        ("cond: .*`predicate`", lambda x: pf.cond(x > 0, torch.neg, torch.exp, x)),
    ],
)
def test_torch_jit_trace_would_keep_a_choice(name: str, loop: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=f"{name}.* use torch.compile"):
        torch.jit.trace(loop, torch.tensor(1.0))
