"""Random numbers equal those of `jax.random` to the bit: alone, in lanes, and on the native engine."""

from __future__ import annotations

import inspect
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, vmap

from popart_func import _xla, random
from popart_func.engines import compiler, native, scan_lanes
from popart_func.interop.jax import to_jax_function
from popart_func.random import choices, initializers

SEEDS = [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1]
SHAPES = [(), (1,), (7,), (3, 5), (0, 2), (1000,)]
LIMITS = torch.tensor([0.1, 0.5, 0.9])
LOGITS = torch.tensor([[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 0.0, -3.0], [0.1, 0.2, 0.3, 0.4]])


def as_jax(key: Tensor) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(key.numpy().view(np.uint32)))


def same(got: Tensor, expected: Any) -> None:
    expected = np.asarray(expected)
    assert tuple(got.shape) == expected.shape
    np.testing.assert_array_equal(got.numpy().astype(expected.dtype), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_keys(seed: int) -> None:
    key, expected = random.key(seed), jax.random.key(seed)
    for mine, theirs in [
        (key, expected),
        (random.key(torch.tensor(seed)), expected),
        (random.split(key), jax.random.split(expected)),
        (random.split(key, (2, 3)), jax.random.split(expected, (2, 3))),
        (random.fold_in(key, 7), jax.random.fold_in(expected, 7)),
        (random.fold_in(key, torch.tensor(2**31 + 5)), jax.random.fold_in(expected, 2**31 + 5)),
    ]:
        assert mine.dtype == torch.int32
        same(mine, np.asarray(jax.random.key_data(theirs)).view(np.int32))


@pytest.mark.parametrize("seed", [780233, 5158431])
def test_where_the_first_number_is_0_or_a_half(seed: int) -> None:
    """Of all seeds the first ones with these; a logarithm of 0 would be infinite."""
    key, expected = random.key(seed), jax.random.key(seed)
    assert random.uniform(key, (1,)) in (0, 0.5)
    same(random.normal(key, (1,)), jax.random.normal(expected, (1,)))
    for mode in (None, "low", "high"):
        drawn = random.gumbel(key, (1,), mode=mode)
        assert drawn.isfinite().all()
        same(drawn, jax.random.gumbel(expected, (1,), mode=mode))


def test_a_seed_of_32_bits_is_not_one_of_64() -> None:
    for seed in (5, -1):
        expected = jax.random.key_data(jax.random.key(jnp.int32(seed)))
        same(random.key(torch.tensor(seed, dtype=torch.int32)), np.asarray(expected).view(np.int32))


def test_a_seed_of_64_bits_uses_all_of_them() -> None:
    with jax.enable_x64(True):
        expected = np.asarray(jax.random.key_data(jax.random.key(2**40 + 3)))
    same(random.key(2**40 + 3), expected.view(np.int32))
    same(random.key(torch.tensor(2**40 + 3)), expected.view(np.int32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws(seed: int, shape: tuple[int, ...]) -> None:
    key = random.key(seed)
    other = as_jax(key)
    same(random.bits(key, shape), jax.random.bits(other, shape, dtype="uint32").view(np.int32))
    same(random.uniform(key, shape), jax.random.uniform(other, shape))
    same(random.bernoulli(key, 0.3, shape), jax.random.bernoulli(other, 0.3, shape))


@pytest.mark.parametrize(
    ("minval", "maxval"),
    [(0, 1), (0, 2), (0, 7), (0, 10), (-5, 7), (3, 3), (5, 2), (0, 2**31 - 1), (-(2**31), 2**31 - 1), (-(2**31), 100)],
)
def test_randint(minval: int, maxval: int) -> None:
    for seed in SEEDS:
        key = random.key(seed)
        same(random.randint(key, (500,), minval, maxval), jax.random.randint(as_jax(key), (500,), minval, maxval))
    bounds = torch.tensor([1, 5, 1000])
    same(
        random.randint(key, (4, 3), 0, bounds),
        jax.random.randint(as_jax(key), (4, 3), 0, jnp.asarray(bounds.numpy().astype(np.int32))),
    )


# Where the machine can, XLA rounds ``a * b + c`` once, and so does the library's imitation of it.
ROUNDS_ONCE = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
needs_fused = pytest.mark.skipif(not ROUNDS_ONCE, reason="no fused multiply-add")


@needs_fused
@pytest.mark.parametrize(
    ("minval", "maxval"), [(-1.0, 1.0), (0.0, 0.1), (0.0, 2.0), (1.0, 1.0), (-3.7, 1e6), (0.25, 2.25)]
)
def test_uniform_between(minval: float, maxval: float) -> None:
    key = random.key(3)
    got = random.uniform(key, (1 << 16,), None, minval, maxval)
    same(got, jax.random.uniform(as_jax(key), (1 << 16,), minval=minval, maxval=maxval))
    low, high = torch.tensor(minval, dtype=torch.float64), torch.tensor(maxval)
    assert torch.equal(random.uniform(key, (1 << 16,), None, low.float(), high), got)
    assert torch.equal(random.uniform(key, (1 << 16,), None, low, high.double()), got)
    assert torch.equal(random.uniform(key, (1 << 16,), None, minval, high.expand(1 << 16)), got)
    assert (got >= np.float32(minval)).all()


@needs_fused
def test_normal() -> None:
    """Equal to JAX to the bit, and close to exact: XLA's formula loses digits in the tails, where 1 − x² cancels."""
    size, greatest = (1 << 14,), 0.0
    for seed in SEEDS:
        key = random.key(seed)
        got = random.normal(key, size)
        same(got, jax.random.normal(as_jax(key), size))
        greatest = max(greatest, float(got.abs().max()))
        exact = math.sqrt(2.0) * torch.erfinv(random.uniform(key, size, None, -(1 - 2**-24), 1.0).double())
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0)
    assert greatest > 4


@needs_fused
def test_the_logarithm_of_gumbel_numbers() -> None:
    """The logarithm behind categorical draws, over all magnitudes and at powers of two."""
    powers = 2.0 ** torch.arange(-126.0, 7.0)
    x = torch.cat([powers, powers * 1.4142135, powers * 1.4142137, powers * (2 - 2**-23), torch.rand(1 << 16)])
    x = x[x > 0]
    same(_xla.log(x), jax.jit(jnp.log)(jnp.asarray(x.numpy())))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_categorical(axis: int) -> None:
    logits = jnp.asarray(LOGITS.numpy())
    rest = LOGITS.shape[1 - axis % 2]
    for seed in SEEDS:
        key = random.key(seed)
        same(random.categorical(key, LOGITS, axis), jax.random.categorical(as_jax(key), logits, axis))
        same(
            random.categorical(key, LOGITS, axis, (200, rest)),
            jax.random.categorical(as_jax(key), logits, axis, (200, rest)),
        )


def test_bernoulli_of_probabilities() -> None:
    key = random.key(8)
    limits = jnp.asarray(LIMITS.numpy())
    same(random.bernoulli(key, LIMITS), jax.random.bernoulli(as_jax(key), limits))
    same(random.bernoulli(key, LIMITS, (50, 3)), jax.random.bernoulli(as_jax(key), limits, (50, 3)))
    same(random.bernoulli(key), jax.random.bernoulli(as_jax(key)))
    same(random.bernoulli(key, shape=(50,)), jax.random.bernoulli(as_jax(key), shape=(50,)))


@pytest.mark.parametrize("mode", ["low", "high"])
def test_bernoulli_where_a_probability_is_what_is_drawn(mode: str) -> None:
    """Or the next number above it, where the 23 bits that follow decide."""
    key = random.key(8)
    units = random.uniform(key, (3000,))
    for limits in (units, torch.nextafter(units, torch.ones(()))):
        expected = jax.random.bernoulli(as_jax(key), jnp.asarray(limits.numpy()), mode=mode)
        same(random.bernoulli(key, limits, mode=mode), expected)
        same(random.bernoulli(key, limits.double() + 1e-12, mode=mode), expected)
    assert random.rademacher(key, (2,)).dtype == torch.int32


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1700, 3000])
def test_permutation(size: int) -> None:
    key = random.key(9)
    same(random.permutation(key, size), jax.random.permutation(as_jax(key), size))
    values = torch.randn(size, 3)
    same(random.permutation(key, values), jax.random.permutation(as_jax(key), jnp.asarray(values.numpy())))
    same(random.permutation(key, values, 1), jax.random.permutation(as_jax(key), jnp.asarray(values.numpy()), 1))


