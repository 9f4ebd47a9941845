"""`auto` runs tensors without memory of their own, and contexts that see each operation, on eager for any length."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import new_process
import pytest
import torch
import torch._dynamo
import torch.autograd.forward_ad as fa
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from popart_func._torch import FakeTensor, FakeTensorMode
from popart_func.engines import ENGINES, EngineUnavailableError, UnsupportedError, available_engines, scan, scan_lanes
from popart_func.engines.only_eager import FREED, why_tensor_needs_eager
from popart_func.engines.selection import _say_once
from popart_func.interop.jax import to_jax_function

COMPILED = [name for name in ENGINES if name != "eager" and available_engines()[name] is None]
LENGTHS = [10, 400, 500, 600]

pytestmark = [
    pytest.mark.skipif("native" not in COMPILED, reason="no C++ compiler"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*MaskedTensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Plain(Tensor):
    """A subclass that changes nothing."""


class Counts(TorchFunctionMode):
    """Counts the functions that are called."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def total(xs: Tensor, engine: str = "auto", start: Tensor | None = None, factor: Any = 1.0) -> Tensor:
    start = torch.zeros(()) if start is None else start
    return scan(lambda c, x: (c + factor * x, ()), start, xs, engine=engine)[0]


def inside_a_step(steps: int, engine: str) -> Tensor:
    xs = torch.ones(steps)
    return scan_lanes(lambda c, x: (total(xs, engine, c), ()), torch.zeros(1), torch.ones(600))[0][0] / 600


def inside_to_jax_function(steps: int, engine: str) -> Tensor:
    return torch.tensor(float(to_jax_function(lambda xs: total(xs, engine))(jnp.ones(steps))))


def closed_over_in_vmap(steps: int, engine: str) -> Tensor:
    return vmap(lambda factor: total(torch.ones(steps), engine, factor=factor))(torch.tensor([1.0, 2.0]))[0]


def closed_over_in_grad(steps: int, engine: str) -> Tensor:
    return grad(lambda factor: total(torch.ones(steps), engine, factor=factor))(torch.tensor(3.0))


def closed_over_in_jvp(steps: int, engine: str) -> Tensor:
    one = torch.tensor(1.0)
    return jvp(lambda factor: total(torch.ones(steps), engine, factor=factor), (one,), (one,))[1]


def dual_carry(steps: int, engine: str) -> Tensor:
    with fa.dual_level():
        dual = fa.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        return fa.unpack_dual(total(torch.ones(steps), engine, dual)).tangent * steps


def closed_over_dual(steps: int, engine: str) -> Tensor:
    with fa.dual_level():
        dual = fa.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        return fa.unpack_dual(total(torch.ones(steps), engine, factor=dual)).tangent


def jit_trace(steps: int, engine: str) -> Tensor:
    return torch.jit.trace(lambda xs: total(xs, engine), torch.zeros(steps))(torch.ones(steps))


def make_fx_trace(steps: int, engine: str) -> Tensor:
    return make_fx(lambda xs: total(xs, engine))(torch.zeros(steps))(torch.ones(steps))


def dispatch_mode(steps: int, engine: str) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        scan(lambda c, x: (c @ c, ()), torch.ones(1, 1), torch.ones(steps), engine=engine)
    return torch.tensor(counter.get_total_flops() / 2)


def function_mode(steps: int, engine: str) -> Tensor:
    with Counts() as counts:
        total(torch.ones(steps), engine)
    return torch.tensor(float(min(counts.calls, steps)))


def anomaly_mode(steps: int, engine: str) -> Tensor:
    with torch.autograd.set_detect_anomaly(True):
        return total(torch.ones(steps), engine)


def subclass(steps: int, engine: str) -> Tensor:
    return total(torch.ones(steps).as_subclass(Plain), engine)


def sparse(steps: int, engine: str) -> Tensor:
    return total(torch.ones(steps).to_sparse(), engine)


def symbolic_zero(steps: int, engine: str) -> Tensor:
    return total(torch.ones(steps), engine, torch._efficientzerotensor(()))


CASES = [
    *(inside_a_step, inside_to_jax_function, closed_over_in_vmap, closed_over_in_grad, closed_over_in_jvp),
    *(dual_carry, closed_over_dual, jit_trace, make_fx_trace, dispatch_mode, function_mode, anomaly_mode),
    *(subclass, sparse, symbolic_zero),
]


@pytest.mark.parametrize("case", CASES)
def test_auto_gives_the_same_for_any_length(case: Callable[[int, str], Tensor]) -> None:
    """Each case returns the number of steps."""
    unrolled = case in (inside_a_step, inside_to_jax_function, jit_trace, make_fx_trace)  # which takes long
    for steps in LENGTHS[::2] if unrolled else LENGTHS:
        assert case(steps, "auto") == steps


@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_engine_is_refused(case: Callable[[int, str], Tensor], engine: str) -> None:
    with pytest.raises(EngineUnavailableError, match=rf"'{engine}' can't do this: .* Use the engine 'eager'"):
        case(3, engine)


