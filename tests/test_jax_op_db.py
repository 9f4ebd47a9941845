"""Ops of PyTorch's own table in JAX: the values of a sample (with ``-m slow`` derivatives), and special points.

`python tests/benchmarks/op_coverage.py --target jax --derivatives` compares the whole table.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
import torch
from op_comparison import STAGES, compare_entry, entries_by_name
from op_families import FAMILIES, SHAPES
from torch import Tensor

import popart_func as pf
from popart_func.engines.tracing.source_lines import TraceError
from popart_func.interop.jax import to_jax, to_jax_function, to_torch

NAN, INF = float("nan"), float("inf")

# One of each family of lowerings that PyTorch's table alone has arguments for.
SAMPLED = (
    *("addbmm", "as_strided_copy", "cholesky_solve", "frexp", "index_reduce_amax", "ldexp", "linalg_lu_solve", "mode"),
    *("nanmedian", "nextafter", "nn_functional_adaptive_max_pool2d", "nn_functional_avg_pool3d", "ormqr"),
    *("nn_functional_grid_sample", "nn_functional_max_unpool2d", "polygamma_polygamma_n_1", "special_airy_ai"),
    *("special_bessel_y1", "special_legendre_polynomial_p", "special_scaled_modified_bessel_k1", "take_along_dim"),
)


@pytest.mark.parametrize("name", SAMPLED[::3])
def test_a_sample_of_the_table(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare_entry(entries_by_name()[name], "jax", most=1)
    assert found["value"].verdict == "right", found


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_values_and_derivatives_of_a_sample_of_the_table(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare_entry(entries_by_name()[name], "jax", most=1, stages=STAGES)
    assert found["value"].verdict == "right", found
    assert not {"wrong", "raw"} & {one.verdict for one in found.values()}, found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:index_reduce")
@pytest.mark.parametrize("family", ["convolutions", "pools", "orders", "images", "matrices"])
def test_families(family: str) -> None:
    """The cases that the native engine is tested with, in double precision."""
    generator = torch.Generator().manual_seed(6)
    arguments = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()]
    with jax.enable_x64(True):
        got = to_torch(jax.jit(to_jax_function(FAMILIES[family]))(*map(to_jax, arguments)))
    for name, expected in FAMILIES[family](*arguments).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


def test_a_wrong_lowering_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from popart_func.interop.lowerings.table import LOWERINGS

    monkeypatch.setitem(LOWERINGS, "frexp", lambda outs, x: [x * 0, x * 0])
    assert compare_entry(entries_by_name()["frexp"], "jax", most=1)["value"].verdict == "wrong"


def test_a_0d_index_gathers_from_a_vector() -> None:
    q = torch.arange(4.0)
    gathered = to_jax_function(lambda q, action: q.gather(-1, action))(to_jax(q), jnp.asarray(2))
    assert gathered.shape == ()
    assert gathered == 2


@torch.library.custom_op("popart_func_tests::shapeless", mutates_args=())
def shapeless(x: torch.Tensor) -> torch.Tensor:
    """An op that does not tell its result's shape."""
    return x.clone()


def test_what_jax_or_the_tracer_refuses_is_named() -> None:
    x = jnp.ones(3)
    with pytest.raises(TraceError, match=r"can't tell the shape that .*, in .*test_jax_op_db\.py:\d+: `.*shapeless"):
        to_jax_function(shapeless)(x)
    with pytest.raises(RuntimeError, match="must be batches of square matrices"):  # the user's own mistake
        to_jax_function(torch.linalg.cholesky)(jnp.ones((2, 3)))


def test_float64_of_constants_is_computed_by_pytorch() -> None:
    with jax.enable_x64(False):
        narrow = to_jax_function(lambda x: x * (torch.full((), 1e-9, dtype=torch.float64) + 1 - 1).float())
        assert abs(float(narrow(jnp.ones(()))) / 1e-9 - 1) < 1e-6  # float32 would give 0
        with pytest.raises(TypeError, match="float64"):
            to_jax_function(lambda x: torch.full((), 1.0, dtype=torch.float64))(jnp.ones(()))