PARAMETERS = np.array([0.3, 1.0, 2.5, 40.0], dtype=np.float32)
PROBABILITIES = np.array([0.1, 0.0, 0.4, 0.3, 0.2], dtype=np.float32)
MANY = np.random.default_rng(0).random(300).astype(np.float32)
TABLE = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
FULL = np.tile(PARAMETERS, (50, 1))

# Arguments after the key: each draw is compared with JAX, to the bit.
TO_THE_BIT: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *((name, (shape,), {}) for name in ("exponential", "gumbel", "laplace", "logistic") for shape in SHAPES[1:4]),
    ("rademacher", ((1000,),), {}),
    ("gumbel", ((1000,),), {"mode": "high"}),
    ("bernoulli", (1e-3, (3000,)), {"mode": "high"}),
    *(("truncated_normal", (*bounds, (1000,)), {}) for bounds in ((-2.0, 2.0), (0, 1), (-1.0, 7.0), (6.0, math.inf))),
    *(("truncated_normal", (*bounds, (1000,)), {}) for bounds in ((-math.inf, math.inf), (1.0, math.inf))),
    *(("pareto", arguments, {}) for arguments in ((2.0, (1000,)), (PARAMETERS, (500, 4)), (FULL,))),
    *(("rayleigh", arguments, {}) for arguments in ((PARAMETERS, (500, 4)), (FULL,))),
    *(("lognormal", arguments, {}) for arguments in ((0.7, (1000,)), (PARAMETERS[:3], (500, 3)), (FULL,))),
    ("lognormal", (), {"shape": (100,)}),
    ("triangular", (0.0, PARAMETERS, 50.0, (500, 4)), {}),
    ("wald", (PARAMETERS, (500, 4)), {}),
    ("geometric", (0.3, (1000,)), {}),
    ("geometric", (np.array([0.01, 0.5, 1.0], dtype=np.float32), (500, 3)), {}),
    *(("poisson", (rate, (1000,)), {}) for rate in (0.0, 9.9)),
    ("poisson", (np.array([0.0, 0.5, 7.0], dtype=np.float32), (500, 3)), {}),
    *(("poisson", (rate, (1000,)), {}) for rate in (10.0, 40.0)),
    ("binomial", (10, 0.8, (1000,)), {}),
    ("binomial", (np.array([-1.0, 0.0, 7.0, 100.0, 1000.0], dtype=np.float32), 0.3, (200, 5)), {}),
    ("binomial", (50, np.array([-0.1, 0.0, 0.5, 1.0, math.nan], dtype=np.float32)), {}),
    ("multinomial", (10, PROBABILITIES), {"shape": (100, 5)}),
    ("gamma", (2.0, (1000,)), {}),
    ("choice", (10, (7, 100)), {}),
    ("choice", (1000, (30, 30), False), {}),
    ("choice", (TABLE, (3, 4)), {}),
    ("choice", (TABLE, (4,), False), {"axis": 1}),
    ("choice", (TABLE, (2, 2), True, PROBABILITIES), {"axis": -2}),
    ("choice", (5, (1000,), True, PROBABILITIES), {}),
    ("choice", (5, (4,), False, PROBABILITIES), {}),
    ("choice", (300, (2000,), True, MANY), {}),
    ("choice", (300, (200,), False, MANY), {"mode": "high"}),
    ("choice", (5, (0, 2)), {}),
    ("categorical", (MANY.reshape(3, 100),), {"shape": (20, 3), "replace": False}),
    ("categorical", (MANY.reshape(100, 3), 0), {"shape": (20, 3), "replace": False, "mode": "high"}),
    ("categorical", (MANY.reshape(100, 3), 0), {"shape": (20, 3), "mode": "high"}),
    ("permutation", (TABLE, 1), {"independent": True}),
    ("permutation", (TABLE, -1), {"independent": True}),
]

