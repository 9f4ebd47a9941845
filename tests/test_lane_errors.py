"""What can't run in lanes is refused by name on the eager engine, with the line of the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import grad

from popart_func.engines import scan_lanes
from popart_func.engines.tracing.source_lines import TraceError

READS, SHAPE = "the value of a tensor is read in", "a shape depends on values in"


def _add_out(x: Tensor) -> Tensor:
    return torch.add(x, x, out=torch.empty_like(x))


def _sort_out(x: Tensor) -> Tensor:
    values, _ = torch.sort(x, out=(torch.empty_like(x), torch.zeros_like(x, dtype=torch.int64)))
    return values


def _backward(x: Tensor) -> Tensor:
    x.sum().backward()
    return x


def _average_of_all_batches(x: Tensor) -> Tensor:
    norm = torch.nn.BatchNorm1d(3, momentum=None)
    buffers = {"num_batches_tracked": x[0, 0].long(), "running_mean": x[0] * 0, "running_var": x[0] * 0 + 1}
    return torch.func.functional_call(norm, buffers, (x,))


def _ctc(x: Tensor) -> Tensor:
    loss = lambda x: F.ctc_loss(x[:, None].log_softmax(-1), torch.tensor([[1, 2]]), (4,), (2,))  # noqa: E731
    return grad(loss)(x)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "item": (lambda x: x * x.sum().item(), TraceError, READS),
    "branch": (lambda x: x if x.sum() > 0 else -x, TraceError, READS),
    "numpy": (lambda x: torch.tensor(x.numpy()), TraceError, READS),
    "batch norm": (_average_of_all_batches, TraceError, READS),
    "ctc": (_ctc, TraceError, READS),
    "distribution": (
        lambda x: torch.distributions.Geometric(x.sigmoid(), validate_args=True).log_prob(x),
        TraceError,
        "a distribution checks the values of its arguments in",
    ),
    "mask": (lambda x: x[x > 0], TraceError, SHAPE),
    "nonzero": (lambda x: x.nonzero(), TraceError, SHAPE),
    "out": (_add_out, TypeError, "`out=` can't be given inside `step` in lanes, in"),
    "outs": (_sort_out, TypeError, "`out=` can't be given inside `step` in lanes, in"),
    "requires_grad_": (lambda x: x.clone().requires_grad_(), TypeError, "`requires_grad_` can't be called inside"),
    "backward": (_backward, TypeError, "`backward` can't be called inside `step` in lanes, in"),
}


@pytest.mark.parametrize("name", CASES)
def test_names_what_lanes_cannot_do(name: str) -> None:
    function, kind, message = CASES[name]
    x = torch.arange(24.0).reshape(1, 2, 4, 3)
    with pytest.raises(kind, match=rf"^scan_lanes: {message}.*test_lane_errors\.py:\d+"):
        scan_lanes(lambda carry, x: (carry, function(x)), torch.zeros(2), x, shared=False, engine="eager")


def test_an_error_of_the_step_stays_its_own() -> None:
    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        scan_lanes(step, torch.zeros(2), torch.ones(1, 2), shared=False, engine="eager")
