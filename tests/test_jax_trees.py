"""Trees across the bridge: values, memory, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from popart_func import optim, random
from popart_func.interop.jax import register_dataclass, to_jax, to_torch
from popart_func.learners import popart_learner
from popart_func.models import UnifiedModel, init_params, stateless
from popart_func.pop_art import popart

DTYPES = ["float32", "float16", "bfloat16", "int32", "int16", "int8", "uint8", "uint32", "bool", "complex64"]


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("copy", [True, False])
def test_every_dtype_both_ways(dtype: str, copy: bool) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.5, 1.5]]).to(getattr(torch, dtype))
    array = to_jax(x, copy=copy)
    assert array.dtype.name == dtype
    np.testing.assert_array_equal(np.asarray(array.astype("complex64")), x.to(torch.complex64).numpy())
    back = to_torch(array, copy=copy)
    assert back.dtype == x.dtype
    assert torch.equal(back.to(torch.complex64), x.to(torch.complex64))


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_64_bits(dtype: str) -> None:
    x = torch.arange(3).to(getattr(torch, dtype))
    with pytest.raises(TypeError, match=f"to_jax: JAX would narrow torch.{dtype} to {dtype[:-2]}32: cast it"):
        to_jax({"x": x})
    assert to_jax(x, strict_dtype=False).dtype.name == f"{dtype[:-2]}32"
    with jax.enable_x64(True):
        assert to_jax(x).dtype.name == dtype
        assert torch.equal(to_torch(to_jax(x)), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.tensor([1.0, 2.0]).expand(3, 2),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor(5.0),
        torch.zeros(0, 3),
        torch.ones(2, requires_grad=True),
        torch.tensor([1 + 2j]).conj().imag,
    ],
)
def test_every_kind_of_tensor(x: Tensor) -> None:
    for copy in (True, False):
        array = to_jax(x, copy=copy)
        np.testing.assert_array_equal(np.asarray(array), x.detach().resolve_conj().resolve_neg().numpy())
        assert torch.equal(to_torch(array, copy=copy), x.detach())


def test_memory_is_shared_only_when_asked_for() -> None:
    x = torch.arange(64.0)
    assert to_jax(x, copy=False).unsafe_buffer_pointer() == x.data_ptr()
    assert to_jax(x).unsafe_buffer_pointer() != x.data_ptr()
    array = jnp.arange(64.0)
    assert to_torch(array, copy=False).data_ptr() == array.unsafe_buffer_pointer()
    assert to_torch(array).data_ptr() != array.unsafe_buffer_pointer()
    copied = to_jax(x)
    x.mul_(2)
    assert float(copied[3]) == 3


@register_dataclass
@dataclasses.dataclass
class Weights:
    w: Any
    b: Any = None


@dataclasses.dataclass
class Unregistered:
    w: Any


def test_structures() -> None:
    tree = {"z": [Weights(torch.ones(2)), None], "a": ("text", 3, torch.zeros(1))}
    arrays = to_jax(tree)
    assert isinstance(arrays["z"][0], Weights)
    assert isinstance(arrays["z"][0].w, jax.Array)
    assert arrays["z"][1] is None
    assert arrays["a"][:2] == ("text", 3)
    assert torch.equal(to_torch(arrays)["z"][0].w, torch.ones(2))
    assert optree.tree_leaves(Weights(1, 2)) == jax.tree.leaves(Weights(1, 2)) == [1, 2]
    assert torch.equal(vmap(lambda weights: weights.w * 2)(Weights(torch.ones(2), torch.ones(2))), torch.ones(2) * 2)
    assert [leaf.dtype.name for leaf in to_jax((torch.ones(2) > 0).min(0), strict_dtype=False)] == ["bool", "int32"]
    for leaf in (torch.Size([2]), Unregistered("a setting")):
        assert to_jax({"leaf": leaf}) == {"leaf": leaf}


@pytest.mark.parametrize(
    "x",
    [
        np.ones(2, np.float32),
        np.arange(4.0)[::-1],
        np.float32(3),
        np.arange(3, dtype=">i4"),
        np.broadcast_to(np.float32(2), (3,)),
        np.ones((2, 3), jnp.bfloat16),
        np.ones(3, jnp.float8_e5m2.dtype),
        np.zeros((0, 2)),
    ],
)
def test_numpy_arrays(x: Any) -> None:
    for copy in (True, False):
        got = to_torch(x, copy=copy)
        assert tuple(got.shape) == np.shape(x)
        assert np.array_equal(got.double().numpy(), np.asarray(x).astype(np.float64))


def test_a_learners_state_passes_both_ways_to_the_bit() -> None:
    make = lambda: UnifiedModel(4, 5, 2)  # noqa: E731
    learner = popart_learner(stateless(make()), optim.adam(1e-2), popart(2, 0.1))
    state = learner.init(init_params(make, seed=3))
    for y in ([1e6, -3.0], [7.0, 2.0]):
        state, _ = learner.update(state, (torch.ones(4), torch.tensor(y)))
    back = to_torch(to_jax(state))
    assert optree.tree_structure(back) == optree.tree_structure(state)
    for a, b in zip(optree.tree_leaves(back), optree.tree_leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_keys() -> None:
    assert torch.equal(to_torch(jax.random.key(2**31 + 7)), random.key(2**31 + 7))
    assert torch.equal(to_torch(jax.random.split(jax.random.key(1), 3)), random.split(random.key(1), 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grad(lambda x: to_jax(x))(torch.tensor(1.0)), "to_jax: the values of a tensor inside torch.func.grad"),
        (lambda: vmap(lambda x: to_jax(x))(torch.ones(2)), "call a JAX function there through `from_jax`"),
        (lambda: jax.jit(lambda x: to_torch(x))(jnp.ones(2)), "to_torch: the values of an array inside jax.jit"),
        (lambda: to_jax(torch.ones(2).to_sparse()), "to_jax: a tensor must be dense, got the layout torch.sparse_coo"),
        (lambda: to_jax(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)), "JAX has no dtype for"),
        (lambda: to_jax(torch.ones(2, dtype=torch.complex32)), "JAX has no dtype for torch.complex32"),
        (lambda: to_jax(torch.ones(2, device="meta")), "to_jax: a tensor must be dense, got one on meta"),
        (lambda: to_jax(torch.nested.nested_tensor([torch.ones(1)])), "must be dense, got a nested one"),
        (
            lambda: to_jax([Unregistered(torch.ones(1))]),
            "to_jax: the dataclass Unregistered is not registered: u",
        ),
        (lambda: to_torch([Unregistered(jnp.ones(1))]), "to_torch: the dataclass Unregistered is not registered"),
        (lambda: to_torch(jax.random.key(0, impl="rbg")), "the keys of JAX's threefry2x32 only, got a key of rbg"),
        (lambda: to_torch(jnp.ones(2, "float4_e2m1fn")), "PyTorch has no dtype for JAX's float4_e2m1fn"),
        (lambda: to_torch(jnp.ones(2, "int4")), "PyTorch has no dtype for JAX's int4"),
        (
            lambda: to_jax({"net": torch.nn.Linear(1, 1)}),
            "to_jax: a module, Linear, is no pytree: take `dict.module.na",
        ),
        (lambda: to_jax(deque([torch.ones(1)])), "to_jax: a deque is no pytree to JAX: make it a list"),
        (lambda: to_jax(torch.zeros(2, dtype=torch.uint8).view(torch.uint1)), "JAX has no dtype for torch.uint1"),
        (lambda: register_dataclass(int), "register_dataclass: `cls` must be a dataclass, got <class 'int'>"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


WITHOUT_JAX = """
import sys
sys.modules["jax"] = None
import popart_func, popart_func.random
try:
    import popart_func.interop.jax
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_jax_the_extra_is_named() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_JAX], capture_output=True, text=True, check=True)
    assert (
        result.stdout.strip()
        == "popart_func.interop.jax needs 'jax', which is not installed: pip install 'popart-func[jax]'"
    )