# The same with the relative difference that is allowed, and the reason in the package's docstring.
TO_ROUNDING: list[tuple[str, tuple[Any, ...], float]] = [
    ("cauchy", ((1000,),), 2.0**-23),
    ("maxwell", ((1000,),), 2.0**-22),
    ("double_sided_maxwell", (0.0, 3.0, (1000,)), 2.0**-21),
    ("weibull_min", (1.5, 2.0, (1000,)), 2.0**-22),
    ("weibull_min", (PARAMETERS, PARAMETERS, (500, 4)), 2.0**-22),
    ("gamma", (PARAMETERS, (500, 4)), 2e-6),
    ("beta", (PARAMETERS, PARAMETERS[::-1].copy(), (500, 4)), 4e-6),
    ("chisquare", (PARAMETERS, (500, 4)), 4e-6),
    ("dirichlet", (PARAMETERS, (500,)), 8e-6),
    ("t", (PARAMETERS, (500, 4)), 2e-6),
    ("f", (3.0, 4.0, (1000,)), 4e-6),
    ("generalized_normal", (1.5, (1000,)), 4e-6),
    ("ball", (4, 1.5, (500,)), 4e-6),
]


def both(name: str, seed: int, *arguments: Any, **keywords: Any) -> tuple[Tensor, Any]:
    """A draw of the package, and JAX's, for arguments in which arrays are NumPy's."""
    key = random.key(seed)
    convert = lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # noqa: E731
    got = getattr(random, name)(key, *map(convert, arguments), **keywords)
    as_array = lambda value: jnp.asarray(value) if isinstance(value, np.ndarray) else value  # noqa: E731
    return got, getattr(jax.random, name)(as_jax(key), *map(as_array, arguments), **keywords)


@needs_fused
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", sorted({name for name, _, _ in TO_THE_BIT}))
def test_draws_are_those_of_jax_to_the_bit(name: str) -> None:
    for other, arguments, keywords in TO_THE_BIT:
        seeds = (3,) if name in ("poisson", "binomial", "multinomial") else (3, 2**31)  # thousands of operations
        for seed in seeds if other == name else ():
            same(*both(name, seed, *arguments, **keywords))


