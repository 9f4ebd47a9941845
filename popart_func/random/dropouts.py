"""Dropout of every kind, and layers with dropout inside, as pure functions of a key.

Each takes a key first, and then the arguments of PyTorch's function: see `torch_draws`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from popart_func.random.basic import bernoulli, uniform
from popart_func.random.keys import fold_in

__all__ = ["DROPOUTS", "Draw"]

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
    dropped = _scaled(input, _kept(key, input, p, features), p)
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
    if p < 1:
        scale = 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
        dropped = input * (kept * scale) + ((kept - 1) * (_ALPHA * scale) + _ALPHA * scale * p)
    else:
        dropped = input * kept
    return input.copy_(dropped) if inplace else dropped


def _native_dropout(key: Tensor, input: Tensor, p: int | float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = _kept(key, input, p, features=False)
    return _scaled(input, kept, p), kept.bool()


def _scaled(input: Tensor, kept: Tensor, p: int | float) -> Tensor:
    """Dropped numbers as 0, and the others times 1/(1 − p)."""
    return input * (kept / (1 - p) if p < 1 else kept)


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


# Layers with dropout inside.


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


def _in_place(draw: Draw) -> Draw:
    return partial(draw, inplace=True)


_feature_dropout, _feature_alpha_dropout = (partial(drop, features=True) for drop in (_dropout, _alpha_dropout))

DROPOUTS: dict[Any, Draw] = {
    torch.dropout: _dropout,
    torch.feature_dropout: _feature_dropout,
    torch.alpha_dropout: _alpha_dropout,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.dropout_: _in_place(_dropout),
    torch.feature_dropout_: _in_place(_feature_dropout),
    torch.alpha_dropout_: _in_place(_alpha_dropout),
    torch.feature_alpha_dropout_: _in_place(_feature_alpha_dropout),
    torch.native_dropout: _native_dropout,
    torch.rrelu: _rrelu,
    torch.rrelu_: _in_place(_rrelu),
    functional.rrelu: _rrelu,
    functional.scaled_dot_product_attention: _attention,
    **{getattr(torch, name): _recurrent(getattr(torch, name)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
"""For each function of PyTorch that drops at random, the function that draws from a key."""
