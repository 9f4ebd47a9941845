"""PyTorch's random layers and draws under a key: the same on all engines, in lanes and in JAX; others are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
from torch import Tensor, distributions, nn, vmap
from torch.nn import functional

import popart_func as pf
from popart_func import random
from popart_func.engines import native, scan_lanes
from popart_func.engines.tracing.step_graph import TensorSpec, TraceError
from popart_func.engines.tracing.tracer import trace_step
from popart_func.interop.jax import to_jax, to_jax_function, to_torch
from popart_func.random.torch_draws import DRAWS

needs_compiler = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")
pytestmark = pytest.mark.usefixtures("unchecked")


def fixed(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.5, generator=generator)
    return module


LSTM = fixed(nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True))
GRU = fixed(nn.GRU(3, 4, 3, dropout=0.4, batch_first=True))
ATTENTION = fixed(nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True))
ENCODER = fixed(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True))


def attention(x: Tensor, **options: Any) -> Tensor:
    return functional.scaled_dot_product_attention(x.expand(2, 4, 5), x.expand(2, 4, 5), x.expand(2, 4, 5), **options)


# Functions of five numbers. Their results have the same bits on every engine but XLA.
TO_THE_BIT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": nn.Dropout(0.4),
    "dropout in place": lambda x: functional.dropout(x * 2, 0.3, inplace=True),
    "dropout of all": lambda x: functional.dropout(x, 1.0),
    "dropout1d": lambda x: nn.Dropout1d(0.4)(x.expand(3, 5)),
    "dropout2d": lambda x: nn.Dropout2d(0.4)(x.expand(2, 3, 4, 5)),
    "dropout3d": lambda x: nn.Dropout3d(0.4)(x.expand(1, 3, 1, 2, 5)),
    "alpha dropout": nn.AlphaDropout(0.3),
    "feature alpha dropout": lambda x: nn.FeatureAlphaDropout(0.3)(x.expand(3, 5)),
    "rrelu": nn.RReLU(),
    "rand": lambda x: torch.rand(3) + x[0],
    "randn": lambda x: torch.randn((2, 3)) * x[0],
    "rand_like": torch.rand_like,
    "randint": lambda x: torch.randint(2, 9, (4,)),
    "randperm": lambda x: torch.randperm(6),
    "normal": lambda x: torch.normal(x, 2.0),
    "multinomial": lambda x: torch.multinomial(x.exp().expand(2, 5), 3),
    "stochastic depth": lambda x: x * x.new_empty(4, 1).bernoulli_(0.3),
    "a new tensor, filled": lambda x: torch.empty(3).uniform_(-1, 1),
    "a normal distribution": lambda x: distributions.Normal(x, 1.0).rsample((2,)),
    "a categorical distribution": lambda x: distributions.Categorical(logits=x).sample((3,)),
    "straight through": lambda x: distributions.OneHotCategoricalStraightThrough(logits=x).rsample(),
    "gumbel_softmax, hard": lambda x: functional.gumbel_softmax(x, hard=True),
    "a draw twice": lambda x: torch.rand(3) - torch.rand(3),
}
TO_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: attention(x, dropout_p=0.4),
    "causal attention": lambda x: attention(x, dropout_p=0.4, is_causal=True),
    "attention layer": lambda x: ATTENTION(x[:4].expand(3, 4), x[:4].expand(3, 4), x[:4].expand(3, 4))[0],
    "encoder layer": lambda x: ENCODER(x[:4] * torch.arange(3.0)[:, None]),
    "lstm": lambda x: LSTM(x[:3].expand(5, 3))[0],
    "gru": lambda x: GRU(x[:3].expand(2, 5, 3))[0],
    "an exponential distribution": lambda x: distributions.Exponential(x.exp()).rsample(),
    "a squashed normal distribution": lambda x: distributions.TransformedDistribution(
        distributions.Normal(x, 1.0), [distributions.TanhTransform()]
    ).rsample(),
}
ALL = TO_THE_BIT | TO_ROUNDING
# What is compiled in every run of the tests.
SOME = (
    *("dropout in place", "dropout2d", "alpha dropout", "rrelu", "stochastic depth", "randint", "multinomial"),
    *("straight through", "attention layer", "gru", "an exponential distribution"),
)
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
KEYS = vmap(random.key)(torch.arange(4))


def drawn(functions: dict[str, Callable[[Tensor], Tensor]], key: Tensor, x: Tensor) -> dict[str, Tensor]:
    results = {}
    for name, function in functions.items():
        with random.keyed(key):
            results[name] = function(x)
    return results


def in_lanes(engine: str, functions: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    step = lambda key, x: (random.fold_in(key, 1), drawn(functions, key, x))  # noqa: E731
    ys: dict[str, Tensor] = scan_lanes(step, KEYS, X.expand(2, 4, 5), shared=False, engine=engine)[1]
    return {name: value[0] for name, value in ys.items()}


def check(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name in TO_THE_BIT:
            assert torch.equal(got[name].to(value.dtype), value), name
        np.testing.assert_allclose(got[name].numpy(), value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What each lane's key gives without engines, and without lanes."""
    return pf.tree.stack([drawn(ALL, key, x) for key, x in zip(KEYS, X, strict=True)])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lanes_draw_what_their_keys_give_alone(alone: dict[str, Tensor]) -> None:
    state = torch.get_rng_state()
    check(in_lanes("eager", ALL), alone)
    assert torch.equal(torch.get_rng_state(), state)
    same = {
        name for name, value in alone.items() if torch.equal(value[0], value[1]) and torch.equal(value[1], value[2])
    }
    assert same == {"dropout of all"}