@needs_fused
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", sorted({name for name, _, _ in TO_ROUNDING}))
def test_draws_are_those_of_jax_to_rounding(name: str) -> None:
    for other, arguments, tolerance in TO_ROUNDING:
        for seed in (3, 2**31) if other == name else ():
            got, expected = both(name, seed, *arguments)
            np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=tolerance)


@needs_fused
def test_truncated_normal_between_tensors() -> None:
    """To rounding: the last bits of XLA's bounds depend on how it compiles them."""
    for arguments in ((-PARAMETERS, PARAMETERS), (-PARAMETERS, 1.5, (500, 4)), (-1.0, PARAMETERS, (500, 4))):
        got, expected = both("truncated_normal", 3, *arguments)
        np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=2e-6, atol=2e-6)


def test_loggamma() -> None:
    """Near 1 the logarithm is near 0: the difference is one of the gamma number."""
    got, expected = both("loggamma", 5, np.array([1e-3, 0.3, 1.0, 2.5, 40.0], dtype=np.float32), (300, 5))
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("unoptimized_xla")
def test_orthogonal_matrices_and_normal_vectors() -> None:
    for arguments, keywords in (((4,), {}), ((3, (2, 2)), {}), ((5, (2,)), {"m": 3}), ((3, (2,)), {"m": 5})):
        got, expected = both("orthogonal", 4, *arguments, **keywords)
        np.testing.assert_allclose(got.numpy(), np.asarray(expected), atol=2e-6)
    factor = np.array([[1.0, 0.0], [3.0, 0.5]], dtype=np.float32)
    mean, cov = np.array([1.0, -2.0], dtype=np.float32), factor @ factor.T
    for arguments in ((mean, cov), (mean, cov, (50, 2)), (np.stack([mean, -mean]), cov, (30, 2))):
        got, expected = both("multivariate_normal", 4, *arguments)
        np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=1e-5, atol=1e-6)


@needs_fused
@pytest.mark.parametrize("name", [name for name in initializers.__all__ if name != "Initializer"])
def test_initializers(name: str) -> None:
    mine, theirs = getattr(initializers, name), getattr(jax.nn.initializers, name)
    key = random.key(11)
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "zeros": [],
        "ones": [],
        "constant": [(0.3,)],
        "truncated_normal": [(), (0.5, None, -1.0, 3.0)],
        "variance_scaling": [
            (scale, mode, distribution, *axes)
            for scale, mode in ((1.0, "fan_in"), (2.0, "fan_out"), (0.3, "fan_avg"), (3, "fan_geo_avg"))
            for distribution in ("truncated_normal", "normal", "uniform")
            for axes in ((), (0, (1, 2)), (-1, -2, 0))
        ],
    }
    made = [(mine(*given), theirs(*given)) for given in arguments.get(name, [()])] or [(mine, theirs)]
    for initializer, expected in made:
        for shape in ((3, 7, 13), (5, 3, 4, 6)):
            got = initializer(key, shape)
            if "orthogonal" in name:
                np.testing.assert_allclose(got.numpy(), np.asarray(expected(as_jax(key), shape)), atol=2e-6)
            else:
                same(got, expected(as_jax(key), shape))


def test_every_draw_of_jax_is_here_or_named_as_left_out() -> None:
    left_out = {"PRNGKey", "clone", "key_data", "key_dtype", "key_impl", "wrap_key_data"}
    public = {name for name in dir(jax.random) if callable(getattr(jax.random, name)) and not name.startswith("_")}
    assert public - set(random.__all__) == left_out
    assert set(random.__all__) - public == {"keyed"}
    public = {name for name in dir(jax.nn.initializers) if not name.startswith("_")}
    assert set(initializers.__all__) == public


# Keyword-only arguments of JAX's that say how it computes or where a result lies.
NOT_HERE = {"out_sharding", "unroll", "impl"}


@pytest.mark.parametrize("name", sorted(set(random.__all__) - {"key", "keyed"}))
def test_arguments_and_their_order_are_those_of_jax(name: str) -> None:
    mine, theirs = (
        {
            parameter.name: parameter.kind
            for parameter in inspect.signature(inspect.unwrap(getattr(module, name))).parameters.values()
            if parameter.name not in NOT_HERE
        }
        for module in (random, jax.random)
    )
    assert list(mine.items()) == list(theirs.items())


GRADIENTS: dict[str, tuple[Any, ...]] = {
    "truncated_normal": (-0.5, 1.5),
    "uniform": (-1.0, 2.0),
    "pareto": (2.5,),
    "rayleigh": (1.5,),
    "weibull_min": (1.5, 2.5),
    "lognormal": (0.7,),
    "triangular": (0.0, 0.7, 2.0),
    "double_sided_maxwell": (1.0, 2.0),
    "wald": (1.3,),
    "gamma": (2.5,),
    "loggamma": (0.4,),
    "beta": (1.5, 2.5),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_with_respect_to_parameters(name: str) -> None:
    key = random.key(17)
    values = GRADIENTS[name]

    def draws(module: Any, key: Any, *parameters: Any) -> Any:
        if name == "uniform":
            return module.uniform(key, (20,), minval=parameters[0], maxval=parameters[1]).sum()
        return getattr(module, name)(key, *parameters, (20,)).sum()

    positions = tuple(range(len(values)))
    expected = jax.grad(lambda *given: draws(jax.random, as_jax(key), *given), positions)(*map(jnp.float32, values))
    got = torch.func.grad(lambda *given: draws(random, key, *given), positions)(*map(torch.tensor, values))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), np.asarray(theirs), rtol=2e-3, atol=1e-5)


