"""PyTorch's random functions as pure functions of a key: draws and fractional pooling here, dropout in `dropouts`.

Each takes a key first, and then the arguments of PyTorch's function. It computes what PyTorch documents, from numbers
that `popart_func.random` draws. They are float32 (or int32) and then cast to the dtype that PyTorch returns. In-place
functions write to their argument and return it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from popart_func._torch import sample_dirichlet, standard_gamma
from popart_func.random.basic import bernoulli, normal, randint, uniform
from popart_func.random.choices import categorical, permutation
from popart_func.random.continuous import cauchy, exponential
from popart_func.random.counts import binomial, geometric, poisson
from popart_func.random.dropouts import DROPOUTS, Draw
from popart_func.random.gammas import dirichlet, gamma

__all__ = ["CREATIONS", "DRAWS"]

# Draws of a shape, and of the shape of a tensor.


def _cast(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    return drawn.to(dtype)


def _cast_below_one(drawn: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in a dtype; those of [0, 1) are rounded down, so that none becomes 1."""
    if dtype in (torch.float16, torch.bfloat16):
        steps = 2.0 ** (11 if dtype == torch.float16 else 8)
        drawn = torch.where((drawn >= 0) & (drawn < 1), (drawn * steps).floor() / steps, drawn)
    return drawn.to(dtype)


_Cast = Callable[[Tensor, torch.dtype], Tensor]


def _of_shape(sample: Callable[..., Tensor], default: torch.dtype | None = None, cast: _Cast = _cast) -> Draw:
    def draw(key: Tensor, *size: Any, dtype: Any = None, device: Any = None, out: Any = None, **others: Any) -> Tensor:
        size = others.pop("size", size)
        _check_others(others)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        drawn = cast(sample(key, tuple(shape)), dtype or default or torch.get_default_dtype()).to(device=device)
        return drawn if out is None else out.copy_(drawn)

    return draw


def _like(sample: Callable[..., Tensor], cast: _Cast = _cast) -> Draw:
    def draw(key: Tensor, input: Tensor, *, dtype: Any = None, device: Any = None, **others: Any) -> Tensor:
        _check_others(others)
        return cast(sample(key, input.shape), dtype or input.dtype).to(device=device)

    return draw


def _check_others(others: dict[str, Any]) -> None:
    """Refuses a generator: its state would change beside the key's. Other arguments say how results are stored."""
    if others.pop("generator", None) is not None:
        raise TypeError("keyed: `generator` must be None under a key, from which all numbers are drawn.")
    others.pop("requires_grad", None)


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


# Pooling of regions that are drawn.


def _pooling(function: Callable[..., Any], axes: int) -> Draw:
    """Fractional pooling, whose regions are drawn."""

    def draw(key: Tensor, input: Tensor, *args: Any, _random_samples: Tensor | None = None, **kwargs: Any) -> Any:
        if _random_samples is None:
            batch = 1 if input.ndim == axes + 1 else input.shape[0]
            _random_samples = uniform(key, (batch, input.shape[-axes - 1], axes)).to(input.dtype)
        return function(input, *args, _random_samples=_random_samples, **kwargs)

    return draw


# Methods that fill a tensor.


def _filling(sample: Callable[..., Tensor], cast: _Cast = _cast) -> Draw:
    """``sample(key, shape, *parameters)``."""

    def draw(key: Tensor, input: Tensor, *parameters: Any, generator: Any = None, **named: Any) -> Tensor:
        _check_others({"generator": generator})
        return input.copy_(cast(sample(key, input.shape, *parameters, **named), input.dtype))

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
    "rand": _of_shape(_rand, cast=_cast_below_one),
    "randn": _of_shape(_randn),
    "rand_like": _like(_rand, _cast_below_one),
    "randn_like": _like(_randn),
    "randint": _randint,
    "randint_like": _randint_like,
    "randperm": _randperm,
    "normal": _normal,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "poisson": _poisson,
    "binomial": _binomial,
}

_METHODS: dict[str, Draw] = {
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "bernoulli_": _filling(lambda key, shape, p=0.5: _coins(key, shape, p)),
    "uniform_": _filling(_uniform, _cast_below_one),
    "normal_": _filling(lambda key, shape, mean=0.0, std=1.0: normal(key, tuple(shape)) * std + mean),
    "exponential_": _filling(lambda key, shape, lambd=1.0: exponential(key, tuple(shape)) / lambd),
    "cauchy_": _filling(lambda key, shape, median=0.0, sigma=1.0: cauchy(key, tuple(shape)) * sigma + median),
    "log_normal_": _filling(lambda key, shape, mean=1.0, std=2.0: torch.exp(normal(key, tuple(shape)) * std + mean)),
    "geometric_": _filling(lambda key, shape, p: geometric(key, p, tuple(shape))),
    "random_": _filling(_any_integers),
}

DRAWS: dict[Any, Draw] = {
    **DROPOUTS,
    **{getattr(torch, name): draw for name, draw in _BY_NAME.items()},
    **{getattr(Tensor, name): draw for name, draw in _METHODS.items()},
    standard_gamma: _standard_gamma,
    sample_dirichlet: _sample_dirichlet,
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
