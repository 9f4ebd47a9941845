"""Every op of the native engine against PyTorch, on random shapes and on special values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from popart_func.engines import eager, native
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native.ops import OPS
from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.engines.tracing.tracer import trace_step

pytestmark = [
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("unchecked"),
]

LANES, STEPS = 19, 8
INF, NAN = float("inf"), float("nan")
SPECIAL = [
    NAN,
    INF,
    -INF,
    0.0,
    -0.0,
    1e-42,
    -1e-42,
    1e-320,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    88.0,
    -104.0,
    1e30,
    3.0,
]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in [
            "neg",
            "abs",
            "sign",
            "sqrt",
            "rsqrt",
            "reciprocal",
            "exp",
            "exp2",
            "expm1",
            "log",
            "log2",
            "log10",
            "log1p",
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
            "erf",
            "erfc",
            "sigmoid",
            "relu",
            "floor",
            "ceil",
            "trunc",
            "round",
            "square",
            "isnan",
            "isinf",
            "isfinite",
            "logical_not",
            "frac",
            "signbit",
        ]
    },
    **{
        name: getattr(F, name)
        for name in [
            "silu",
            "gelu",
            "elu",
            "leaky_relu",
            "hardtanh",
            "softplus",
            "mish",
            "hardswish",
            "hardsigmoid",
            "relu6",
            "selu",
            "celu",
            "logsigmoid",
        ]
    },
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "round_decimals": lambda x: torch.round(x.clamp(-100, 100), decimals=1),
    "pow_2": lambda x: x**2,
    "pow_3": lambda x: x**3,
    "pow_half": lambda x: x**0.5,
    "pow_minus_1": lambda x: x**-1,
    "pow_minus_2": lambda x: x**-2,
    "pow_1.7": lambda x: x**1.7,
    "pow_0": lambda x: x**0,
    "2_pow": lambda x: 2.0**x,
    "clamp": lambda x: x.clamp(-0.5, 2),
    "clamp_min": lambda x: x.clamp(min=0.25),
    "clamp_max": lambda x: x.clamp(max=0.25),
    "clamp_crossed": lambda x: x.clamp(2, -2),
    "nan_to_num": lambda x: torch.nan_to_num(x, nan=3.0, posinf=2.0, neginf=-2.0),
    "where": lambda x: torch.where(x > 0, x, -x * 0.1),
    "rsub": lambda x: 1 - x,
    "rdiv": lambda x: 2 / x,
    "div_scalar": lambda x: x / 3,
    "remainder_scalar": lambda x: x % 0.75,
    "to_double": lambda x: x.double() * 2,
    "to_float": lambda x: x.float() * 2,
    "to_bool": lambda x: x.bool(),
    "to_int": lambda x: torch.nan_to_num(x, nan=0.0).clamp(-1e6, 1e6).int(),
    "to_long": lambda x: torch.nan_to_num(x, nan=0.0).clamp(-1e6, 1e6).long(),
    "masked_fill": lambda x: x.masked_fill(x < 0, 7.0),
    "zeros_like": lambda x: torch.zeros_like(x) + torch.ones_like(x) * torch.full_like(x, 2.5),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.25),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, 0),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "cumsum": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(-1),
    "sum": lambda x: x.sum(),
    "sum_0": lambda x: x.sum(0),
    "sum_keep": lambda x: x.sum(-1, keepdim=True) * x,
    "mean": lambda x: x.mean(1),
    "prod": lambda x: x.prod(0),
    "amax": lambda x: x.amax(0),
    "amin": lambda x: x.amin((0, 1)),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max_dim": lambda x: torch.cat([x.max(0).values, x.max(0).indices.to(x.dtype)]),
    "min_dim": lambda x: torch.cat([x.min(1).values, x.min(1).indices.to(x.dtype)]),
    "argmax": lambda x: x.argmax(0),
    "argmin": lambda x: x.argmin(-1, keepdim=True),
    "argmax_all": lambda x: x.argmax(),
    "any": lambda x: (x > 0).any(0),
    "all": lambda x: (x > 0).all(),
    "var": lambda x: x.var(0),
    "std": lambda x: x.std(),
    "norm": lambda x: x.norm(),
    "var_mean": lambda x: torch.stack(torch.var_mean(x, 1, correction=0)),
    "sort": lambda x: both(x.sort(dim=0, stable=True)),
    "sort_descending": lambda x: both(x.sort(dim=-1, descending=True, stable=True)),
    "sort_0d": lambda x: both(x[0, 0].sort()),
    "sort_many": lambda x: both(torch.cat([x, x.flip(1), x[:, :1] * 2], 1).sort(dim=1, stable=True)),
    "sort_unstable": lambda x: x.sort(0).values,
    "argsort": lambda x: x.argsort(dim=0, stable=True),
    "topk": lambda x: x.topk(2, 0).values,
    "topk_smallest": lambda x: x.topk(3, 0, largest=False, sorted=True).values,
    "sort_gradient": lambda x: torch.func.grad(lambda z: (z.sort(dim=0, stable=True).values[0] * z[0]).sum())(x),
}


def both(result: Any) -> Tensor:
    """Values and indices, one after the other."""
    return torch.stack([result.values, result.indices.to(result.values.dtype)])


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in [
            "add",
            "sub",
            "mul",
            "div",
            "maximum",
            "minimum",
            "atan2",
            "fmod",
            "remainder",
            "floor_divide",
            "pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "fmax",
            "fmin",
            "hypot",
            "copysign",
            "logical_and",
            "logical_or",
            "logical_xor",
        ]
    },
    "add_alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "sub_alpha": lambda x, y: torch.sub(x, y, alpha=2),
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "clamp_tensors": lambda x, y: torch.clamp(x, y, y + 1),
    "where": lambda x, y: torch.where(x > y, x, y),
    "mixed": lambda x, y: x.float() + y.double() * (x > 0),
}
# Where PyTorch contradicts itself for special values: its vectorized gelu(inf) is NaN, its vectorized fmod is wrong for
# denormal divisors, its variance of infinities depends on the order of summation.
TAME = ("gelu", "gelu_tanh", "fmod", "remainder", "std", "var_mean", "addcmul", "cumprod")
INTEGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in [
            "add",
            "sub",
            "mul",
            "div",
            "maximum",
            "minimum",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
            "logical_and",
            "logical_or",
        ]
    },
    **{
        name: lambda x, y, name=name: getattr(torch, name)(x, torch.where(y == 0, 3, y))
        for name in ("floor_divide", "remainder", "fmod")
    },
    "div_trunc": lambda x, y: torch.div(x, torch.where(y == 0, -1, y), rounding_mode="trunc"),
    "shift_left": lambda x, y: x << (y & 7),
    "shift_right": lambda x, y: x >> (y & 15),
    "bitwise_shifts": lambda x, y: torch.bitwise_left_shift(x, y % 40) + torch.bitwise_right_shift(x, y % 40),
    "shift_right_scalar": lambda x, y: x >> 3,
    "not": lambda x, y: ~x,
    "neg_abs_sign": lambda x, y: -x.abs() * y.sign(),
    "pow_2": lambda x, y: x**2,
    "pow": lambda x, y: (x % 7) ** (y & 3),
    "sum": lambda x, y: x.sum(0) + y.prod(),
    "mean": lambda x, y: x.float().mean(),
    "amax": lambda x, y: x.amax(0) - y.amin(-1).sum(),
    "argmax": lambda x, y: x.argmax(-1),
    "cumsum": lambda x, y: x.cumsum(0),
    "sort": lambda x, y: (
        both((x % 5).sort(dim=1, stable=True)) + both((y % 3).sort(dim=1, descending=True, stable=True))
    ),
    "sort_bool": lambda x, y: (x > 0).sort(dim=0, stable=True).indices + (y > 0).sort(dim=0, descending=True).values,
    "topk": lambda x, y: torch.topk(x, 2, sorted=False).values.sum(-1),
    "times_float": lambda x, y: x * 0.5 + y,
    "plus_bool": lambda x, y: x + (y > 0),
    "clamp": lambda x, y: x.clamp(-3, 5),
    "to_float": lambda x, y: (x.float() / 7).exp(),
    "true_div": lambda x, y: x / 4,
    "sqrt": lambda x, y: x.abs().sqrt(),
    "tanh": lambda x, y: torch.tanh(x),
    "one_hot": lambda x, y: F.one_hot(x.long() % 5, 5),
    "mm": lambda x, y: (x % 9) @ (y % 9).T,
    "bool_ops": lambda x, y: ((x > 0) & (y > 0)) | ~(x < 3) ^ (y == 2),
    "bool_sum": lambda x, y: (x > 0).sum(0),
    "bool_max": lambda x, y: (x > 0).amax(0),
    "to_small": lambda x, y: x.to(torch.int8).to(torch.int16) + y.to(torch.uint8),
}


def compare(
    function: Callable[..., dict[str, Tensor]], arguments: dict[str, Tensor], rtol: float, shared: Any = False
) -> None:
    """Runs a function in one kernel, on other arguments in each lane and step, and compares it with eager."""

    def step(carry: Tensor, xs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return carry + 1, function(**xs)

    scan = make_lane_scan("scan", step, torch.zeros(LANES), arguments, shared=shared)
    expected, got = eager.run(scan)[1], native.run(scan)[1]
    wrong = []
    for name in expected:
        a, b = got[name], expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        # Sums are as exact as their largest term; below the smallest normal number only absolute exactness can be had.
        tiny = torch.finfo(a.dtype).tiny * rtol if a.is_floating_point() else 0
        close = torch.isclose(a, b, rtol=rtol, atol=16 * rtol if name.startswith(SUMS) else tiny, equal_nan=True)
        if not close.all():
            where = tuple((~close).nonzero()[0].tolist())
            wrong.append(f"{name}: {a[where]} != {b[where]} at {where}, {int((~close).sum())} in all")
    assert not wrong, "\n".join(wrong)


SUMS = (
    "sum",
    "mean",
    "mm",
    "addcmul",
    "gelu",
    "logsumexp",
    "log_softmax",
    "cumsum",
    "std",
    "var",
    "norm",
    "mixed",
    "fmod",
    "remainder",
)


def special(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.tensor(SPECIAL, dtype=dtype)
    picked = values[torch.randint(0, len(values), shape, generator=generator)]
    normal = torch.randn(shape, generator=generator, dtype=dtype) * 3
    return torch.where(torch.rand(shape, generator=generator) < 0.4, picked, normal)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (3, 4)), (torch.float64, (5, 1))])
def test_floating_point(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (special(generator, dtype, STEPS, LANES, *shape) for _ in range(2))
    functions = all_floating_point()
    tame = {name: function for name, function in functions.items() if name.rstrip("_") in TAME}

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        u, v = (torch.where((z.abs() > 1e-3) & (z.abs() < 1e3), z, 0.7) for z in (x, y))
        return {name: f(u, v) if name in tame else f(x, y) for name, f in functions.items()}

    compare(step, {"x": x, "y": y}, rtol=3e-6 if dtype == torch.float32 else 3e-14)


def all_floating_point() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {**BINARY, **{f"{name}_": lambda x, y, op=op: op(x) for name, op in UNARY.items()}}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-20, 20, (STEPS, LANES, 3, 4), generator=generator).to(dtype) for _ in range(2))
    compare(lambda x, y: {name: f(x, y) for name, f in INTEGER.items()}, {"x": x, "y": y}, rtol=3e-6)


def movement(x: Tensor, y: Tensor, i: Tensor, j: Tensor, k: Tensor) -> dict[str, Tensor]:
    """x, y: [3, 4]; i: [5], indices below 3; j: [3, 4], indices below 3; k: 0-d, below 4."""
    z = torch.zeros(6, 4, dtype=x.dtype)
    return {
        "permute": x.T.contiguous() + y.reshape(4, 3),
        "reshape_of_permuted": x.T.reshape(2, 6),
        "expand": x[:, None, :].expand(3, 2, 4) * y[:, :2, None],
        "slices": x[1:, ::2] + y[:2, 1::2],
        "select": x[-1] - y[:, 2].sum(),
        "flip": x.flip(0, 1),
        "roll": x.roll(1, 1),
        "diagonal": x.diagonal() + y.diagonal(1),
        "diag": torch.diag(x[0]) + torch.diag_embed(y[1]),
        "tril": x.tril() + y.triu(1),
        "repeat": x.repeat(2, 1),
        "repeat_interleave": x.repeat_interleave(2, dim=1),
        "tile": x.tile(1, 2),
        "unfold": torch.cat([part.flatten() for part in (x.unfold(1, 3, 1), y.T.unfold(0, 2, 2), k.unfold(0, 1, 1))]),
        "cat": torch.cat([x, y * 2, x[:1]], 0),
        "cat_columns": torch.cat([x.T, y.T + 1], 1),
        "stack": torch.stack([x, y], -1),
        "split": x.split(2, 1)[1] + x.chunk(2, 1)[0],
        "unbind": x.unbind(0)[1] * y.unbind(0)[2],
        "pad": F.pad(x, (1, 2, 0, 1), value=3.0),
        "pad_negative": F.pad(x, (-1, 1)),
        "gather": x.gather(0, j),
        "gather_part": x.gather(1, j[:2, :2]),
        "take_along": torch.take_along_dim(x, j, 0),
        "index_select": x.index_select(0, i),
        "index": x[i],
        "index_negative": x[i - 3],
        "index_two": x[i, i],
        "index_apart": x[:, None][i, :, i],
        "index_column": x[:, i],
        "index_scalar": x[:, k],
        "index_scalars": x[k, k - 3] + x[None, ..., k][0, 1],
        "index_scalar_mixed": x[i, k] + x[1:, k, None].sum(),
        "set_scalar": set_scalar(x, y, k),
        "index_broadcast": x[i[:, None], i],
        "embedding": F.embedding(i, y),
        "scatter": z.scatter(0, j, x),
        "scatter_value": torch.zeros(3, 4, dtype=x.dtype).scatter(0, j, 2.0),
        "scatter_add": z.scatter_add(0, j, x),
        "scatter_amax": y.scatter_reduce(0, j, x, "amax"),
        "index_add": z.index_add(0, i, torch.cat([x, y[:2]])),
        "index_put": y.index_put((i, i), x[0, :1]),
        "index_put_accumulate": y.index_put((i,), x[:1], accumulate=True),
        "index_fill": y.index_fill(0, i, 5.0),
        "set_item": set_item(x, y),
        "select_scatter": x.select_scatter(y[0], 0, 1),
        "slice_scatter": x.slice_scatter(y[:, :2], 1, 1, 3),
        "one_hot": F.one_hot(i, 3).to(x.dtype) * 2,
        "arange": torch.arange(4) * x + torch.arange(0.0, 1.0, 0.25),
        "linspace_eye": torch.linspace(0, 1, 4) * x + torch.eye(3, 4, dtype=x.dtype),
        "masked": torch.where(x > 0, x, 0).sum(1),
        "outer": torch.outer(x[0], y[0]) + torch.einsum("i,j->ij", x[1], y[1]),
        "mm": x @ y.T,
        "mm_big": (x.T @ y) @ (y.T @ x),
        "mm_bmm": torch.einsum("bij,bjk->bik", x.reshape(3, 2, 2), y.reshape(3, 2, 2)),
        "mm_vector": x @ y[0] + F.linear(y[1], x, x[:, 0]),
        "mm_dot": torch.dot(x[0], y[0]),
        "mm_addmm": torch.addmm(x[:, :3], x, y.T, beta=0.5, alpha=2),
        "mm_addmv": torch.addmv(x[:, 0], x, y[0], beta=0.5, alpha=2),
        "mm_tensordot": torch.tensordot(x, y, dims=2),
        "mean_layer_norm": F.layer_norm(x, (4,)),
        "mean_cross_entropy": F.cross_entropy(x, j[:, 0]),
        "mean_huber": F.huber_loss(x, y) + F.mse_loss(x, y) + F.smooth_l1_loss(x, y),
        "cumsum": x.cumsum(1),
        "vmapped": torch.vmap(lambda row, other: row * other.sum())(x, y),
        "jacobian": torch.func.jacrev(lambda row: torch.tanh(row) * row.sum())(x[0]),
        "hessian": torch.func.jacrev(torch.func.grad(lambda row: (torch.sigmoid(row) ** 2).sum() * row[0] * row[1]))(
            x[0]
        ),
        "new": torch.empty(3, 4).fill_(2.0) + torch.empty_like(x.T).copy_(y.T).T + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "empty": x[:, :0].sum(1) + x[:0].sum(),
    }


def set_item(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[1:, 0] = y[:2, 1]
    x[0] += 1
    return x


def set_scalar(x: Tensor, y: Tensor, k: Tensor) -> Tensor:
    x = x + 0 * k  # torch.vmap writes a lane's own values into a lane's own tensor only
    x[k] = y[0]
    x[0, k] = 5.0
    x[:, k] = y[:, 1]
    x[k, -k] += 1
    cube = x[None].repeat(2, 1, 1)
    cube[:, k, k] = torch.stack([y[0, 0], y[1, 1]])
    return cube


def test_movement() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(STEPS, LANES, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    i, j, k = (torch.randint(0, 3, (STEPS, LANES, *shape), generator=generator) for shape in ((5,), (3, 4), ()))
    compare(movement, {"x": x, "y": y, "i": i, "j": j, "k": k}, rtol=1e-12)


def test_movement_of_what_all_lanes_share() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(STEPS, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    i, j, k = (torch.randint(0, 3, (STEPS, *shape), generator=generator) for shape in ((5,), (3, 4), ()))
    compare(movement, {"x": x, "y": y, "i": i, "j": j, "k": k}, rtol=1e-12, shared=True)


def test_every_op_of_the_table_is_tested_here() -> None:
    device = torch.device("cpu")
    real, whole = (TensorSpec((3, 4), dtype, device) for dtype in (torch.float32, torch.int32))

    def floating_point(x: Tensor, y: Tensor) -> Any:
        return {name: function(x, y) for name, function in all_floating_point().items()}

    def integers(x: Tensor, y: Tensor) -> Any:
        return {name: function(x, y) for name, function in INTEGER.items()}

    indices = [TensorSpec(shape, torch.int64, device) for shape in ((5,), (3, 4), ())]
    used = set()
    for function, specs in ((floating_point, [real] * 2), (integers, [whole] * 2), (movement, [real, real, *indices])):
        used |= set(trace_step(function, optree.tree_structure(tuple(0 for _ in specs)), specs).operations)
    assert set(OPS) <= used