@pytest.mark.usefixtures("unoptimized_xla")
def test_gradients_of_gamma_numbers_in_jax_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than silently those of the accepted candidate alone."""
    monkeypatch.setattr("popart_func.random.gammas.ROUNDS", 1)
    drawn = to_jax_function(lambda key, a: random.gamma(key, a))
    assert jnp.isnan(jax.grad(drawn, 1)(jax.random.key(0), jnp.float32(2.5)))


def test_rounds_that_do_not_suffice_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    key = random.key(0)
    gammas, counts = (random.gamma(key, 1.0, (1000,)), random.poisson(key, 5.0, (1000,)))
    monkeypatch.setattr("popart_func.random.gammas.ROUNDS", 1)
    monkeypatch.setattr("popart_func.random.counts.ROUNDS", 6)
    few_gammas, few_counts = (random.gamma(key, 1.0, (1000,)), random.poisson(key, 5.0, (1000,)))
    assert 0 < few_gammas.isnan().sum() < 200
    assert torch.equal(few_gammas[~few_gammas.isnan()], gammas[~few_gammas.isnan()])
    assert 0 < (few_counts < 0).sum() < 800
    assert torch.equal(few_counts[few_counts >= 0], counts[few_counts >= 0])
    assert (random.poisson(key, torch.tensor([-1.0, math.nan])) == -1).all()
    monkeypatch.setattr("popart_func.random.counts.CANDIDATES", 2)
    assert 0 < (random.poisson(key, 50.0, (1000,)) < 0).sum() < 200
    assert 0 < random.binomial(key, 200, 0.5, (1000,)).isnan().sum() < 200


@needs_fused
def test_the_functions_of_xla() -> None:
    """Exponential, logarithms, error function and neighbours, over all magnitudes."""
    unit = torch.rand(1 << 14)
    special = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 3.8325069, -3.8325064, 1e-30, 100.0, -100.0, 88.7, -87.33])
    wide = torch.cat([special, 200 * unit - 100, 8 * unit - 4])
    above = jnp.nextafter
    for mine, theirs, x in (
        (_xla.exp, jnp.exp, wide),
        (_xla.erf, jax.lax.erf, wide),
        (_xla.log1p, jnp.log1p, torch.cat([-unit, 100 * unit, torch.tensor([-1.0, 0.0])])),
        (_xla.log, jnp.log, torch.cat([torch.zeros(1), 1e30 * unit])),
        (_xla.sqrt, jnp.sqrt, unit),
        (lambda x: _xla.step_inside(x, x)[0], lambda x: above(x, jnp.inf), wide),
        (lambda x: _xla.step_inside(x, x)[1], lambda x: above(x, -jnp.inf), wide),
    ):
        same(mine(x), jax.jit(theirs)(jnp.asarray(x.numpy())))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, key[1] + 1),
    "bits": lambda key: random.bits(key, (2, 3)),
    "uniform": lambda key: random.uniform(key, (5,), None, -1.0, 2.0),
    "normal": lambda key: random.normal(key, (5,)),
    "randint": lambda key: random.randint(key, (2, 3), -3, 7),
    "bernoulli": lambda key: random.bernoulli(key, LIMITS, (2, 3)),
    "categorical": lambda key: random.categorical(key, LOGITS, shape=(5, 3)),
    "permutation": lambda key: random.permutation(key, 9),
    "truncated_normal": lambda key: random.truncated_normal(key, -1.0, LIMITS, (2, 3)),
    "exponential": lambda key: random.exponential(key, (5,)),
    "gumbel": lambda key: random.gumbel(key, (5,)),
    "laplace": lambda key: random.laplace(key, (5,)),
    "logistic": lambda key: random.logistic(key, (5,)),
    "cauchy": lambda key: random.cauchy(key, (5,)),
    "pareto": lambda key: random.pareto(key, LIMITS),
    "rayleigh": lambda key: random.rayleigh(key, LIMITS),
    "weibull_min": lambda key: random.weibull_min(key, 2.0, LIMITS, (3,)),
    "lognormal": lambda key: random.lognormal(key, LIMITS),
    "triangular": lambda key: random.triangular(key, 0.0, LIMITS, 1.0),
    "maxwell": lambda key: random.maxwell(key, (5,)),
    "double_sided_maxwell": lambda key: random.double_sided_maxwell(key, 0.1, LIMITS),
    "wald": lambda key: random.wald(key, LIMITS),
    "rademacher": lambda key: random.rademacher(key, (5,)),
    "geometric": lambda key: random.geometric(key, LIMITS),
    "choice": lambda key: random.choice(key, LOGITS, (2,), axis=1),
    "choice by weight": lambda key: random.choice(key, LOGITS, (4,), p=LIMITS),
    "choice of different ones": lambda key: random.choice(key, 3, (2,), False, LIMITS),
}

# Many operations each: candidates of all rounds are drawn at once.
IN_ROUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma": lambda key: random.gamma(key, LIMITS),
    "beta": lambda key: random.beta(key, 2.0, LIMITS),
    "poisson": lambda key: random.poisson(key, 3.0, (2,)),
}


@pytest.mark.usefixtures("unchecked")
def test_draws_do_not_depend_on_the_default_dtype() -> None:
    key = random.key(3)
    draws = DRAWS | IN_ROUNDS | {"binomial": lambda key: random.binomial(key, 40.0, LIMITS)}
    expected = {name: draw(key) for name, draw in draws.items()}
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            got = {name: draw(key) for name, draw in draws.items()}
        finally:
            torch.set_default_dtype(torch.float32)
        for name, drawn in expected.items():
            assert (got[name].dtype, got[name].tolist()) == (drawn.dtype, drawn.tolist()), (name, dtype)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*DRAWS, *IN_ROUNDS])
def test_a_lane_is_what_its_seed_gives_alone(name: str) -> None:
    seeds = torch.arange(7) * 1000
    draw = (DRAWS | IN_ROUNDS)[name]
    lanes = vmap(lambda seed: draw(random.key(seed)))(seeds)
    for lane, seed in enumerate(seeds.tolist()):
        assert torch.equal(lanes[lane], draw(random.key(seed))), lane


@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_the_native_engine_draws_what_eager_draws() -> None:
    def step(key: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        key, now = random.split(key)
        return key, {name: draw(now) for name, draw in DRAWS.items()}

    keys = vmap(random.key)(torch.arange(20))
    expected = scan_lanes(step, keys, torch.zeros(9), engine="eager")
    got = scan_lanes(step, keys, torch.zeros(9), engine="native")
    assert torch.equal(got[0], expected[0])
    for name, value in expected[1].items():
        assert torch.equal(got[1][name], value), name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")
def test_the_native_engine_permutes_what_jax_permutes() -> None:
    """A permutation in two rounds of sorting, and one of whole rows."""
    rows = torch.arange(100.0).reshape(50, 2)

    def step(key: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return key, (random.permutation(key, 1700), random.permutation(key, rows))

    keys = vmap(random.key)(torch.tensor(SEEDS))
    _, (integers, permuted) = scan_lanes(step, keys, length=1, engine="native")
    for lane, key in enumerate(keys):
        same(integers[0, lane], jax.random.permutation(as_jax(key), 1700))
        same(permuted[0, lane], jax.random.permutation(as_jax(key), jnp.asarray(rows.numpy())))


# Runs in a process without enforced annotations, since Dynamo can't trace those. To save time the draws are compiled to
# a graph only. `erfinv`, whose roundings the compiler could change, is compiled to machine code.
COMPILED = """
import torch
from popart_func import _xla, random

DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, key[1] + 1),
    "uniform": lambda key: random.uniform(key, (5,), None, -1.0, 2.0),
    "normal": lambda key: random.normal(key, (5,)),
    "truncated_normal": lambda key: random.truncated_normal(key, -2, 2, (5,)),
    "choice": lambda key: random.choice(key, 7, (3,), p=torch.ones(7)),
    "randint": lambda key: random.randint(key, (2, 3), -3, 7),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (2, 3)),
    "categorical": lambda key: random.categorical(key, torch.tensor([0.0, 1.0, -1.0]), shape=(5,)),
    "permutation": lambda key: random.permutation(key, 9),
}
draws = torch.vmap(lambda key: {name: draw(key) for name, draw in DRAWS.items()})
keys = torch.vmap(random.key)(torch.arange(5))
compiled = torch.compile(draws, fullgraph=True, backend="aot_eager")(keys)
for name, value in draws(keys).items():
    assert torch.equal(compiled[name], value), name
numbers = random.uniform(keys[0], (10_000,), None, -0.99999994, 1.0)
assert torch.equal(torch.compile(_xla.erfinv, fullgraph=True)(numbers), _xla.erfinv(numbers)), "erfinv"
"""


@pytest.mark.slow
@pytest.mark.skipif(compiler.why_no_compiler() is not None, reason="no C++ compiler")
def test_a_compiled_function_draws_what_it_draws_uncompiled() -> None:
    """Equal to the bit, in lanes."""
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("unchecked")
def test_draws_inside_jax() -> None:
    """XLA computes them: equal to what JAX draws in a function that it compiles."""
    drawn = jax.jit(to_jax_function(lambda key: {name: draw(key) for name, draw in DRAWS.items()}))
    for name, value in drawn(jax.random.key(6)).items():
        expected = DRAWS[name](random.key(6))
        np.testing.assert_allclose(np.asarray(value), expected.numpy(), rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(compiler.why_no_compiler() is not None, reason="no C++ compiler")
def test_the_inductor_engine_draws_what_eager_draws() -> None:
    def step(key: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        key, now = random.split(key)
        return key, {name: DRAWS[name](now) for name in ("exponential", "pareto")}

    keys = vmap(random.key)(torch.arange(20))
    expected, got = (scan_lanes(step, keys, torch.zeros(9), engine=engine) for engine in ("eager", "inductor"))
    for name, value in expected[1].items():
        assert torch.equal(got[1][name], value), name


def test_draws_are_pure_and_differ() -> None:
    key = random.key(1)
    before = key.clone()
    values = [draw(key) for draw in DRAWS.values()]
    assert torch.equal(key, before)
    assert all(torch.equal(value, draw(key)) for value, draw in zip(values, DRAWS.values(), strict=True))
    first, second = random.split(key)
    assert not torch.equal(random.bits(first, (4,)), random.bits(second, (4,)))


# What follows the key, and the dtype that a draw has, if it takes one.
CALLS: dict[str, tuple[tuple[Any, ...], torch.dtype | None]] = {
    "bits": (((3,),), torch.int32),
    "uniform": (((3,),), torch.float32),
    "normal": (((3,),), torch.float32),
    "randint": (((3,), 0, 5), torch.int32),
    "bernoulli": ((0.5, (3,)), None),
    "rademacher": (((3,),), torch.int32),
    "gumbel": (((3,),), torch.float32),
    "categorical": ((LIMITS,), None),
    "permutation": ((5,), None),
    "choice": ((5, (3,)), None),
    "split": ((3,), None),
    "fold_in": ((3,), None),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CALLS)
def test_errors_name_the_draw_that_was_called(name: str) -> None:
    draw, (arguments, dtype) = getattr(random, name), CALLS[name]
    with pytest.raises(TypeError, match=f"^{name}: `key` must be one key, .* got int"):
        draw(5, *arguments)
    if dtype is not None:
        with pytest.raises(TypeError, match=f"^{name}: `dtype` must be {dtype} or None, got torch.float16"):
            draw(random.key(0), *arguments, dtype=torch.float16)
        assert torch.equal(draw(random.key(0), *arguments, dtype=dtype), draw(random.key(0), *arguments))
    if name in ("gumbel", "categorical"):
        with pytest.raises(ValueError, match=f"^{name}: `mode` must be None, 'low' or 'high', got 'x'"):
            draw(random.key(0), *arguments, mode="x")
    if name in ("gumbel", "randint", "choice", "bits"):
        with pytest.raises(ValueError, match=f"^{name}: a shape must be made of integers"):
            draw(random.key(0), *((-1,) if part == (3,) else part for part in arguments))


@pytest.mark.parametrize("size", [1, 2, 16, 17, 33, 300])
def test_what_draws_with_probabilities_look_up(size: int) -> None:
    parts = torch.rand(size) * 10.0 ** torch.randint(-3, 4, (size,))
    totals = choices._cumulative_sum(parts)
    same(totals, jnp.cumsum(jnp.asarray(parts.numpy())))
    values = torch.cat([totals, totals + 1, torch.zeros(1)])
    assert torch.equal(choices._count_below(totals, values), torch.searchsorted(totals, values))


def test_all_may_be_drawn_without_replacement() -> None:
    everything = torch.arange(3)
    key = random.key(3)
    assert torch.equal(random.categorical(key, LIMITS, shape=(3,), replace=False).sort().values, everything)
    assert torch.equal(random.choice(key, 3, (3,), False).sort().values, everything)
    assert torch.equal(random.choice(key, 3, (3,), False, LIMITS).sort().values, everything)


def test_draws_from_one_element_and_no_draws() -> None:
    assert random.choice(random.key(3), 1, (4,)).tolist() == [0] * 4
    none = random.choice(random.key(3), 3, (0,))
    assert (none.dtype, none.shape) == (torch.int64, (0,))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(-1), ValueError, r"key: `seed` must lie in \[0, 2\*\*64\), got -1"),
        (lambda: random.key(2**64), ValueError, r"key: `seed` must lie in \[0, 2\*\*64\), got 18446744073709551616"),
        (lambda: random.key(1.0), TypeError, "key: `seed` must be an integer or a 0-d integer tensor, got float"),
        (lambda: random.key(torch.zeros(3).long()), ValueError, r"must be 0-d, got shape \(3,\). For many seeds"),
        (lambda: random.key(torch.tensor(1.0)), TypeError, "key: `seed` must be integers, got dtype torch.float32"),
        (lambda: random.bits(torch.zeros(3, 2).int()), TypeError, r"bits: `key` must be one key, .*int32 \(3, 2\)"),
        (lambda: random.split(5), TypeError, "split: `key` must be one key, .*got int"),
        (lambda: random.fold_in(5, 1), TypeError, "^fold_in: `key` must be one key, .*got int"),
        (lambda: random.fold_in(random.key(0), torch.ones(())), TypeError, "^fold_in: `data` must be integers, got"),
        (lambda: random.uniform(random.key(0), (2, -1)), ValueError, r"integers of at least 0, got \(2, -1\)"),
        (lambda: random.bits(random.key(0), (2**31,)), ValueError, "at most 2\\*\\*31 - 1 elements"),
        (lambda: random.randint(random.key(0), (), 0, 2**31), ValueError, "`maxval` must lie within int32"),
        (lambda: random.categorical(random.key(0), LOGITS, shape=(2,)), ValueError, r"must end in \(3,\), got \(2,\)"),
        (lambda: random.permutation(random.key(0), torch.tensor(3)), ValueError, "got a 0-d tensor"),
        (
            lambda: random.normal(random.key(0), (), torch.float64),
            TypeError,
            "normal: `dtype` must be torch.float32 or",
        ),
        (
            lambda: random.randint(random.key(0), (), 0, 2, torch.int64),
            TypeError,
            "randint: `dtype` must be torch.int32",
        ),
        (lambda: random.uniform(random.key(0), (), 0.5), TypeError, "uniform: `dtype` must be torch.float32 or None"),
        (lambda: random.gumbel(random.key(0), mode="highest"), ValueError, "gumbel: `mode` must be None, 'low' or"),
        (lambda: random.bernoulli(random.key(0), mode="x"), ValueError, "bernoulli: `mode` must be 'low' or 'high'"),
        (
            lambda: random.pareto(random.key(0), LIMITS, (2,)),
            ValueError,
            r"pareto: `b` must broadcast to `shape`, got \(3,",
        ),
        (lambda: random.pareto(random.key(0), LIMITS.double()), TypeError, "pareto: `b` must be float32 or integers"),
        (lambda: random.pareto(random.key(0), "x"), TypeError, "pareto: `b` must be a number or a tensor, got str"),
        (lambda: random.choice(random.key(0), 0, (2,)), ValueError, "choice: `a` must have elements to draw from"),
        (lambda: random.choice(random.key(0), torch.tensor(3)), ValueError, "choice: `a` must be .*got a 0-d tensor"),
        (lambda: random.choice(random.key(0), 3, (4,), False), ValueError, "can't draw 4 of 3 elements without"),
        (lambda: random.choice(random.key(0), 3, p=torch.ones(2)), ValueError, r"choice: `p` must be .*shape \(3,\)"),
        (lambda: random.categorical(random.key(0), LIMITS, shape=(4,), replace=False), ValueError, "draw 4 of 3 categ"),
        (lambda: random.poisson(random.key(0), -1.0), ValueError, "poisson: `lam` must be at least 0, got -1.0"),
        (lambda: random.multinomial(random.key(0), 3, 0.5), ValueError, "multinomial: `p` must be a tensor"),
        (lambda: random.dirichlet(random.key(0), torch.tensor(1.0)), ValueError, "dirichlet: `alpha` must be a tensor"),
        (
            lambda: random.multivariate_normal(random.key(0), LIMITS, torch.eye(3), method="svd"),
            ValueError,
            "multivariate_normal: `method` must be 'cholesky', got 'svd'",
        ),
        (
            lambda: random.multivariate_normal(random.key(0), LIMITS, torch.eye(2)),
            ValueError,
            r"multivariate_normal: `cov` must end in \(3, 3\)",
        ),
        (lambda: random.multivariate_normal(random.key(0), 1.0, torch.eye(2)), TypeError, "`mean` must be a float32"),
        (lambda: initializers.lecun_normal()(random.key(0), (3,)), ValueError, "variance_scaling: `shape` must have"),
        (lambda: initializers.normal(1.0, torch.float16), TypeError, "normal: `dtype` must be torch.float32"),
        (lambda: initializers.ones(None, (2,), torch.int32), TypeError, "constant: `dtype` must be torch.float32"),
        (lambda: initializers.variance_scaling(1.0, "x", "normal"), ValueError, "variance_scaling: `mode` must be"),
        (lambda: initializers.variance_scaling(1.0, "fan_in", "x"), ValueError, "`distribution` must be"),
        (
            lambda: initializers.orthogonal()(random.key(0), (3,)),
            ValueError,
            "orthogonal: `shape` must have at least two",
        ),
        (lambda: initializers.delta_orthogonal()(random.key(0), (3, 4)), ValueError, "three, four or five axes"),
        (lambda: initializers.delta_orthogonal()(random.key(0), (3, 4, 2)), ValueError, "fewer outputs than inputs"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