IN_TORCH_COMPILE = """
import torch
from popart_func import scan
for steps in (10, 600):
    compiled = torch.compile(lambda xs: scan(lambda c, x: (c + x, ()), torch.zeros(()), xs)[0], backend="eager")
    assert compiled(torch.ones(steps)) == steps
"""


@pytest.mark.slow
def test_inside_torch_compile() -> None:
    """In a process of its own, whose annotations are not enforced: TorchDynamo can't trace that."""
    result = new_process.run(IN_TORCH_COMPILE)
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_does_not_look_at_what_is_traced() -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert to_jax_function(grad(torch.sin))(0.0) == 1
        assert torch.is_anomaly_check_nan_enabled()


def test_no_gradient_under_hooks_of_saved_tensors() -> None:
    step = lambda c, x: (grad(torch.sin)(c) + x, ())  # noqa: E731
    for engine in ("eager", *COMPILED):
        with torch.autograd.graph.save_on_cpu(), pytest.raises(TypeError, match=r"^scan: .*Leave saved_tensors_hooks"):
            scan(step, torch.zeros(()), torch.ones(3), engine=engine)


def test_a_full_backward_hook_is_refused_by_name() -> None:
    module = torch.nn.Linear(1, 1)
    module.register_full_backward_hook(lambda *_: None)
    step = lambda c, _: (c + grad(lambda x: module(x).sum())(c), ())  # noqa: E731
    for engine in ("eager", *COMPILED):
        with pytest.raises(
            TypeError, match=r"^scan: an autograd.Function without `setup_context`.* full backward hook"
        ):
            scan(step, torch.ones(1), length=3, engine=engine)


def test_fake_tensors() -> None:
    for steps in LENGTHS:
        with FakeTensorMode() as mode:
            xs, start = torch.ones(steps), torch.zeros(())
            assert type(total(xs)) is FakeTensor
        with pytest.raises(EngineUnavailableError, match="can't read a FakeTensor, a subclass"):
            total(xs, "native", start)
        with mode:
            factor = torch.ones(())
        with pytest.raises(UnsupportedError, match="scan: the step closes over a tensor: it can't read a FakeTensor"):
            total(torch.ones(steps), "native", factor=factor)


def test_masked_tensors_and_freed_memory() -> None:
    for steps in LENGTHS:
        xs = torch.ones(steps)
        masked = masked_tensor(xs, xs > 0)
        with pytest.raises(EngineUnavailableError, match="can't read a MaskedTensor"):
            total(masked, "native")
        with pytest.raises(TypeError, match="MaskedTensor"):
            total(masked)
        xs.untyped_storage().resize_(0)
        with pytest.raises(EngineUnavailableError, match="memory has been freed"):
            total(xs, "native")
        with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
            total(xs)
    freed = torch.ones(())
    freed.untyped_storage().resize_(0)
    for engine in ("auto", *COMPILED):
        with pytest.raises(ValueError, match="scan: the step closes over a tensor whose memory has been freed"):
            total(torch.ones(600), engine, factor=freed)


def test_views_are_read_by_every_engine() -> None:
    """An expanded tensor has more elements than its storage, a tensor with gaps fewer."""
    for view in (torch.ones(1).expand(9), torch.ones(9, 4)[:, 2], torch.ones(18)[::2], torch.ones(3, 3).T[1]):
        assert why_tensor_needs_eager(view) is None
    gaps = torch.ones(18)[::2]
    gaps.untyped_storage().resize_(16 * gaps.itemsize)
    assert why_tensor_needs_eager(gaps) == FREED


def multiplies_sparse(carry: Tensor, x: Tensor) -> Any:
    return carry + (torch.eye(2).to_sparse() @ torch.ones(2, 1)).sum() * x / 2, ()


SPARSE = torch.eye(2).to_sparse()


def closes_over_sparse(carry: Tensor, x: Tensor) -> Any:
    return carry + (SPARSE @ torch.ones(2, 1)).sum() * x / 2, ()


LINE = r"in \S*test_only_eager.py:\d+: `return"


@pytest.mark.parametrize("step", [multiplies_sparse, closes_over_sparse])
def test_what_cannot_be_traced_runs_on_eager(step: Any) -> None:
    """However long it is; `auto` says why, once, with the line; a compiled engine refuses by name."""
    assert scan(step, torch.zeros(()), torch.ones(100))[0] == 100
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"^engine 'auto': scan: .*{LINE}.* Going on with eager"):
        assert scan(step, torch.zeros(()), torch.ones(600))[0] == 600
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine 'auto'")
        assert scan(step, torch.zeros(()), torch.ones(600))[0] == 600
    for engine in COMPILED:
        with pytest.raises((UnsupportedError, TypeError), match=rf"^scan: .*{LINE}"):
            scan(step, torch.zeros(()), torch.ones(3), engine=engine)


def test_an_error_of_the_step_stays_its_own() -> None:
    def step(carry: Tensor, x: Tensor) -> Any:
        return {}[carry.ndim], ()

    for engine in ("auto", *COMPILED, "eager"):
        with pytest.raises(KeyError):
            scan(step, torch.zeros(()), torch.ones(600), engine=engine)