@needs_compiler
@pytest.mark.parametrize("engine", ["native", pytest.param("inductor", marks=pytest.mark.slow)])
def test_engines_draw_the_same(engine: str, alone: dict[str, Tensor]) -> None:
    some = {name: ALL[name] for name in SOME}
    check(in_lanes(engine, some), {name: alone[name] for name in SOME})


@pytest.mark.slow
@needs_compiler
def test_the_native_engine_draws_all_the_same(alone: dict[str, Tensor]) -> None:
    check(in_lanes("native", ALL), alone)


def test_jax_draws_the_same(alone: dict[str, Tensor]) -> None:
    """The keys are JAX's own; to rounding, since XLA computes."""
    in_jax = jax.jit(to_jax_function(lambda key, x: drawn({name: ALL[name] for name in SOME}, key, x)))
    for lane in (0, 3):
        got = in_jax(jax.random.key(lane), to_jax(X[lane]))
        for name, value in got.items():
            np.testing.assert_allclose(np.asarray(value), alone[name][lane].numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_dropout_takes_the_mask_that_jax_draws() -> None:
    """That of flax's Dropout, which draws ``bernoulli(key, 1 - rate, shape)``, at the first draw's key."""
    with random.keyed(random.key(3)):
        got = functional.dropout(torch.ones(100), 0.3)
    mask = jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), 0), 0.7, (100,))
    torch.testing.assert_close(got, torch.tensor(np.asarray(mask)) / 0.7)


def test_gradients() -> None:
    """Under `torch.func.grad`, whether the key is entered inside or outside, and in JAX through a hard choice."""
    key, x = random.key(5), X[0]

    def loss(x: Tensor) -> Tensor:
        return (nn.Dropout(0.5)(x).square() * torch.arange(5.0)).sum() + (
            functional.gumbel_softmax(x, hard=True) * x
        ).sum()

    def inside(x: Tensor, key: Tensor) -> Tensor:
        with random.keyed(key):
            return loss(x)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(inside(leaf, key), leaf)
    assert torch.equal(torch.func.grad(inside)(x, key), expected)
    with random.keyed(key):
        assert torch.equal(torch.func.grad(loss)(x), expected)
    in_jax = jax.jit(jax.grad(to_jax_function(inside)))(to_jax(x), jax.random.key(5))
    torch.testing.assert_close(to_torch(in_jax), expected)