# At each of these points, the value and the gradient.
POINTS = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, 3.0, 6.0, INF, -INF, NAN])
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("abs", "sign", "exp", "log", "sqrt", "sin", "tanh", "sigmoid", "erf")},
    **{name: getattr(torch, name) for name in ("expm1", "log1p", "round", "floor", "ceil", "trunc", "frac", "relu")},
    **{name: getattr(torch, name) for name in ("reciprocal", "rsqrt", "square", "asinh", "atan", "sinc", "logit")},
    **{
        name: getattr(torch.nn.functional, name)
        for name in ("elu", "hardtanh", "relu6", "hardswish", "hardsigmoid", "softsign", "leaky_relu", "softshrink")
    },
    "hardshrink": torch.nn.functional.hardshrink,
    "clamp": lambda x: x.clamp(-1, 1),
    "maximum": lambda x: torch.maximum(x, x.detach() * 1),
    "where": lambda x: torch.where(x > 0, x, 0),
    "nan_to_num": lambda x: x.nan_to_num(),
    "xlogy": lambda x: torch.xlogy(x, x + 1),
    "pow_2": lambda x: x**2,
    "pow_0": lambda x: x**0,
}
# Points at which a slope in JAX is not PyTorch's, by the op's name, and the reason. Slopes at NaN are not compared:
# PyTorch's backward kernels choose a branch by a comparison that NaN fails.
OWN: dict[str, tuple[tuple[float, ...], str]] = {
    "nan_to_num": ((INF, -INF), "PyTorch's slope is 0 where it replaces"),
    "logit": ((0.0, 1.0, -1.0, -0.5, 2.0, -3.0, 3.0, 6.0, INF, -INF), "PyTorch has NaN outside of (0, 1)"),
    "sinc": ((INF, -INF), "the quotient of infinities"),
    "xlogy": ((0.0, -1.0, -3.0, -INF), "the slope of 0 * log(0)"),
    "rsqrt": ((0.0,), "the sign of an infinite slope at -0"),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("sum", "mean", "prod", "amax", "amin", "std", "var", "max", "min")},
    **{f"norm_{p}": lambda x, p=p: torch.linalg.vector_norm(x, p) for p in (0.5, 1, 2, 3, INF)},
    "median": torch.median,
    "logsumexp": lambda x: x.logsumexp(0),
    "softmax": lambda x: x.softmax(0).square().sum(),
    "log_softmax": lambda x: x.log_softmax(0)[0],
    "cumsum": lambda x: x.cumsum(0).square().sum(),
    "cumprod": lambda x: x.cumprod(0).sum(),
    "sort": lambda x: (x.sort(stable=True).values * torch.arange(len(x))).sum(),
    "cosine": lambda x: torch.nn.functional.cosine_similarity(x, x * 2 + 1, 0),
}
ARGUMENTS = {
    "zeros": torch.zeros(4),
    "equal": torch.full((4,), 2.0),
    "one": torch.tensor([1.5]),
    "zero": torch.zeros(1),
    "a_nan": torch.tensor([1.0, NAN, 2.0, 3.0]),
    "ties": torch.tensor([1.0, 3.0, 3.0, 1.0]),
    "an_infinity": torch.tensor([1.0, INF, 2.0, 3.0]),
}


pytestmark = [pytest.mark.filterwarnings(f"ignore:{name}") for name in ("std", "var")]


def value_and_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


Results = dict[str, tuple[Tensor, Tensor]]


def in_jax(functions: dict[str, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Results]:
    """The values and slopes of functions, compiled once for each shape."""

    def all_of(array: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {}
        for name, function in functions.items():
            value, pull = jax.vjp(to_jax_function(function), array)
            found[name] = value, pull(jnp.ones_like(value))[0]
        return found

    compiled = jax.jit(all_of)
    return lambda x: to_torch(compiled(to_jax(x)))


reductions_in_jax = in_jax(REDUCTIONS)


def test_pointwise_ops_at_special_points() -> None:
    got = in_jax(POINTWISE)(POINTS)
    wrong = []
    for name, function in POINTWISE.items():
        own = torch.isin(POINTS, torch.tensor(OWN.get(name, ((), ""))[0])) | POINTS.isnan()
        parts = zip(("value", "slope"), got[name], value_and_slope(function, POINTS), strict=True)
        for what, ours, theirs in parts:
            bad = ~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
            bad = bad & ~own if what == "slope" else bad
            wrong += [f"{what} of {name} at {POINTS[n]}: {ours[n]} for {theirs[n]}" for n in bad.nonzero()[:, 0]]
    assert not wrong, "\n".join(wrong)


# Reductions whose slope in JAX is not PyTorch's: the argument and the op, and the reason. With a NaN among the entries
# no slope is compared: PyTorch's backward kernels multiply by it, or choose its place.
OWN_REDUCTIONS: dict[tuple[str, str], str] = {
    **{
        (argument, "median"): "of equal entries the first in order takes the slope, in PyTorch all of them share it"
        for argument in ("zeros", "equal", "ties")
    },
    **{("an_infinity", name): "PyTorch divides the result by the entry" for name in ("prod", "cumprod")},
    ("an_infinity", "var"): "the distances from an infinite mean",
}


EDGES = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, INF, -INF, NAN])
PAIRS = tuple(part.reshape(-1) for part in torch.meshgrid(EDGES, EDGES, indexing="ij"))
OF_TWO = (
    "atan2 copysign floor_divide fmax fmin fmod heaviside hypot ldexp logaddexp logaddexp2 maximum minimum nextafter"
)
# PyTorch's loop over the order does not begin, and gives 0, where x is NaN.
KEEP_NAN = "polynomial"


