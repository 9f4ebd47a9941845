"""Random numbers equal those of `jax.random` to the bit: alone, in lanes, and on the native engine."""

from __future__ import annotations

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
        same(mine, np.asarray(jax.random.key_data(theirs)).view(np.int32))


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
    [(0, 1), (0, 2), (0, 10), (-5, 7), (3, 3), (5, 2), (0, 2**31 - 1), (-(2**31), 2**31 - 1), (-(2**31), 100)],
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
@pytest.mark.parametrize(("minval", "maxval"), [(-1.0, 1.0), (0.0, 0.1), (-3.7, 1e6), (0.25, 2.25)])
def test_uniform_between(minval: float, maxval: float) -> None:
    key = random.key(3)
    got = random.uniform(key, (1 << 16,), minval, maxval)
    same(got, jax.random.uniform(as_jax(key), (1 << 16,), minval=minval, maxval=maxval))
    assert torch.equal(random.uniform(key, (1 << 16,), torch.tensor(minval), torch.tensor(maxval)), got)
    assert (got >= np.float32(minval)).all()


@needs_fused
def test_normal() -> None:
    """Equal to JAX to the bit, and close to exact: XLA's formula loses digits in the tails, where 1 − x² cancels."""
    for seed in SEEDS:
        key = random.key(seed)
        got = random.normal(key, (1 << 16,))
        same(got, jax.random.normal(as_jax(key), (1 << 16,)))
        assert got.abs().max() > 4
        exact = math.sqrt(2.0) * torch.erfinv(random.uniform(key, (1 << 16,), -(1 - 2**-24), 1.0).double())
        torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=0)


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


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1700, 3000])
def test_permutation(size: int) -> None:
    key = random.key(9)
    same(random.permutation(key, size), jax.random.permutation(as_jax(key), size))
    values = torch.randn(size, 3)
    same(random.permutation(key, values), jax.random.permutation(as_jax(key), jnp.asarray(values.numpy())))
    same(random.permutation(key, values, 1), jax.random.permutation(as_jax(key), jnp.asarray(values.numpy()), 1))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, key[1] + 1),
    "bits": lambda key: random.bits(key, (2, 3)),
    "uniform": lambda key: random.uniform(key, (5,), -1.0, 2.0),
    "normal": lambda key: random.normal(key, (5,)),
    "randint": lambda key: random.randint(key, (2, 3), -3, 7),
    "bernoulli": lambda key: random.bernoulli(key, LIMITS, (2, 3)),
    "categorical": lambda key: random.categorical(key, LOGITS, shape=(5, 3)),
    "permutation": lambda key: random.permutation(key, 9),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_lane_is_what_its_seed_gives_alone(name: str) -> None:
    seeds = torch.arange(7) * 1000
    lanes = vmap(lambda seed: DRAWS[name](random.key(seed)))(seeds)
    for lane, seed in enumerate(seeds.tolist()):
        assert torch.equal(lanes[lane], DRAWS[name](random.key(seed))), lane


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
    "uniform": lambda key: random.uniform(key, (5,), -1.0, 2.0),
    "normal": lambda key: random.normal(key, (5,)),
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
numbers = random.uniform(keys[0], (10_000,), -0.99999994, 1.0)
assert torch.equal(torch.compile(_xla.erfinv, fullgraph=True)(numbers), _xla.erfinv(numbers)), "erfinv"
"""


@pytest.mark.skipif(compiler.why_no_compiler() is not None, reason="no C++ compiler")
def test_a_compiled_function_draws_what_it_draws_uncompiled() -> None:
    """Equal to the bit, in lanes."""
    result = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_draws_are_pure_and_differ() -> None:
    key = random.key(1)
    before = key.clone()
    values = [draw(key) for draw in DRAWS.values()]
    assert torch.equal(key, before)
    assert all(torch.equal(value, draw(key)) for value, draw in zip(values, DRAWS.values(), strict=True))
    first, second = random.split(key)
    assert not torch.equal(random.bits(first, (4,)), random.bits(second, (4,)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(-1), ValueError, r"key: `seed` must lie in \[0, 2\*\*64\), got -1"),
        (lambda: random.key(1.0), TypeError, "key: `seed` must be an integer or a 0-d integer tensor, got float"),
        (lambda: random.key(torch.zeros(3).long()), ValueError, r"must be 0-d, got shape \(3,\). For many seeds"),
        (lambda: random.key(torch.tensor(1.0)), TypeError, "key: `seed` must be integers, got dtype torch.float32"),
        (lambda: random.bits(torch.zeros(3, 2).int()), TypeError, r"bits: `key` must be one key, .*int32 \(3, 2\)"),
        (lambda: random.split(5), TypeError, "split: `key` must be one key, .*got int"),
        (lambda: random.uniform(random.key(0), (2, -1)), ValueError, r"integers of at least 0, got \(2, -1\)"),
        (lambda: random.bits(random.key(0), (2**31,)), ValueError, "at most 2\\*\\*31 - 1 elements"),
        (lambda: random.randint(random.key(0), (), 0, 2**31), ValueError, "`maxval` must lie within int32"),
        (lambda: random.categorical(random.key(0), LOGITS, shape=(2,)), ValueError, r"must end in \(3,\), got \(2,\)"),
        (lambda: random.permutation(random.key(0), torch.tensor(3)), ValueError, "got a 0-d tensor"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