def test_modules_and_learners_take_a_key() -> None:
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))  # noqa: E731
    apply, params = pf.stateless(make()), pf.init_params(make, 0)
    first, again, other = (apply(params, X, rngs=random.key(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    learner = pf.popart_learner(apply, pf.sgd(0.1), pf.popart(1, 0.1), head="3")

    def step(carry: Any, x: Tensor) -> Any:
        state, key = carry
        with random.keyed(key):
            state, info = learner.update(state, (x, x.sum(-1, keepdim=True)))
        return (state, random.fold_in(key, 0)), info.loss

    state = learner.init(params)
    _, alone = pf.scan(step, (state, KEYS[2]), X.expand(3, 4, 5), engine="eager")
    lanes = pf.tree.stack([state] * 4), KEYS
    _, losses = scan_lanes(step, lanes, X.expand(3, 4, 5), shared=True, engine="eager")
    torch.testing.assert_close(losses[:, 2], alone)
    assert len(set(losses[0].tolist())) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_uniform_numbers_are_rounded_down_in_half_precision(dtype: torch.dtype) -> None:
    """They stay below 1. Normal numbers are rounded to the nearest, or those above 0 would be pulled toward it."""
    drawn = []
    for own in (torch.float32, dtype):
        with random.keyed(random.key(0)):
            drawn.append(
                (torch.randn(10000, dtype=own), torch.empty(10000, dtype=own).normal_(), torch.rand(10000, dtype=own))
            )
    for wide, narrow in zip(*(one[:2] for one in drawn), strict=True):
        assert torch.equal(narrow, wide.to(dtype))
    assert (drawn[1][2] < 1).all()
    assert (drawn[1][2].float() <= drawn[0][2]).all()


@pytest.mark.parametrize("in_rounds", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_numbers_have_the_moments_of_those_of_pytorch(in_rounds: bool) -> None:
    """So that no argument is misread: mean, spread and dtype of each draw, against PyTorch's generator."""
    big = torch.full((100, 100), 0.3)
    ones = torch.ones(50, 50, 4)
    draws: dict[str, Callable[[], Tensor]] = {
        "rand": lambda: torch.rand(100, 100, dtype=torch.float64),
        "rand of a size": lambda: torch.rand(size=(100, 100)),
        "rand in half precision": lambda: torch.rand(100, 100, dtype=torch.bfloat16),
        "rand_like": lambda: torch.rand_like(big, dtype=torch.float64),
        "randn": lambda: torch.randn([100, 100]),
        "randn_like": lambda: torch.randn_like(big),
        "randint": lambda: torch.randint(7, (100, 100)),
        "randint from": lambda: torch.randint(-3, 7, (100, 100), dtype=torch.int32),
        "randint by name": lambda: torch.randint(low=2, high=9, size=(100, 100)),
        "randint from, high by name": lambda: torch.randint(2, high=9, size=(100, 100)),
        "randint below, by name": lambda: torch.randint(high=9, size=(100, 100)),
        "randint_like": lambda: torch.randint_like(big, 3, 8),
        "randint_like below": lambda: torch.randint_like(big, 5),
        "randperm": lambda: torch.randperm(2000),
        "normal of tensors": lambda: torch.normal(big, 3 * big),
        "normal of a mean": lambda: torch.normal(big, 2.0),
        "normal of a spread": lambda: torch.normal(1.0, big),
        "normal of numbers": lambda: torch.normal(1.0, 3.0, (100, 100)),
        "normal by name": lambda: torch.normal(mean=1.0, std=3.0, size=(100, 100)),
        "bernoulli": lambda: torch.bernoulli(big),
        "bernoulli of a number": lambda: big.bernoulli(0.6),
        "multinomial": lambda: torch.multinomial(torch.tensor([0.2, 0.0, 0.5, 0.3]), 10000, replacement=True),
        "multinomial of rows": lambda: torch.multinomial(big[:, :7] * torch.arange(7), 3),
        "poisson": lambda: torch.poisson(10 * big[:20]),
        "binomial": lambda: torch.binomial(30 * big[:20], big[:20]),
        "gamma": lambda: distributions.Gamma(big[:20] + 1, 2.0).sample(),
        "dirichlet": lambda: distributions.Dirichlet(ones + torch.arange(4.0)).sample(),
        "beta": lambda: distributions.Beta(big[:20], 2.0).sample(),
        "bernoulli_": lambda: torch.empty(100, 100).bernoulli_(),
        "bernoulli_ of tensors": lambda: torch.empty(100, 100).bernoulli_(big),
        "uniform_": lambda: torch.empty(100, 100).uniform_(-1.0, 3.0),
        "uniform_ by name": lambda: torch.empty(100, 100).uniform_(to=3.0),
        "normal_": lambda: torch.empty(100, 100, dtype=torch.float64).normal_(1.0, 3.0),
        "exponential_": lambda: torch.empty(100, 100).exponential_(3.0),
        "log_normal_": lambda: torch.empty(100, 100).log_normal_(0.1, 0.3),
        "geometric_": lambda: torch.empty(100, 100).geometric_(0.4),
        "random_": lambda: torch.empty(100, 100).random_(2, 9),
        "random_ below": lambda: torch.empty(100, 100).random_(9),
        "cauchy_": lambda: torch.empty(100, 100).cauchy_(1.0, 2.0).atan(),
        "dropout": lambda: functional.dropout(big, 0.3),
        "dropout2d": lambda: functional.dropout2d(big[..., None, None], 0.3),
        "alpha_dropout": lambda: functional.alpha_dropout(big, 0.3, training=True),
        "feature_alpha_dropout": lambda: functional.feature_alpha_dropout(big, 0.3, training=True),
        "rrelu": lambda: functional.rrelu(-big, 0.2, 0.7, training=True),
        "rrelu in evaluation": lambda: functional.rrelu(-big, 0.2, 0.7),
    }
    many = {"poisson", "binomial", "gamma", "dirichlet", "beta"}  # thousands of operations each
    for name in many if in_rounds else draws.keys() - many:
        draw = draws[name]
        torch.manual_seed(0)
        expected = draw()
        with random.keyed(random.key(0)):
            got = draw()
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        got, expected = got.double(), expected.double()
        spread = float(expected.std())
        assert abs(got.mean() - expected.mean()) <= 0.05 * spread + 1e-6, name
        assert math.isclose(float(got.std()), spread, rel_tol=0.06, abs_tol=1e-6), name
        assert got.min() >= expected.min() - spread, name
        assert "rand in half" not in name or got.max() < 1, name


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_drop_between_layers_only() -> None:
    """All kinds of layers, also of packed sequences. At the rate 1 all is dropped, so that PyTorch draws the same."""
    x = torch.randn(5, 2, 3)
    for module in (
        nn.LSTM(3, 4, 3, dropout=1.0, proj_size=2),
        nn.GRU(3, 4, 3, dropout=1.0),
        nn.RNN(3, 4, 3, dropout=1.0),
    ):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
        for given in (x, packed):
            with random.keyed(random.key(0)):
                got, state = module(given)
            torch.manual_seed(0)
            expected, expected_state = module(given)
            for mine, theirs in ((got, expected), (state, expected_state)):
                pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
                for one, other in pairs:
                    if one is not None:
                        torch.testing.assert_close(one, other)


# Ops of ATen that draw and need no form with a key: kernels that public functions call, and functions without a public
# name.
BELOW = {
    *("miopen_rnn", "rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional"),
    *("cauchy", "exponential", "geometric", "log_normal", "normal_functional", "random", "uniform"),
}


def test_every_op_that_draws_has_a_form_with_a_key() -> None:
    """Every op of ATen with the tag, but for private ones: any other op that draws is refused where it is called."""
    names = {getattr(function, "__name__", "") for function in DRAWS}
    ops = set()
    for name in torch._C._dispatch_get_all_op_names():
        namespace, name, overload = re.fullmatch(r"(\w+)::(\w+)\.?(\w*)", name).groups()
        if namespace == "aten" and hasattr(torch.ops.aten, name):
            op = getattr(getattr(torch.ops.aten, name), overload or "default", None)
            ops |= {name} if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()) else set()
    assert len(ops) > 50
    missing = {name for name in ops - names - BELOW if not name.startswith("_")}
    assert not missing


def test_what_has_no_key_is_refused_by_name() -> None:
    generator = torch.Generator()
    with random.keyed(random.key(0)):
        with pytest.raises(TypeError, match="keyed: 'exponential' can't draw from a key"):
            torch.ops.aten.exponential(torch.ones(2))
        with pytest.raises(TypeError, match="keyed: `generator` must be None"):
            torch.rand(3, generator=generator)
        with pytest.raises(TypeError, match="keyed: `random_` must be given bounds"):
            torch.empty(3).random_()
        with pytest.raises(RuntimeError, match=r"keyed: torch\.utils\.checkpoint"):
            torch.utils.checkpoint.checkpoint(
                functional.dropout, torch.ones(3, requires_grad=True), use_reentrant=False
            )
        assert functional.scaled_dot_product_attention(X[:, None], X[:, None], X[:, None]).shape == (4, 1, 5)
    with pytest.raises(TypeError, match="keyed: `key` must be one key"), random.keyed(3):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_without_a_key_the_cure_is_named(engine: str) -> None:
    with pytest.raises(TypeError, match=r"rngs=key\).* popart_func\.random\.keyed\(key\)"):
        scan_lanes(lambda c, x: (functional.dropout(c), ()), torch.ones(2), length=1, engine=engine)
    with pytest.raises(TypeError, match=r"rngs=key\).* popart_func\.random\.keyed\(key\)"):
        to_jax_function(functional.dropout)(jnp.ones(2))


@pytest.mark.parametrize(
    "loop",
    [
        lambda draw: pf.fori_loop(0, 3, lambda i, c: c + draw(), torch.zeros(6)),
        lambda draw: pf.scan(lambda c, x: (c + draw(), ()), torch.zeros(6), torch.zeros(3))[0],
        lambda draw: pf.while_loop(lambda c: c.sum() < 9, lambda c: c + draw(), torch.zeros(6)),
        lambda draw: pf.cond(torch.ones(()) > 0, lambda c: c + draw(), lambda c: c, torch.zeros(6)),
    ],
)
def test_a_body_does_not_draw_from_a_key_around_its_loop(loop):
    """Each round would draw the same numbers; a key of the body's own is right."""

    def within(key):
        with random.keyed(key):
            return loop(lambda: torch.rand(6))

    def inside(key):
        def draw():
            with random.keyed(key):
                return torch.rand(6)

        return loop(draw)

    one = random.key(0)
    for function, is_refused in ((within, True), (inside, False)):
        refused = pytest.raises(TraceError, match="the body draws from a key that `keyed`")
        with refused if is_refused else nullcontext():
            trace_step(function, optree.tree_structure((one,)), [TensorSpec.of(one)])
