"""Changed surroundings of the library, such as a broken engine, and the checks of `verify` that must notice.

**To add one**, add an entry to `SURROUNDINGS`: what changes, the checks to run, and those that must fail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mutants import MUTANTS
from mutation import mutate, replace

from popart_func import target_statistics, verify
from popart_func.interop import from_jax, trees


class _Leak(torch.autograd.Function):
    """Adds a NaN of one lane to all lanes: a value that crosses `torch.vmap`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return x + 0 * x.sum(in_dims[0], keepdim=True), in_dims[0]


class _Alone(_Leak):
    """Changes values outside of `torch.vmap` only."""

    @staticmethod
    def forward(x):
        return x * 1.01

    @staticmethod
    def vmap(info, in_dims, x):
        return x.clone(), in_dims[0]


def through(function: type[torch.autograd.Function]) -> Callable[[pytest.MonkeyPatch], None]:
    """A patch that sends all targets through a function before they reach the statistics."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        art = target_statistics.art_with
        replace(
            monkeypatch,
            art,
            lambda options, state, targets, *rest: art(options, state, function.apply(targets), *rest),
        )

    return patch


def native_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the native engine compute atan for tanh."""
    from popart_func.engines.native.ops import OPS

    monkeypatch.setitem(OPS, "tanh", OPS["atan"])


def jax_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the lowering to JAX compute atan for tanh."""
    from popart_func.interop.lowerings import LOWERINGS

    monkeypatch.setitem(LOWERINGS, "tanh", LOWERINGS["atan"])


def doubled_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `from_jax` double its gradients."""
    pulled_back = from_jax._Flat.pulled_back

    def twice(flat: from_jax._Flat, outs: tuple[int, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda *tensors: tuple(2 * tensor for tensor in pulled_back(flat, outs)(*tensors))

    monkeypatch.setattr(from_jax._Flat, "pulled_back", twice)


def reversed_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverses the last axis of what goes to JAX."""
    to_array = trees.tensor_to_array
    monkeypatch.setattr(trees, "tensor_to_array", lambda tensor, copy: to_array(tensor.flip(-1), copy=copy))


def broken(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes one of `MUTANTS`."""
    return lambda monkeypatch: mutate(monkeypatch, MUTANTS[name])


SURROUNDINGS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], list[str], set[str]]] = {
    "a lane hears of its neighbours' NaN": (
        through(_Leak),
        ["lane_neighbours", "lane_alone", "algorithm_1"],
        {"lane_neighbours"},
    ),
    "a lane alone takes another way": (
        through(_Alone),
        ["lane_neighbours", "lane_alone", "algorithm_1"],
        {"lane_alone"},
    ),
    "the native engine has another tanh": (native_tanh, ["engine", "algorithm_1"], {"engine"}),
    "JAX has another tanh": (jax_tanh, ["jax", "jax_bridge", "algorithm_1"], {"jax", "jax_bridge"}),
    "gradients of JAX functions are doubled": (doubled_gradients, ["jax_bridge"], {"jax_bridge"}),
    "arrays in JAX are reversed": (reversed_arrays, ["jax_bridge"], {"jax_bridge"}),
    "a sum counts as a mean": (broken("a sum counts as a mean"), ["rlax", "offsets"], {"rlax"}),
    "POP's shift against rlax": (broken("the sign of POP's shift"), ["rlax", "offsets"], {"rlax"}),
}
"""By name: a function that patches the library, the checks to run, and those of them that must fail."""


OTHERS = set().union(*(red for _, _, red in SURROUNDINGS.values()))
"""The checks of the library against itself in other surroundings, or against rlax: only `SURROUNDINGS` break them."""


SINGLE = [name for name in verify.CHECKS if name not in OTHERS]
"""The checks that run on every mutant."""
