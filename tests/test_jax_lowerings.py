"""Every lowering to JAX against PyTorch: the cases of the native engine, and the layers of real networks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optree
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from op_cases import INTEGER, TAME, all_floating_point, movement, special
from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from popart_func.engines.composed import COMPOSED
from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.engines.tracing.tracer import trace_step
from popart_func.interop.functions import to_jax_function
from popart_func.interop.lowerings import LOWERINGS
from popart_func.interop.trees import to_jax, to_torch

# XLA makes `where` of a product with a bool, so that inf * False is 0. Where gelu cancels it is exact to its argument.
MORE_TAME = (*TAME, "mixed")
CANCELS = ("gelu_", "gelu_tanh_")

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(function: Callable[..., dict[str, Tensor]]) -> Callable[..., Any]:
    """The function in JAX, compiled once for all arguments of the same shapes."""
    return jax.jit(to_jax_function(function))


def compare(function: Callable[..., dict[str, Tensor]], *arguments: Tensor, rtol: float, atol: float = 0.0) -> None:
    expected = function(*arguments)
    got = to_torch(compiled(function)(*to_jax(arguments)))
    wrong = []
    for name, value in expected.items():
        a = got[name]
        assert (a.dtype, a.shape) == (value.dtype, value.shape), name
        close = torch.isclose(a, value, rtol=rtol, atol=rtol if name in CANCELS else atol, equal_nan=True)
        if not close.all():
            where = tuple((~close).nonzero()[0].tolist())
            wrong.append(f"{name}: {a[where]} != {value[where]} at {where}, {int((~close).sum())} in all")
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("unoptimized_xla")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floating_point(dtype: torch.dtype) -> None:
    """Without denormal numbers, which XLA takes to be 0."""
    generator = torch.Generator().manual_seed(1)
    x, y = (special(generator, dtype, 24, 30) for _ in range(2))
    x, y = (torch.where(z.abs() < torch.finfo(dtype).tiny, torch.zeros_like(z).copysign(z), z) for z in (x, y))
    functions = all_floating_point()

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        u, v = (torch.where((z.abs() > 1e-3) & (z.abs() < 1e3), z, 0.7) for z in (x, y))
        return {name: f(u, v) if name.rstrip("_") in MORE_TAME else f(x, y) for name, f in functions.items()}

    compare(step, x, y, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-20, 20, (3, 4), generator=generator).to(dtype) for _ in range(2))
    compare(lambda x, y: {name: f(x, y) for name, f in INTEGER.items()}, x, y, rtol=3e-6)


def test_movement() -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        i, j, k = (torch.randint(0, 3, shape, generator=generator) for shape in ((5,), (3, 4), ()))
        compare(movement, x, y, i, j, k, rtol=1e-12, atol=1e-14)


MEAN = torch.tensor([0.5, 1.0, 2.0, 0.1])
# x: [2, 4, 9, 8]; w: [6, 4, 3, 3]; i: [6], indices below 6
LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "conv2d": lambda x, w, i: F.conv2d(x, w, w[:, 0, 0, 0], stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "conv2d_groups": lambda x, w, i: F.conv2d(x, w[:, :2], groups=2),
    "conv2d_same": lambda x, w, i: F.conv2d(x[0], w, padding="same"),
    "conv1d": lambda x, w, i: F.conv1d(x[:, :, 0], w[..., 0]),
    "conv3d": lambda x, w, i: F.conv3d(x[:, :, None], w[:, :, None, :2, :2]),
    "conv_transpose": lambda x, w, i: F.conv_transpose2d(
        x, w.transpose(0, 1), w[:, 0, 0, 0], stride=2, padding=1, output_padding=(1, 0)
    ),
    "conv_transpose_groups": lambda x, w, i: F.conv_transpose2d(x, w[:4, :3], groups=2, dilation=2),
    "max_pool": lambda x, w, i: F.max_pool2d(x, 3, stride=2, padding=1),
    "max_pool_ceil": lambda x, w, i: F.max_pool2d(x, (2, 3), ceil_mode=True),
    "max_pool_indices": lambda x, w, i: F.max_pool2d(x[0], 2, return_indices=True)[1],
    "max_pool1d": lambda x, w, i: F.max_pool1d(x[0], 2),
    "avg_pool": lambda x, w, i: F.avg_pool2d(x, 3, stride=2, padding=1),
    "avg_pool_inside": lambda x, w, i: F.avg_pool2d(x[0], (3, 2), padding=1, count_include_pad=False),
    "avg_pool_divisor": lambda x, w, i: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": lambda x, w, i: F.adaptive_avg_pool2d(x, 1),
    "adaptive_parts": lambda x, w, i: F.adaptive_avg_pool2d(x, (4, 3)),
    "batch_norm": lambda x, w, i: F.batch_norm(
        x, MEAN.to(x.dtype), 1 / MEAN.to(x.dtype), x[0, 0, 0, :4], x[0, :, 0, 1]
    ),
    "batch_norm_training": lambda x, w, i: F.batch_norm(x, None, None, x[0, :, 0, 0], training=True),
    "group_norm": lambda x, w, i: F.group_norm(x, 2, x[0, :, 0, 0], x[1, :, 0, 0]),
    "layer_norm": lambda x, w, i: F.layer_norm(x, (9, 8)),
    "instance_norm": lambda x, w, i: F.instance_norm(x),
    "attention": lambda x, w, i: F.scaled_dot_product_attention(x[:, :2], x[:, :2] + 1, x[:, :2] * 2),
    "attention_causal": lambda x, w, i: F.scaled_dot_product_attention(x[:, :2], x[:, :2], x[:, :2], is_causal=True),
    "attention_masked": lambda x, w, i: F.scaled_dot_product_attention(
        x[:, :2], x[:, :2], x[:, :2], attn_mask=torch.arange(81).reshape(9, 9) % 5 * torch.arange(9)[:, None] > 4
    ),
    "embedding": lambda x, w, i: F.embedding(i, w[:, :, 0, 0], padding_idx=1),
    "bmm": lambda x, w, i: torch.baddbmm(
        x[0], x[0], torch.ones_like(x[0, :, 0])[:, None].expand(4, 8, 8) * w[0, 0, 0, 0]
    ),
    "einsum": lambda x, w, i: torch.einsum("bchw,ocij->bohi", x, w),
    "glu": lambda x, w, i: F.glu(x, 1),
    "cross_entropy": lambda x, w, i: F.cross_entropy(x.flatten(2), i.repeat(24).reshape(2, 72) % 4),
    "sort": lambda x, w, i: x.sort(-1).values,
    "argsort": lambda x, w, i: x.argsort(1, descending=True),
    "topk": lambda x, w, i: x.topk(3, 1).values + x.topk(3, 1, largest=False).values,
    "topk_indices": lambda x, w, i: x.topk(2, -1).indices,
    "median": lambda x, w, i: x.sort(dim=0, stable=True).values[0],
    "logcumsumexp": lambda x, w, i: x.logcumsumexp(1),
    "cummax": lambda x, w, i: torch.cummax(x, 2).values + torch.cummin(x, 2).values,
    "cummax_indices": lambda x, w, i: torch.cummax(x, 2).indices,
    "special": lambda x, w, i: torch.erfinv(x.tanh() / 2) + torch.lgamma(x.abs() + 0.1) + torch.digamma(x.abs() + 1),
    "upsample": lambda x, w, i: F.interpolate(x, scale_factor=2),
    "shrink": lambda x, w, i: F.softshrink(x, 0.3) + F.hardshrink(x, 0.8),
    "written": lambda x, w, i: written(x, w),
    "complex": lambda x, w, i: torch.view_as_real(
        (torch.view_as_complex(x.reshape(2, 4, 9, 4, 2)) * 1j).conj().resolve_conj()
    ),
    "bits": lambda x, w, i: x.view(torch.int32)[..., 0],
    "inverse": lambda x, w, i: torch.linalg.inv(square(x)) @ x[0, :, :4, :2],
    "solve": lambda x, w, i: torch.linalg.solve(square(x), x[0, :, 4:8]),
    "solve_vectors": lambda x, w, i: torch.linalg.solve(square(x), x[0, :, 0, :4]),
    "solve_right": lambda x, w, i: torch.linalg.solve(square(x), x[0, :, :4, :4], left=False),
    "determinants": lambda x, w, i: torch.linalg.det(square(x)) + torch.linalg.slogdet(square(x)).logabsdet,
    "cholesky": lambda x, w, i: torch.linalg.cholesky(symmetric(x)) + torch.linalg.cholesky(symmetric(x), upper=True),
    "triangular": lambda x, w, i: torch.linalg.solve_triangular(square(x).tril(), x[0, :, 4:8], upper=False),
    "triangular_right": lambda x, w, i: torch.linalg.solve_triangular(
        square(x).triu(), x[0, :, :4, :4], upper=True, left=False, unitriangular=True
    ),
    "eigenvalues": lambda x, w, i: torch.linalg.eigvalsh(symmetric(x)),
    "eigenvectors": lambda x, w, i: torch.linalg.eigh(symmetric(x)).eigenvectors.square(),
    "singular_values": lambda x, w, i: torch.linalg.svdvals(square(x)),
    "singular_vectors": lambda x, w, i: torch.linalg.svd(x[0, :, :4], full_matrices=False).U.square(),
    "qr": lambda x, w, i: torch.linalg.qr(square(x)).R.square(),
    "matrix_exp": lambda x, w, i: torch.linalg.matrix_exp(square(x)),
    "fourier": lambda x, w, i: torch.view_as_real(torch.fft.rfft2(x, norm="ortho") + torch.fft.fft2(x)[..., :5]),
    "fourier_back": lambda x, w, i: (
        torch.fft.irfft(torch.complex(x, x.cos()), n=9) + torch.fft.ifft2(torch.complex(x, x), s=(9, 9)).real
    ),
    "polar": lambda x, w, i: torch.view_as_real(torch.polar(x.abs(), x)) + torch.complex(x, -x).angle()[..., None],
    "medians": lambda x, w, i: x.median(2).values + x.kthvalue(3, 2).values + x.median(),
    "buckets": lambda x, w, i: torch.bucketize(x, x[0, 0, :, 0].sort().values, right=True),
    "searched": lambda x, w, i: torch.searchsorted(x[0, 0].sort().values, x[1, 0]),
    "searched_by": lambda x, w, i: torch.searchsorted(w[0, 0, 0], w[1], side="right", sorter=w[0, 0, 0].argsort()),
    "scatter_mean": lambda x, w, i: w.scatter_reduce(0, grid(i), w * 2, "mean"),
    "scatter_mean_alone": lambda x, w, i: w.scatter_reduce(0, grid(i), w * 2, "mean", include_self=False),
    "scatter_max_alone": lambda x, w, i: w.scatter_reduce(0, grid(i), w * 2, "amax", include_self=False),
    "windows": lambda x, w, i: x.unfold(2, 3, 2)[:, :, :, :6] + x.unfold(-1, 3, 1)[:, :, :4],
    "take": lambda x, w, i: w.take(grid(i) * 3),
    "bilinear": lambda x, w, i: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear_aligned": lambda x, w, i: F.interpolate(x, size=(5, 11), mode="bilinear", align_corners=True),
    "linear": lambda x, w, i: F.interpolate(x[0], size=13, mode="linear"),
    "trilinear": lambda x, w, i: F.interpolate(x[None], size=(3, 5, 9), mode="trilinear"),
    "nearest_down": lambda x, w, i: F.interpolate(x, scale_factor=0.6),
    "nearest_1d": lambda x, w, i: F.interpolate(x[0], scale_factor=1.7),
    "nearest_exact": lambda x, w, i: F.interpolate(x, size=(5, 11), mode="nearest-exact"),
    "bicubic": lambda x, w, i: F.interpolate(x, size=(12, 6), mode="bicubic"),
    "replicate": lambda x, w, i: F.pad(x, (1, 2, 3, 0), mode="replicate") + F.pad(x[0], (1, 2), mode="replicate").sum(),
    "replicate3d": lambda x, w, i: F.pad(x, (1, 2, 3, 0, 0, 1), mode="replicate"),
    "distances": lambda x, w, i: torch.cdist(x[0], x[0, :, :5]) + torch.cdist(x[0], x[1, :, :5], p=1.5),
    "distances_1": lambda x, w, i: torch.cdist(x[0], x[1], p=1) + torch.cdist(x[0], x[1], p=float("inf")),
    "bilinear_layer": lambda x, w, i: F.bilinear(x[0, 0, :, :4], x[1, 0, :, :3], w[:, :, 0]),
    "bessel": lambda x, w, i: torch.special.i0e(x) + torch.special.i1e(x) + torch.special.i0(x) + torch.special.i1(x),
    "normal_quantiles": lambda x, w, i: torch.special.ndtri(x.sigmoid()),
    "divisors": lambda x, w, i: torch.gcd(i * 6, i * 4 + 2) + torch.lcm(i + 1, i + 3),
    "reflect": lambda x, w, i: F.pad(x, (1, 2, 1, 0), mode="reflect"),
}


def grid(i: Tensor) -> Tensor:
    """Indices [6, 4, 3, 3] below 6, some twice."""
    return i[:, None, None, None].expand(6, 4, 3, 3)


def square(x: Tensor) -> Tensor:
    """Matrices [4, 4, 4] far from singular."""
    return x[0, :, :4, :4] / 4 + torch.diag(torch.linspace(1, 2, 4, dtype=x.dtype))


def symmetric(x: Tensor) -> Tensor:
    return square(x) @ square(x).mT


def written(x: Tensor, w: Tensor) -> Tensor:
    """A copy, written to in place."""
    x = x.clone()
    x[0, 1:, 2] = w[0, 0, 0, 0]
    x[:, 0].mul_(3)
    return x


def layer_arguments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64)
    return x, w, torch.randint(0, 6, (6,), generator=generator)


@pytest.mark.usefixtures("unoptimized_xla")
def test_layers() -> None:
    for seed in range(2):
        compare(all_layers, *layer_arguments(seed), rtol=1e-10, atol=1e-12)


def all_layers(x: Tensor, w: Tensor, i: Tensor) -> dict[str, Tensor]:
    return {name: layer(x, w, i) for name, layer in LAYERS.items()}


REAL_LAYERS = [name for name, value in all_layers(*layer_arguments(0)).items() if value.is_floating_point()]


@pytest.mark.usefixtures("unoptimized_xla")
@pytest.mark.parametrize("name", REAL_LAYERS)
def test_derivatives_of_layers(name: str) -> None:
    """Of one function: by autograd, by `torch.func.grad` inside JAX, and by `jax.grad`."""

    def loss(parts: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        value = LAYERS[name](*parts, rows)
        return (value * torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).reshape(value.shape)).sum()

    x, w, rows = layer_arguments(3)
    expected = grad(loss)((x, w), rows)
    arguments = to_jax(((x, w), rows))
    for gradient in (to_jax_function(grad(loss)), jax.grad(to_jax_function(loss))):
        got = to_torch(jax.jit(gradient)(*arguments))
        for a, b in zip(got, expected, strict=True):
            # XLA has polygamma and the inverse error function to fewer digits.
            rtol, atol = (1e-7, 1e-7) if name == "special" else (1e-9, 1e-10)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def smooth() -> list[str]:
    whole = ("argmax", "argmin", "isnan", "isinf", "isfinite", "logical", "signbit", "to_int", "to_long", "to_bool")
    whole = (*whole, "floor_divide", "any", "all", "eq", "ne", "lt", "le", "gt", "ge", "argmax_all")
    return [name for name in all_floating_point() if not name.startswith(whole)]


@pytest.mark.usefixtures("unoptimized_xla")
@pytest.mark.parametrize("name", smooth())
def test_derivatives(name: str) -> None:
    """At plain values, and where the derivative is a matter of convention."""
    function = all_floating_point()[name]
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = x * 0.9, y.abs() + 0.5
    x[0] = torch.tensor([0.0, -0.5, 0.25, 2.0], dtype=x.dtype)
    if name.rstrip("_") in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "acosh", "pow", "reciprocal"):
        x = x.abs() + 1.5
    if name.rstrip("_") in ("pow_half", "pow_minus_1", "pow_minus_2", "pow_1.7", "rdiv", "asin", "acos", "atanh"):
        x = x.abs() / 4 + 0.1

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = function(x, y)
        return (value * torch.linspace(0.5, 2, value.numel(), dtype=torch.float64).reshape(value.shape)).sum()

    for argument in (0, 1):
        expected = grad(loss, argnums=argument)(x, y)
        got = to_torch(jax.jit(jax.grad(to_jax_function(loss), argument))(*to_jax((x, y))))
        # PyTorch's derivative of hardsigmoid has 1/6 in float32.
        torch.testing.assert_close(got, expected, rtol=1e-7 if name == "hardsigmoid_" else 1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["maximum", "minimum", "fmax", "fmin"])
def test_derivatives_of_equal_numbers(name: str) -> None:
    function = lambda x, y: (getattr(torch, name)(x, y) * torch.tensor([1.0, 2.0])).sum()  # noqa: E731
    x = torch.tensor([3.0, -1.0])
    got = jax.grad(to_jax_function(function), (0, 1))(to_jax(x), to_jax(x))
    for a, b in zip(to_torch(got), grad(function, (0, 1))(x, x.clone()), strict=True):
        assert torch.equal(a, b)


# What `test_jax_op_db` tests, with its families, or `op_coverage.py` alone.
OF_THE_TABLE = {
    "_adaptive_avg_pool3d",
    "_adaptive_avg_pool3d_backward",
    "_linalg_eigvals",
    "_pdist_backward",
    "_pdist_forward",
    "_upsample_bicubic2d_aa",
    "_upsample_bicubic2d_aa_backward",
    "_upsample_bilinear2d_aa",
    "_upsample_bilinear2d_aa_backward",
    "_upsample_nearest_exact1d_backward",
    "_upsample_nearest_exact3d_backward",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_backward",
    "avg_pool3d",
    "avg_pool3d_backward",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "frexp",
    "grid_sampler_2d",
    "grid_sampler_2d_backward",
    "grid_sampler_3d",
    "grid_sampler_3d_backward",
    "histc",
    "igamma",
    "igammac",
    "index_reduce",
    "linalg_eig",
    "linalg_householder_product",
    "linalg_lu",
    "linalg_lu_factor_ex",
    "linalg_lu_solve",
    "linalg_pinv",
    "lu_unpack",
    "masked_scatter_backward",
    "max_pool3d_with_indices",
    "max_pool3d_with_indices_backward",
    "mode",
    "nanmedian",
    "nextafter",
    "nonzero_static",
    "ormqr",
    "special_airy_ai",
    "special_bessel_j0",
    "special_bessel_j1",
    "special_bessel_y0",
    "special_bessel_y1",
    "special_chebyshev_polynomial_t",
    "special_chebyshev_polynomial_u",
    "special_chebyshev_polynomial_v",
    "special_chebyshev_polynomial_w",
    "special_erfcx",
    "special_hermite_polynomial_h",
    "special_hermite_polynomial_he",
    "special_laguerre_polynomial_l",
    "special_legendre_polynomial_p",
    "special_modified_bessel_i0",
    "special_modified_bessel_i1",
    "special_modified_bessel_k0",
    "special_modified_bessel_k1",
    "special_scaled_modified_bessel_k0",
    "special_scaled_modified_bessel_k1",
    "special_shifted_chebyshev_polynomial_t",
    "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v",
    "special_shifted_chebyshev_polynomial_w",
    "special_spherical_bessel_j0",
    "special_zeta",
    "triangular_solve",
    "upsample_nearest3d_backward",
}


def test_every_lowering_is_tested_here() -> None:
    device = torch.device("cpu")
    real, image, kernel = (TensorSpec(s, torch.float32, device) for s in ((3, 4), (2, 4, 9, 8), (6, 4, 3, 3)))
    i, j, k, rows = (TensorSpec(s, torch.int64, device) for s in ((5,), (3, 4), (), (6,)))
    whole = TensorSpec((3, 4), torch.int32, device)

    def gradients(x: Tensor, w: Tensor, rows: Tensor) -> Any:
        return [grad(lambda x, w, name=name: LAYERS[name](x, w, rows).sum(), (0, 1))(x, w) for name in REAL_LAYERS]

    used = set()
    for function, *specs in (
        (lambda x, y: [f(x, y) for f in all_floating_point().values()], real, real),
        (lambda x, y: [f(x, y) for f in INTEGER.values()], whole, whole),
        (movement, real, real, i, j, k),
        (all_layers, image, kernel, rows),
        (gradients, image, kernel, rows),
    ):
        with sdpa_kernel(SDPBackend.MATH):
            used |= set(trace_step(function, optree.tree_structure(tuple(0 for _ in specs)), specs).operations)
    untested = {*LOWERINGS, *COMPOSED} - used
    assert untested == OF_THE_TABLE, sorted(untested ^ OF_THE_TABLE)


def test_numbers_as_tensors_without_axes() -> None:
    def function(x: Tensor, n: Tensor) -> dict[str, Tensor]:
        return {
            "softmax": x.softmax(0),
            "log_softmax": x.log_softmax(-1),
            "flip": x.flip(0),
            "cummax": torch.cummax(x, 0).values,
            "sort": n.sort().values,
            "digamma": torch.digamma(torch.stack([x * 0, -(x * 0), x])),
            "sign": (n > 2).sign(),
        }

    compare(function, torch.tensor(1.5), torch.tensor(3), rtol=1e-5)


def test_running_extremes_keep_nan() -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, 2.0, 5.0, torch.nan, 0.0])
    names = ("largest", "its place", "smallest", "its place, too")
    compare(lambda x: dict(zip(names, (*torch.cummax(x, 0), *torch.cummin(x, 0)), strict=True)), x, rtol=0)


@pytest.mark.parametrize(("dtype", "other"), [("float32", "int32"), ("float32", "int16"), ("uint8", "bfloat16")])
def test_bits_seen_as_another_dtype(dtype: str, other: str) -> None:
    x = (torch.arange(8) * 3 - 5).to(getattr(torch, dtype))
    compare(lambda x: {"bits": x.view(getattr(torch, other))}, x, rtol=0)


def test_unsigned_shifts_fill_with_zeros() -> None:
    x = torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8)
    compare(lambda x: {"right": x >> 1, "left": x << 1}, x, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint8", "int16", "bool"])
def test_small_dtypes(dtype: str) -> None:
    x = (torch.arange(12).reshape(3, 4) - 3).to(getattr(torch, dtype))

    def function(x: Tensor) -> dict[str, Tensor]:
        return {"sum": x.sum(0), "where": torch.where(x > 1, x, x[0]), "product": x * x, "float": x.float() / 3}

    compare(function, x, rtol=1e-2)
