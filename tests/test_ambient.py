"""A graph holds for the settings under which it was traced, and is made by one thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optree
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional

from popart_func import random
from popart_func.engines import ENGINES, available_engines, compiler, scan, scan_lanes
from popart_func.engines.native.cpu import compile as cpu_compile
from popart_func.engines.tracing.ambient import ambient_settings
from popart_func.engines.tracing.step_graph import CacheKey, StepGraph, TensorSpec
from popart_func.engines.tracing.tracer import trace_step
from popart_func.interop.jax import to_jax_function

HERE = [
    pytest.param(name, marks=pytest.mark.slow) if name == "inductor" else name
    for name in ENGINES
    if available_engines()[name] is None
]
X = torch.tensor([[0.3, -1.7], [2.1, 0.9]])


@contextlib.contextmanager
def switched(get: Callable[[], Any], set_: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def attribute(owner: Any, name: str, value: Any) -> Any:
    return switched(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to another dtype": lambda: torch.autocast("cpu", torch.float16),
    "autocast on another device": lambda: torch.autocast("xpu", torch.float16),
    "deterministic algorithms": lambda: switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "filled memory": lambda: attribute(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "matmul precision": lambda: switched(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "matmul precision of MKL-DNN": lambda: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "precision of all backends": lambda: attribute(torch.backends, "fp32_precision", "tf32"),
    "order of einsum": lambda: attribute(torch.backends.opt_einsum, "enabled", False),
}


def traced(function: Callable[..., Any]) -> StepGraph:
    return trace_step(function, optree.tree_structure((X,)), [TensorSpec.of(X)])


@pytest.mark.filterwarnings("ignore:.*autocast.*")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_graph_holds_for_the_settings_of_its_trace(name: str) -> None:
    """Traced before, within and after: within, it is what the function means there; after, the first one again."""
    function = lambda x: (x @ x, torch.ones(2) / 3)  # noqa: E731
    before, settings = traced(function), ambient_settings()
    with SETTINGS[name]():
        assert ambient_settings() != settings
        within = traced(function)
        assert within is not before
        expected = [TensorSpec.of(part) for part in function(X)]
    assert list(within.outputs) == expected
    assert ambient_settings() == settings
    assert traced(function) is before


def test_recording_of_gradients_decides_no_graph() -> None:
    function = lambda x: x * (2 if torch.is_grad_enabled() else 3)  # noqa: E731
    graph = traced(function)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert traced(function) is graph


@pytest.mark.parametrize("engine", [*HERE, "JAX"])
def test_autocast_is_applied_where_the_step_says_only(engine: str) -> None:
    """A step without autocast within one that has it; each part is a way in which ops are called again later."""
    matrix = torch.linspace(-1, 1, 64).reshape(8, 8).sin()

    def body(carry: Tensor, _: Any) -> Any:
        carry = carry.clone()
        carry[0] = carry[1]
        return torch.tanh(carry @ matrix), ()

    def step(carry: Tensor, _: Any = None) -> Any:
        with torch.autocast("cpu", enabled=False):
            changed = carry.clone()
            changed[0] += 1
            looped = lambda x: scan(body, x, length=2)[0]  # noqa: E731
            if engine == "inductor":
                return carry, (changed @ matrix)
            return carry, (changed @ matrix, looped(changed), grad(lambda x: looped(x).sum())(carry))

    carry = matrix[None] * 3
    expected = scan_lanes(step, carry, length=1)[1]
    with torch.autocast("cpu", torch.bfloat16):
        if engine == "JAX":
            got = optree.tree_map(
                lambda leaf: torch.tensor(leaf.tolist())[None, None], to_jax_function(step)(jnp.asarray(carry[0]))[1]
            )
        else:
            got = scan_lanes(step, carry, length=1, engine=engine)[1]
    for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_mode_that_changes_functions_is_seen_each_time() -> None:
    """Such as `keyed`: a function that was traced under one key draws other numbers under the next."""
    in_jax = to_jax_function(functional.dropout)
    for seed in (0, 1, 0):
        with random.keyed(random.key(seed)):
            got = in_jax(jnp.ones(20))
        with random.keyed(random.key(seed)):
            assert got.tolist() == functional.dropout(torch.ones(20)).tolist()


def test_a_part_of_a_module_switches_its_mode() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).requires_grad_(False)
    module[1].eval()
    in_jax = to_jax_function(module)
    in_jax(jnp.ones(2))
    module[1].train()
    with pytest.raises(TypeError, match="random numbers can't be drawn"):
        in_jax(jnp.ones(2))
    module[1].eval()
    assert jax.numpy.allclose(in_jax(jnp.ones(2)), jnp.asarray(module(torch.ones(2)).numpy()))


@dataclass(frozen=True)
class Key(CacheKey[int]):
    pass


def test_one_thread_makes_what_others_wait_for() -> None:
    graph, made = traced(lambda x: x + 1), []

    def make() -> int:
        time.sleep(0.05)
        made.append(threading.get_ident())
        return len(made)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: graph.cached(Key(), make), range(8))) == [1] * 8


@pytest.mark.skipif(compiler.why_no_compiler() is not None, reason="no C++ compiler")
def test_one_thread_compiles_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Also where the threads have steps of their own that come to the same source."""
    monkeypatch.setenv("POPART_FUNC_CACHE", str(tmp_path))
    compiled, compile_in = [], cpu_compile._compile_in
    monkeypatch.setattr(cpu_compile, "_compile_in", lambda *args: compiled.append(args) or compile_in(*args))
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda _: cpu_compile.build(
                    'extern "C" __attribute__((visibility("default"))) int run() { return 0; }'
                ),
                range(8),
            )
        )
    assert len(compiled) == 1
