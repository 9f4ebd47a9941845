"""PyTorch's random functions as pure functions of a key: dropout of every kind, draws, recurrent layers, attention.

Each takes a key first, and then the arguments of PyTorch's function. It computes what PyTorch documents, from numbers
that `popart_func.random` draws. They are float32 (or int32) and then cast to the dtype that PyTorch returns. In-place
functions write to their argument and return it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from popart_func._torch import sample_dirichlet, standard_gamma
from popart_func.random.basic import bernoulli, normal, randint, uniform
from popart_func.random.choices import categorical, permutation
from popart_func.random.continuous import cauchy, exponential
from popart_func.random.counts import binomial, geometric, poisson
from popart_func.random.gammas import dirichlet, gamma
from popart_func.random.keys import fold_in

__all__ = ["CREATIONS", "DRAWS", "Draw"]

Draw = Callable[..., Any]
"""``draw(key, *arguments of PyTorch's function)``."""

_ALPHA = 1.7580993408473766
"""The value to which dropped activations of SELU go, without its sign: its scale times its α."""


# Dropout.


def _dropout(
    key: Tensor,
    input: Tensor,
    p: int | float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    features: bool = False,
) -> Tensor:
    _check_probability(p)
    if not training or p == 0:
        return input
    kept = _kept(key, input, p, features)
    dropped = input * (kept / (1 - p) if p < 1 else kept)
    return input.copy_(dropped) if inplace else dropped


def _alpha_dropout(
    key: Tensor,
    input: Tensor,
    p: int | float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    features: bool = False,
) -> Tensor:
    _check_probability(p)
    if not training or p == 0:
        return input
    kept = _kept(key, input, p, features)
    if p == 1:
        return input.copy_(input * kept) if inplace else input * kept
    scale = 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
    dropped = input * (kept * scale) + ((kept - 1) * (_ALPHA * scale) + _ALPHA * scale * p)
    return input.copy_(dropped) if inplace else dropped


def _native_dropout(key: Tensor, input: Tensor, p: int | float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = _kept(key, input, p, features=False)
    return input * (kept / (1 - p) if p < 1 else kept), kept.bool()


def _kept(key: Tensor, input: Tensor, p: int | float, features: bool) -> Tensor:
    """1 where a number is kept, 0 where it is dropped; for whole features ``[N, C, 1, ...]``."""
    shape = input.shape
    if features:
        if input.ndim < 2:
            raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
        shape = torch.Size([*input.shape[:2], *(1 for _ in input.shape[2:])])
    return bernoulli(key, 1.0 - p, shape).to(input.dtype)


def _check_probability(p: int | float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _rrelu(
    key: Tensor,
    input: Tensor,
    lower: int | float = 1 / 8,
    upper: int | float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    slope = uniform(key, input.shape, None, lower, upper).to(input.dtype) if training else (lower + upper) / 2
    result = torch.where(input > 0, input, input * slope)
    return input.copy_(result) if inplace else result


# Layers that drop between other operations.


def _attention(
    key: Tensor,
    query: Tensor,
    key_: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: int | float = 0.0,
    is_causal: bool = False,
    scale: int | float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as its documentation writes it out."""
    if dropout_p == 0:
        return functional.scaled_dot_product_attention(
            query, key_, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key_, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key_, value))
    scores = query @ key_.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return _dropout(key, scores.softmax(-1), dropout_p) @ value


def _recurrent(function: Callable[..., Any]) -> Draw:
    """A recurrent layer with dropout between its layers: one call of the function for each."""

    def draw(key: Tensor, input: Tensor, *arguments: Any) -> Any:
        is_packed = not isinstance(arguments[2], bool)
        sizes, arguments = (arguments[:1], arguments[1:]) if is_packed else ((), arguments)
        state, weights, biases, layers, p, training, bidirectional, *batch_first = arguments
        if not training or p == 0:
            return function(input, *sizes, *arguments)
        directions, per_layer = 1 + bidirectional, len(weights) // layers
        states = []
        for layer in range(layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            own = tuple(part[rows] for part in state) if isinstance(state, list | tuple) else state[rows]
            own_weights = weights[layer * per_layer : (layer + 1) * per_layer]
            dropped = input if layer == 0 else _dropout(fold_in(key, layer), input, p)
            input, *new = function(
                dropped, *sizes, own, own_weights, biases, 1, 0.0, training, bidirectional, *batch_first
            )
            states.append(new)
        return input, *(torch.cat(parts) for parts in zip(*states, strict=True))

    return draw


def _pooling(function: Callable[..., Any], axes: int) -> Draw:
    """Fractional pooling, whose regions are drawn."""

    def draw(key: Tensor, input: Tensor, *args: Any, _random_samples: Tensor | None = None, **kwargs: Any) -> Any:
        if _random_samples is None:
            batch = 1 if input.ndim == axes + 1 else input.shape[0]
            _random_samples = uniform(key, (batch, input.shape[-axes - 1], axes)).to(input.dtype)
        return function(input, *args, _random_samples=_random_samples, **kwargs)

    return draw


# Draws of a shape, and of the shape of a tensor.


def _of_shape(sample: Callable[..., Tensor], default: torch.dtype | None = None) -> Draw:
    def draw(key: Tensor, *size: Any, dtype: Any = None, device: Any = None, out: Any = None, **others: Any) -> Tensor:
        size = others.pop("size", size)
        _check_others(others)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        drawn = _finished(sample(key, tuple(shape)), dtype or default or torch.get_default_dtype(), device)
        return drawn if out is None else out.copy_(drawn)

    return draw


def _like(sample: Callable[..., Tensor]) -> Draw:
    def draw(key: Tensor, input: Tensor, *, dtype: Any = None, device: Any = None, **others: Any) -> Tensor:
        _check_others(others)
        return _finished(sample(key, input.shape), dtype or input.dtype, device)

    return draw


def _check_others(others: dict[str, Any]) -> None:
    """Refuses a generator: its state would change beside the key's. Other arguments say how results are stored."""
    if others.pop("generator", None) is not None:
        raise TypeError("keyed: `generator` must be None under a key, from which all numbers are drawn.")
    others.pop("requires_grad", None)


def _finished(drawn: Tensor, dtype: torch.dtype, device: Any = None) -> Tensor:
    """The numbers in a dtype; those of [0, 1) must not be rounded to 1."""
    if dtype in (torch.float16, torch.bfloat16) and drawn.is_floating_point():
        steps = 2.0 ** (11 if dtype == torch.float16 else 8)
        drawn = torch.where((drawn >= 0) & (drawn < 1), (drawn * steps).floor() / steps, drawn)
    return drawn.to(dtype=dtype, device=device)


def _integers(key: Tensor, low: int, high: int | None, shape: Any) -> Tensor:
    low, high = (0, low) if high is None else (low, high)
    return randint(key, tuple(shape), low, high)


def _randint(key: Tensor, *args: Any, size: Any = None, low: int = 0, high: int | None = None, **others: Any) -> Tensor:
    if args and size is None:
        *args, size = args  # type: ignore[assignment]
    low, high = (*args, high)[:2] if len(args) == 1 and high is not None else (*args, *((low, high)[len(args) :]))[:2]
    low, high = (0, low) if high is None else (low, high)
    return _of_shape(lambda key, shape: randint(key, shape, low, high), torch.int64)(key, size, **others)


def _randint_like(key: Tensor, input: Tensor, low: int = 0, high: int | None = None, **others: Any) -> Tensor:
    return _like(lambda key, shape: _integers(key, low, high, shape))(key, input, **others)


def _randperm(key: Tensor, n: int, *, dtype: Any = torch.int64, device: Any = None, **others: Any) -> Tensor:
    _check_others(others)
    return permutation(key, n).to(dtype=dtype, device=device)


def _normal(key: Tensor, mean: Any, std: Any = 1.0, size: Any = None, **others: Any) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape for part in (mean, std) if isinstance(part, Tensor)), size or ())
    dtype = next((part.dtype for part in (mean, std) if isinstance(part, Tensor)), None)
    return (
        _of_shape(lambda key, shape: normal(key, shape), others.pop("dtype", dtype))(key, shape, **others) * std + mean
    )


# Draws by tensors of parameters.


def _bernoulli(key: Tensor, input: Tensor, p: Any = None, **others: Any) -> Tensor:
    _check_others(others)
    return _coins(key, input.shape, input if p is None else p).to(input.dtype)


def _coins(key: Tensor, shape: Sequence[int], p: Any) -> Tensor:
    return bernoulli(key, p, tuple(shape))


def _multinomial(
    key: Tensor, input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    _check_others({"generator": generator})
    shape = (num_samples, *input.shape[:-1])
    return categorical(key, input.to(torch.float32).log(), -1, shape, replace=replacement).movedim(0, -1)


def _poisson(key: Tensor, input: Tensor, generator: Any = None) -> Tensor:
    _check_others({"generator": generator})
    return poisson(key, input.to(torch.float32), input.shape).to(input.dtype)


def _binomial(key: Tensor, count: Tensor, prob: Tensor, generator: Any = None) -> Tensor:
    _check_others({"generator": generator})
    return binomial(key, count.to(torch.float32), prob.to(torch.float32)).to(count.dtype)


def _standard_gamma(key: Tensor, input: Tensor, generator: Any = None) -> Tensor:
    _check_others({"generator": generator})
    return gamma(key, input.to(torch.float32), input.shape).to(input.dtype)


def _sample_dirichlet(key: Tensor, input: Tensor, generator: Any = None) -> Tensor:
    _check_others({"generator": generator})
    return dirichlet(key, input.to(torch.float32)).to(input.dtype)


# Methods that fill a tensor.


def _filling(sample: Callable[..., Tensor]) -> Draw:
    """``sample(key, shape, *parameters)``."""

    def draw(key: Tensor, input: Tensor, *parameters: Any, generator: Any = None, **named: Any) -> Tensor:
        _check_others({"generator": generator})
        return input.copy_(_finished(sample(key, input.shape, *parameters, **named), input.dtype))

    return draw


def _uniform(key: Tensor, shape: Any, from_: int | float = 0.0, to: int | float = 1.0, **named: int | float) -> Tensor:
    return uniform(key, tuple(shape), None, named.get("from", from_), to)


def _any_integers(key: Tensor, shape: Any, low: int = 0, high: int | None = None, **named: int) -> Tensor:
    low, high = named.get("from", low), named.get("to", high)
    if high is None and low == 0:
        raise TypeError("keyed: `random_` must be given bounds under a key, as in x.random_(0, 10).")
    return _integers(key, low, high, shape)


_rand, _randn = (lambda key, shape: uniform(key, tuple(shape))), (lambda key, shape: normal(key, tuple(shape)))

_BY_NAME: dict[str, Draw] = {
    "rand": _of_shape(_rand),
    "randn": _of_shape(_randn),
    "rand_like": _like(_rand),
    "randn_like": _like(_randn),
    "randint": _randint,
    "randint_like": _randint_like,
    "randperm": _randperm,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "poisson": _poisson,
    "binomial": _binomial,
    "dropout": _dropout,
    "feature_dropout": partial(_dropout, features=True),
    "alpha_dropout": _alpha_dropout,
    "feature_alpha_dropout": partial(_alpha_dropout, features=True),
    "dropout_": partial(_dropout, inplace=True),
    "feature_dropout_": partial(_dropout, inplace=True, features=True),
    "alpha_dropout_": partial(_alpha_dropout, inplace=True),
    "feature_alpha_dropout_": partial(_alpha_dropout, inplace=True, features=True),
    "native_dropout": _native_dropout,
    "rrelu": _rrelu,
    "rrelu_": partial(_rrelu, inplace=True),
    **{name: _recurrent(getattr(torch, name)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}

_METHODS: dict[str, Draw] = {
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "bernoulli_": _filling(lambda key, shape, p=0.5: _coins(key, shape, p)),
    "uniform_": _filling(_uniform),
    "normal_": _filling(lambda key, shape, mean=0.0, std=1.0: normal(key, tuple(shape)) * std + mean),
    "exponential_": _filling(lambda key, shape, lambd=1.0: exponential(key, tuple(shape)) / lambd),
    "cauchy_": _filling(lambda key, shape, median=0.0, sigma=1.0: cauchy(key, tuple(shape)) * sigma + median),
    "log_normal_": _filling(lambda key, shape, mean=1.0, std=2.0: torch.exp(normal(key, tuple(shape)) * std + mean)),
    "geometric_": _filling(lambda key, shape, p: geometric(key, p, tuple(shape))),
    "random_": _filling(_any_integers),
}

DRAWS: dict[Any, Draw] = {
    **{getattr(torch, name): draw for name, draw in _BY_NAME.items()},
    **{getattr(Tensor, name): draw for name, draw in _METHODS.items()},
    standard_gamma: _standard_gamma,
    sample_dirichlet: _sample_dirichlet,
    functional.rrelu: _rrelu,
    functional.scaled_dot_product_attention: _attention,
    functional.fractional_max_pool2d: _pooling(functional.fractional_max_pool2d, 2),
    functional.fractional_max_pool3d: _pooling(functional.fractional_max_pool3d, 3),
    functional.fractional_max_pool2d_with_indices: _pooling(functional.fractional_max_pool2d_with_indices, 2),
    functional.fractional_max_pool3d_with_indices: _pooling(functional.fractional_max_pool3d_with_indices, 3),
}
"""For each random function of PyTorch that has one, the function that draws from a key."""

CREATIONS = (
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
)
"""Functions that make a tensor, which an in-place draw may fill."""
