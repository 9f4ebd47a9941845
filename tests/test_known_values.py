"""Values of constants are known while tracing: they may decide shapes and branches, and their changes are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import grad

import popart_func as pf
from popart_func.engines.tracing.source_lines import TraceError
from popart_func.interop.jax import to_jax, to_jax_function, to_torch

X = torch.tensor([1.0, -2.0, 3.0])
MASK, LENGTHS = torch.tensor([True, False, True]), torch.tensor([1, 2, 0])


def on_native(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    ys: Tensor = pf.scan_lanes(lambda c, _: (c, function(c)), x[None], torch.zeros(1), engine="native")[1]
    return ys[0, 0]


def in_jax(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result: Tensor = to_torch(to_jax_function(function)(to_jax(x)))
    return result


def makes_a_mask(x: Tensor) -> Tensor:
    mask = torch.zeros(3, dtype=torch.bool)
    mask[1] = True
    last = mask[2:]
    last |= True
    return x[mask]


def writes_where(x: Tensor) -> Tensor:
    y = x.clone()
    y[MASK] = x[:2] * 2
    return y


def turns_a_mask(x: Tensor) -> Tensor:
    mask = torch.tensor([[True, False, True]])
    mask.t_()
    return x[mask[:, 0]]


def drops_layers(x: Tensor) -> Tensor:
    """As wav2vec2 does in eval mode."""
    probability = torch.rand([])
    return torch.where(probability < 0.1, 0 * x, x) if nn.Identity().eval().training else x


def draws_in_place(x: Tensor) -> Tensor:
    x.clone().bernoulli_()
    return x * 2


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda x: x[MASK],
    "list": lambda x: x[[True, False, True]],
    "mask of two axes": lambda x: x.expand(2, 3)[torch.stack([MASK, ~MASK])],
    "mask and integers": lambda x: x.expand(2, 3)[1, MASK],
    "made mask": makes_a_mask,
    "made of shapes": lambda x: x[torch.ones_like(x) > 0],
    "made of nothing": lambda x: x[torch.empty(3).fill_(1.0) > 0],
    "turned mask": turns_a_mask,
    "writes": writes_where,
    "adds": lambda x: x.index_put((MASK,), x[:2], accumulate=True),
    "number": lambda x: x * int(LENGTHS[1]),
    "numbers": lambda x: x.split(LENGTHS.tolist())[1],
    "branch": lambda x: -x if torch.all(MASK) else 2 * x,
    "equal": lambda x: -x if torch.equal(MASK, ~MASK) else 2 * x,
    "repeats": lambda x: x.repeat_interleave(LENGTHS),
    "triangle": lambda x: x[torch.triu_indices(3, 3)[0]] + x[torch.tril_indices(3, 3)[1]],
    "nonzero": lambda x: x[MASK.nonzero()[:, 0]],
    "where": lambda x: x[torch.where(MASK)],
    "unique": lambda x: x[LENGTHS.unique()],
    "masked_select": lambda x: x.masked_select(MASK),
    "masked_scatter": lambda x: torch.zeros(2, 3).masked_scatter(MASK, x[[0, 1, 2, 0]]),
    "masked_scatter of a mask that is not known": lambda x: x.masked_scatter(x > 0, -x),
    "gradient": grad(lambda x: (x[MASK] ** 3).sum() + (x.masked_select(MASK) ** 2).sum()),
    "padded": lambda x: F.pad(x, LENGTHS.tolist()[:2]),
    "a draw for nothing": drops_layers,
    "a draw in place for nothing": draws_in_place,
    "rrelu": lambda x: F.rrelu(x, training=False),
}


@pytest.mark.parametrize("run", [on_native, in_jax])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_as_eager_computes(name: str, run: Callable[..., Tensor]) -> None:
    before = torch.get_rng_state()
    got = run(FUNCTIONS[name], X)
    assert torch.equal(torch.get_rng_state(), before), "a trace draws from PyTorch's generator"
    torch.testing.assert_close(got, FUNCTIONS[name](X))


@pytest.mark.parametrize("run", ["native", "jax"])
def test_a_change_of_what_was_read_is_noticed(run: str) -> None:
    mask, lengths, weights = MASK.clone(), LENGTHS.clone(), torch.tensor([float("nan"), 1.0])
    step = lambda c, x: (c * int(lengths[:2][1] * 2) + c[mask].sum() + float(weights[1]), ())  # noqa: E731
    in_jax = to_jax_function(lambda c: step(c, None)[0])

    def go() -> Tensor:
        if run == "jax":
            return to_torch(in_jax(to_jax(X)))  # type: ignore[no-any-return]
        carry: Tensor = pf.scan_lanes(step, X[None], torch.zeros(1), engine="native")[0]
        return carry[0]

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: mask.__setitem__(0, False),
        lambda: lengths.add_(1),
        lambda: mask.fill_(True),
        lambda: weights.mul_(3),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(go(), step(X, None)[0])


def test_a_trace_writes_to_nothing_that_it_knows() -> None:
    table = torch.zeros(3)

    def step(x: Tensor) -> Tensor:
        view = table[:1]
        view.add_(1)
        return x * float(table[0])

    with pytest.raises(TraceError, match="the value of a tensor is read"):
        in_jax(step, X)
    assert torch.equal(table, torch.zeros(3))


def mixes(x: Tensor) -> Tensor:
    mask = torch.ones(3, dtype=torch.bool)
    mask[0] = x[0] > 0
    return x[mask]  # HERE


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (mixes, "a shape depends on values in .* # HERE"),
        (lambda x: x[x > 0], "a shape depends on values"),
        (lambda x: x.expand(2, 3)[MASK[:2], x > 0], "a shape depends on values"),
        (lambda x: x.repeat_interleave(x.long()), "a shape depends on values"),
        (lambda x: x + torch.rand(3), r"'rand' does in .*popart_func\.random"),
        (lambda x: x if torch.rand(()) < 0.5 else -x, r"'rand' does in .*popart_func\.random"),
        (F.dropout, r"'bernoulli' does in .*popart_func\.random"),
        (lambda x: torch.distributions.Categorical(logits=x).sample(), r"'multinomial' .*popart_func\.random"),
        (lambda x: torch.distributions.Dirichlet(x.exp()).sample(), r"'_sample_dirichlet' .*popart_func\.random"),
        (lambda x: F.rrelu(x, training=True), r"random numbers can't be drawn .*popart_func\.random"),
    ],
)
@pytest.mark.parametrize("run", [on_native, in_jax])
def test_refuses_what_is_not_known(run: Any, function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        run(function, X)


def test_jax_differentiates_through_known_places() -> None:
    slope = jax.grad(lambda x: (to_jax_function(lambda x: x[MASK])(x) ** 2).sum())(to_jax(X))
    assert jnp.allclose(slope, jnp.array([2.0, 0.0, 6.0]))
