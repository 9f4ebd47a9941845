"""Every decomposition gives what the op that it replaces gives, over PyTorch's own samples and at special points."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from op_samples import op_entries, op_samples, with_special_values
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_leaves

import popart_func as pf
from popart_func._torch import TorchDispatchMode, schema
from popart_func.engines.tracing.decompositions import decomposition
from popart_func.interop.jax import to_jax, to_jax_function, to_torch

# Ops whose results have undefined values.
UNDEFINED = {"empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty"}
# An infinity, or -0 in `logit`, gives NaN in PyTorch's kernel and a number here, or the other way round: they subtract
# and divide in another order.
UNLIKE_AT_INFINITIES = {
    *("native_batch_norm", "native_batch_norm_backward", "_softmax_backward_data", "logit_backward"),
    "upsample_linear1d",
}
# Matrices of special values have no such factors. PyTorch's backward kernel of `grid_sampler_2d` writes outside of its
# memory where the grid is infinite, which ends the process.
SKIPPED_AT_SPECIAL_POINTS = (
    "nn.functional.grid_sample",
    "grid_sampler",
    "linalg",
    "svd",
    "eig",
    "cholesky",
    "lu",
    "qr",
    "pinverse",
    "matrix",
    "pca",
    "ldl",
    "geqrf",
)


class Compared(TorchDispatchMode):
    """Calls each op and its decomposition, and notes where they differ."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()
        self.differences: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        expected = func(*args, **kwargs)
        is_draw = torch.Tag.nondeterministic_seeded in func.tags
        if schema(func) is None or schema(func).is_mutable or is_draw or func.overloadpacket.__name__ in UNDEFINED:
            return expected
        replaced = decomposition(func)
        is_dense = all(leaf.layout == torch.strided for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if replaced is None or not is_dense:
            return expected
        if func.overloadpacket.__name__ in UNLIKE_AT_INFINITIES and any(map(is_extreme, tree_leaves(args))):
            return expected
        got = replaced(*args, **kwargs)
        if got is not NotImplemented:
            self.compared.add(func.name())
            pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
            self.differences += [
                f"{func}: {ours} for {theirs}, of {args} {kwargs}"
                for ours, theirs in pairs
                if isinstance(theirs, Tensor)
                and not (
                    ours.shape == theirs.shape
                    and ours.dtype == theirs.dtype
                    and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
                )
            ]
        return expected


def is_extreme(leaf: Any) -> bool:
    """Whether a tensor holds an infinity or -0."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return False
    return bool((leaf.isinf() | ((leaf == 0) & leaf.signbit())).any())


def compare(entry: Any, sample: Any, compared: Compared) -> None:
    """Calls an op and its gradient; what PyTorch itself refuses is left out."""
    leaves = [
        part.detach().clone().requires_grad_() if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in (sample.input, *sample.args)
    ]

    def forward_and_backward() -> None:
        results = [value for value in tree_leaves(entry.op(*leaves, **sample.kwargs)) if isinstance(value, Tensor)]
        results = [value for value in results if value.requires_grad and not value.is_complex()]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if results and inputs:
            torch.autograd.grad(results, inputs, [torch.ones_like(value) for value in results], allow_unused=True)

    try:
        forward_and_backward()
    except Exception:
        return
    with compared:
        forward_and_backward()


def check(entries: list[Any], most: int) -> set[str]:
    compared = Compared()
    for entry in entries:
        for sample in op_samples(entry, most):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compare(entry, sample, compared)
                if not entry.name.startswith(SKIPPED_AT_SPECIAL_POINTS):
                    compare(entry, with_special_values(sample), compared)
    assert compared.differences == []
    return compared.compared


def test_a_sample_of_the_decompositions() -> None:
    assert len(check(op_entries()[::8], 1)) > 30


@pytest.mark.slow
def test_all_decompositions() -> None:
    assert len(check(op_entries(), 12)) > 150


def test_a_wrong_decomposition_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda op: (lambda x: x * 2) if op is torch.ops.aten.sinc.default else None  # noqa: E731
    monkeypatch.setitem(globals(), "decomposition", wrong)
    with pytest.raises(AssertionError, match=r"aten\.sinc\.default"):
        check([entry for entry in op_entries() if entry.name == "sinc"], 2)


def test_the_gradient_of_smooth_l1_loss_keeps_nan() -> None:
    x = torch.tensor([torch.nan, 0.3, 2.0, -3.0, 1.0])
    compared = Compared()
    with compared:
        torch.autograd.grad(F.smooth_l1_loss(x.requires_grad_(), torch.zeros(5), beta=0.5), x)
    assert "aten::smooth_l1_loss_backward" in compared.compared
    assert compared.differences == []


MARGIN_TARGETS = (torch.tensor(0), torch.tensor([3, 0, -1, 1]), torch.tensor([3, 0, -1, 1]).expand(3, 4).contiguous())


def margin_losses(*xs: Tensor) -> dict[str, Tensor]:
    """Losses of a number, a vector and rows, with their slopes."""
    found = {}
    for x, target in zip(xs, MARGIN_TARGETS, strict=True):
        for reduction in ("none", "mean", "sum"):
            loss = functools.partial(F.multilabel_margin_loss, target=target, reduction=reduction)
            found[f"{reduction} of {x.ndim}"] = loss(x)
            found[f"slope of {reduction} of {x.ndim}"] = grad(lambda x, loss=loss: loss(x).sum())(x)
    return found


def test_multilabel_margin_loss_ends_at_the_first_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    xs = tuple(torch.randn(target.shape, generator=generator) for target in MARGIN_TARGETS)
    expected = margin_losses(*xs)
    step = lambda carry, xs: (carry, margin_losses(*xs))  # noqa: E731
    _, native = pf.scan_lanes(step, torch.zeros(1), tuple(x[None] for x in xs), shared=True, engine="native")
    in_jax = to_torch(jax.jit(to_jax_function(margin_losses))(*to_jax(xs)))
    for name, value in expected.items():
        torch.testing.assert_close(native[name][0, 0], value, msg=name)
        torch.testing.assert_close(in_jax[name], value, msg=name)
