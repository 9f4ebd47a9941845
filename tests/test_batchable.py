"""Functions without a rule for `torch.vmap`, in lanes: the same as one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, vmap
from torch.func import grad
from torch.nn.utils.rnn import pack_padded_sequence

from popart_func.engines import scan_lanes
from popart_func.engines.tracing.batchable import Batchable
from popart_func.interop.jax import to_jax_function

X = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([True, False, True, True, False, False])


def recurrent(make: Callable[[], nn.RNNBase]) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    return lambda x: module(x)[0]  # type: ignore[no-any-return]


def filled(x: Tensor) -> Tensor:
    x = x * 1
    x[x < 0] = 0
    x[MASK] = torch.tensor(5.0)
    x[~MASK] = True
    x[0] = 7
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "LSTM": recurrent(lambda: nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2)),
    "LSTM, batch first": recurrent(lambda: nn.LSTM(4, 3, batch_first=True)),
    "GRU": recurrent(lambda: nn.GRU(4, 3, 2, bias=False)),
    "RNN": recurrent(lambda: nn.RNN(4, 3, nonlinearity="relu")),
    "one_hot": lambda x: nn.functional.one_hot(x.argmax(-1), 4).float() * x,
    "a value where a mask is true": filled,
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lanes_compute_what_each_gives_alone(name: str) -> None:
    function = FUNCTIONS[name]
    ys = scan_lanes(lambda c, x: (c, function(x)), torch.zeros(3), X[None], shared=False, engine="eager")[1][0]
    torch.testing.assert_close(ys, torch.stack(list(map(function, X))))
    with Batchable():
        slopes = vmap(grad(lambda x: function(x).square().sum()))(X)
    alone = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(function(x).square().sum() for x in alone), alone)
    torch.testing.assert_close(slopes, expected)


def test_packed_sequences_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"packed sequences can't be traced, in .*test_batchable.py.* padded sequences"):
        to_jax_function(lambda x: pack_padded_sequence(x, torch.tensor([3, 2, 1, 1])).data)(X.mT[:, :, :, None].numpy())
