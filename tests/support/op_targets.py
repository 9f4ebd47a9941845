"""What an op of `op_db` is compared with: its function in JAX, or as a step of an engine, one step in two lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from op_comparison import Case, NotComparableError, stacked, two_lanes
from torch import Tensor

import popart_func as pf

__all__ = ["TARGETS", "as_one_step"]

Pairs = Iterable[tuple[Tensor, Tensor, Tensor | None]]
"""What came, what was expected, and the exact value if it is known."""


def _as_step(entry: Any, case: Case, stage: str, *, engine: str) -> Pairs:
    if stage != "value":
        raise NotComparableError(f"{stage} is for JAX only")
    return as_one_step([case], [two_lanes(case)], engine)[0]


def as_one_step(cases: list[Case], expected: list[list[Tensor]], engine: str) -> list[Pairs]:
    """Several samples as one step of `scan_lanes` in two lanes, whose xs are their arguments: one kernel for all."""

    def step(carry: Tensor, xs: tuple[Tensor, list[list[Tensor]]]) -> tuple[Tensor, list[list[Tensor]]]:
        return carry, [case.function(*given) for case, given in zip(cases, xs[1], strict=True)]

    xs = torch.zeros(1, 2), [[tensor[None] for tensor in stacked(case)] for case in cases]
    _, results = pf.scan_lanes(step, torch.zeros(2), xs, shared=False, engine=engine)
    return [
        [(got[0], value, None) for got, value in zip(of_case, values, strict=True)]
        for of_case, values in zip(results, expected, strict=True)
    ]


def _in_jax(entry: Any, case: Case, stage: str) -> Pairs:
    """With JAX's 64-bit types off, as they are at first, unless PyTorch gives float64 for arguments of 32 bits."""
    import jax

    wide = (torch.float64, torch.complex128)
    is_wide = any(value.dtype in wide for value in (*case.expected, *case.tensors))
    with jax.enable_x64(is_wide):
        return list(_compared_in_jax(entry, case, stage))


def _compared_in_jax(entry: Any, case: Case, stage: str) -> Pairs:
    import jax

    from popart_func.interop.jax import to_jax, to_jax_function, to_torch

    function = to_jax_function(case.function)
    arrays = to_jax(case.tensors, strict_dtype=False)
    if stage == "value":
        got = to_torch(jax.jit(function)(*arrays))
        exact = case.exact or [None] * len(case.expected)
        return zip(got, case.expected, exact, strict=True)
    if stage == "vmap":
        expected = two_lanes(case)
        if not case.tensors:
            raise NotComparableError("no tensor argument")
        got = to_torch(jax.jit(jax.vmap(function))(*to_jax(stacked(case), strict_dtype=False)))
        return [(a, b, None) for a, b in zip(got, expected, strict=True)]
    places = [place for place, tensor in enumerate(case.tensors) if tensor.is_floating_point() or tensor.is_complex()]
    loss = functools.partial(_loss, case, places)
    expected, exact = _gradients(entry, case, places, loss)
    reals = [arrays[place] for place in places]
    if stage == "gradient":
        slope = jax.grad(to_jax_function(loss), argnums=tuple(range(len(places))))
        got = [value.conj().resolve_conj() for value in to_torch(list(jax.jit(slope)(*reals)))]
        return zip(got, expected, exact, strict=True)
    generator = torch.Generator().manual_seed(3)
    tangents = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in expected]
    _, change = jax.jit(lambda x, v: jax.jvp(to_jax_function(loss), x, v))(tuple(reals), tuple(to_jax(tangents)))
    products = [(value.conj() * tangent).real for value, tangent in zip(expected, tangents, strict=True)]
    scale = sum(float(product.abs().sum()) for product in products)
    total = torch.tensor(sum(float(product.sum()) for product in products))
    is_noise = scale <= 1e-5 * sum(float(tangent.abs().sum()) for tangent in tangents)
    return [] if is_noise else [(to_torch(change) / scale, total / scale, None)]


def _loss(case: Case, places: list[int], *reals: Tensor) -> Tensor:
    """A weighted sum of all results, as a function of the real and complex arguments."""
    given = list(case.tensors)
    for place, value in zip(places, reals, strict=True):
        given[place] = value
    total = torch.zeros(())
    results = case.function(*given)
    for value in results[:1] if case.only_first else results:
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        if value.is_floating_point():
            weights = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
            total = total + (value * weights).sum()
    return total


def _gradients(entry: Any, case: Case, places: list[int], loss: Callable[..., Tensor]) -> Any:
    """The gradients by autograd, in float32 and exact."""
    if not entry.supports_autograd or not places:
        raise NotComparableError("no gradient in PyTorch")

    def by_autograd(widen: bool) -> list[Tensor]:
        dtypes = {torch.float32: torch.float64, torch.complex64: torch.complex128} if widen else {}
        leaves = [case.tensors[place] for place in places]
        leaves = [leaf.to(dtypes.get(leaf.dtype, leaf.dtype), copy=True).requires_grad_() for leaf in leaves]
        value = loss(*leaves)
        if not value.requires_grad:
            raise NotComparableError("no gradient in PyTorch")
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        pairs = zip(slopes, leaves, strict=True)
        return [torch.zeros_like(leaf) if slope is None else slope.resolve_conj().detach() for slope, leaf in pairs]

    try:
        expected = by_autograd(False)
    except RuntimeError as error:
        raise NotComparableError(f"PyTorch raises: {str(error).splitlines()[0]}") from error
    try:
        exact: list[Any] = by_autograd(True)
    except Exception:
        exact = [None] * len(expected)
    return expected, exact


TARGETS: dict[str, Callable[[Any, Case, str], Pairs]] = {
    "jax": _in_jax,
    **{engine: functools.partial(_as_step, engine=engine) for engine in ("native", "inductor", "eager")},
}
"""By name: the function that gives what came and what was expected."""