def functions_at_edges() -> dict[str, Callable[..., Tensor]]:
    """Every function of one and of two numbers in `torch.special`, and others of two, by their names."""
    found = {f"special.{name}": getattr(torch.special, name) for name in torch.special.__all__}
    return found | {name: getattr(torch, name) for name in (*OF_TWO.split(), "nextafter", "remainder", "true_divide")}


def values_at_edges(x: Tensor, pairs: tuple[Tensor, Tensor]) -> dict[tuple[str, int], Tensor]:
    """What the functions that take one number, or two, give: by their names and the numbers that they take."""
    values = {}
    for name, function in functions_at_edges().items():
        for arguments in ((x,), pairs):
            with contextlib.suppress(TypeError):  # takes another number of them
                value = function(*arguments)
                if value.shape == arguments[0].shape:
                    values[name, len(arguments)] = value
    return values


@pytest.mark.parametrize("where", ["jax", "native"])
def test_special_functions_at_the_edges(where: str) -> None:
    """At 0, the infinities and NaN, and at every pair of them."""
    if where == "jax":
        flat = jax.jit(to_jax_function(lambda *given: list(values_at_edges(given[0], given[1:]).values())))
        got = to_torch(flat(*to_jax((EDGES, *PAIRS))))
    else:
        step = lambda carry, _: (carry, list(values_at_edges(carry[0], carry[1:]).values()))  # noqa: E731
        lanes = tuple(part[None] for part in (EDGES, *PAIRS))
        got = [value[0, 0] for value in pf.scan_lanes(step, lanes, length=1, engine="native")[1]]
    expected = values_at_edges(EDGES, PAIRS)
    assert len(got) == len(expected) > 60
    wrong = []
    for ((name, arguments), value), ours in zip(expected.items(), got, strict=True):
        bad = ~torch.isclose(ours, value, rtol=1e-4, atol=1e-6, equal_nan=True)
        bad &= ~(torch.isnan(ours) & torch.isnan(PAIRS[0])) if KEEP_NAN in name else True
        for n in bad.nonzero()[:, 0]:
            at = [part[n].item() for part in ((EDGES,) if arguments == 1 else PAIRS)]
            wrong.append(f"{name}{tuple(at)}: {ours[n]} for {value[n]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("where", "rank"), [("jax", 2), ("jax", 3), ("native", 2), ("native", 3)])
def test_a_grid_with_places_that_are_no_numbers(where: str, rank: int) -> None:
    """A conversion of NaN or infinity to an index gave another element, or 0; volumes have rules of their own."""
    image = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    grid = torch.tensor([[NAN, 0.3], [0.3, INF], [-INF, NAN], [INF, -0.2], [0.3, 0.2], [3e38, 0.3]])
    if rank == 3:
        image = torch.stack([image, -image], 2)
        grid = torch.cat([torch.nn.functional.pad(grid, sides, value=0.4) for sides in ((0, 1), (1, 0))])
    grid = grid.reshape(1, *(1 for _ in range(rank - 1)), -1, rank)

    def sampled(grid: Tensor) -> list[Tensor]:
        options = itertools.product(("bilinear", "nearest"), ("zeros", "border", "reflection"), (True, False))
        return [torch.nn.functional.grid_sample(image, grid, *option) for option in options]

    if where == "jax":
        got = to_torch(jax.jit(to_jax_function(sampled))(to_jax(grid)))
    else:
        step = lambda grid, _: (grid, torch.stack(sampled(grid)))  # noqa: E731
        got = pf.scan_lanes(step, grid[None], length=1, engine="native")[1][0, 0]
    for ours, expected in zip(got, sampled(grid), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_reductions_at_special_points(argument: str) -> None:
    x = ARGUMENTS[argument]
    got = reductions_in_jax(x)
    wrong = []
    for name, function in REDUCTIONS.items():
        is_own = (argument, name) in OWN_REDUCTIONS or bool(x.isnan().any())
        for what, ours, theirs in zip(("value", "slope"), got[name], value_and_slope(function, x), strict=True):
            is_right = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
            if not is_right and not (what == "slope" and is_own):
                wrong.append(f"{what} of {name}: {ours.tolist()} for {theirs.tolist()}")
    assert not wrong, "\n".join(wrong)


def test_reductions_of_nothing() -> None:
    x = torch.zeros(0)
    for name in ("sum", "prod", "mean", "std", "norm_2"):
        value, slope = in_jax({name: REDUCTIONS[name]})(x)[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = REDUCTIONS[name](x)
        assert torch.allclose(value, expected, equal_nan=True)
        assert slope.shape == (0,)
