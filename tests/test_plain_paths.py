"""A trace says that it is one, and takes the plain path of every layer, for the engines and for JAX alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.func import functional_call, grad

import popart_func as pf
from popart_func.interop.jax import to_jax, to_jax_function, to_torch

pytestmark = pytest.mark.usefixtures("unoptimized_xla")

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
PAD = torch.tensor([[False, False, False, False, True]] * 2)


Functions = dict[str, Callable[[Tensor], Tensor]]


def at_once(functions: Functions) -> Callable[[Tensor], dict[str, Tensor]]:
    """One function that calls all: it is traced and compiled once."""
    return lambda x: {name: function(x) for name, function in functions.items()}


def on_native(functions: Functions, x: Tensor) -> dict[str, Tensor]:
    """What functions return inside a step of the native engine."""
    step = lambda carry, x: (carry, at_once(functions)(x))  # noqa: E731
    ys = pf.scan_lanes(step, torch.zeros(1), x[None], shared=True, engine="native")[1]
    return {name: y[0, 0] for name, y in ys.items()}


def in_jax(functions: Functions, x: Tensor) -> dict[str, Tensor]:
    result: dict[str, Tensor] = to_torch(jax.jit(to_jax_function(at_once(functions)))(to_jax(x)))
    return result


def layer(make: Callable[[], nn.Module]) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    module = make().eval().requires_grad_(False)

    def function(*args: Tensor, **kwargs: Any) -> Tensor:
        result: Any = module(*args, **kwargs)
        while isinstance(result, tuple):
            result = result[0]
        return result  # type: ignore[no-any-return]

    return function


def as_transformers_do(x: Tensor) -> Tensor:
    """The shortcut of Hugging Face's models with a mask."""
    mask = x > 0
    is_tracing = torch.jit.is_tracing()
    is_tracing |= torch.compiler.is_compiling()
    if not is_tracing and torch.all(mask):
        return torch.zeros(mask.shape)
    return torch.where(mask, 0.0, -1e9)


encoder = layer(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
attention = layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a shortcut": as_transformers_do,
    "normal": lambda x: Normal(x, 1.0).log_prob(torch.zeros(())),
    "categorical": lambda x: Categorical(logits=x).log_prob(torch.zeros((), dtype=torch.int64)),
    "entropy": lambda x: Categorical(probs=x.softmax(-1)).entropy(),
    "lstm": layer(lambda: nn.LSTM(8, 4, 2, bidirectional=True)),
    "gru": layer(lambda: nn.GRU(8, 4)),
    "rnn": layer(lambda: nn.RNN(8, 4)),
    "encoder": encoder,
    "encoder with padding": lambda x: encoder(x, src_key_padding_mask=PAD)[:, :-1],  # the fast path zeroes the rest
    "attention": lambda x: attention(x, x, x, key_padding_mask=PAD),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the fast path, which eager takes
@pytest.mark.parametrize("run", [on_native, in_jax])
def test_traces_as_eager_computes(run: Callable[..., dict[str, Tensor]]) -> None:
    for name, got in run(FUNCTIONS, X).items():
        torch.testing.assert_close(
            got, FUNCTIONS[name](X), rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_does_not_depend_on_what_was_switched_before() -> None:
    step = lambda x: Normal(x, 1.0).log_prob(torch.zeros(()))  # noqa: E731
    on_native_alone = lambda function: on_native({"": function}, X)[""]  # noqa: E731
    before = on_native_alone(step)
    flag = torch.distributions.Distribution._validate_args
    try:
        for validates in (True, False):
            torch.distributions.Distribution.set_default_validate_args(validates)
            assert torch.equal(on_native_alone(lambda x: step(x)), before)
            assert torch.distributions.Distribution._validate_args is validates
    finally:
        torch.distributions.Distribution._validate_args = flag
    with torch.inference_mode():
        assert torch.equal(on_native_alone(lambda x: grad(lambda x: step(x).sum())(x)), -X)


def test_flags_are_put_back_after_an_error() -> None:
    traced = []

    def step(x: Tensor) -> Tensor:
        traced.append(bool(torch.compiler.is_compiling()))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        on_native({"": step}, X)
    assert traced == [True, False], "then on eager, to see whose error it is"
    assert torch.compiler.is_compiling() is False
    assert torch.backends.mha.get_fastpath_enabled() is True


def of_bag(mode: str, padding: int | None) -> Functions:
    """By name: functions of an embedding's weight [5, 3]."""
    bag = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=padding, include_last_offset=True)
    indices, offsets = torch.tensor([1, 2, 1, 3, 4, 4]), torch.tensor([0, 0, 3, 4, 6])
    shares = torch.linspace(0.5, 1, 6) if mode == "sum" else None
    call = lambda weight, *args: functional_call(bag, {"weight": weight}, args)  # noqa: E731
    flat = lambda weight: call(weight, indices, offsets, shares)  # noqa: E731
    return {
        "flat": flat,
        "rows": lambda weight: call(weight, indices.reshape(2, 3)),
        "loss": lambda weight: flat(weight).square().sum(),
    }


def test_embedding_bags() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    functions = {
        f"{mode} {padding} {name}": function
        for mode in ("sum", "mean", "max")
        for padding in (None, 1, -1)
        for name, function in of_bag(mode, padding).items()
    }
    losses = {name: function for name, function in functions.items() if name.endswith("loss")}
    slopes = {f"slope of {name}": grad(function) for name, function in losses.items()}
    expected = at_once(functions | slopes)(weight)
    by_jax = jax.jit(lambda x: {f"slope of {name}": jax.grad(to_jax_function(losses[name]))(x) for name in losses})
    found = [
        on_native(functions | slopes, weight),
        in_jax(functions | slopes, weight),
        to_torch(by_jax(to_jax(weight))),
    ]
    for got in found:
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_embedding_bag_without_offsets() -> None:
    with pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
        to_jax_function(nn.EmbeddingBag(5, 3))(jnp.array([1, 2]))
