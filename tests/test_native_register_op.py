"""Ops that a user adds to the native engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native_scenarios import difference
from torch import Tensor

from popart_func.engines import native, scan_lanes
from popart_func.engines.native import Kernel, NotLoweredError, register_op
from popart_func.engines.native.ops import OPS

pytestmark = [
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("unchecked"),
]


@torch.library.custom_op("popart_tests::mix", mutates_args=())
def mix(x: Tensor, y: Tensor, weight: float = 0.5) -> list[Tensor]:
    """``x · weight + y``, and the sums of the rows of ``x yᵀ``."""
    return [x * weight + y, (x @ y.T).sum(-1)]


@mix.register_fake
def _(x: Tensor, y: Tensor, weight: float = 0.5) -> list[Tensor]:
    return [torch.empty_like(x), x.new_empty(x.shape[0])]


@mix.register_vmap
def _(info: Any, dims: Any, x: Tensor, y: Tensor, weight: float = 0.5) -> Any:
    lanes = [[part.select(axis, lane) for part, axis in zip((x, y), dims, strict=False)] for lane in range(info[0])]
    return [torch.stack(parts) for parts in zip(*(mix(*lane, weight) for lane in lanes), strict=True)], [0, 0]


def lower_mix(kernel: Kernel, outs: Any, x: Any, y: Any, weight: Any) -> Any:
    rows, columns = x.shape
    mixed = kernel.pointwise("{0} * {1} + {2}", outs[0].dtype, x, kernel.operand(weight, x.dtype), y)
    transposed = kernel.reshape(kernel.permute(y, [1, 0]), (1, columns, rows))
    products = kernel.matmul(kernel.reshape(x, (1, rows, columns)), transposed)
    return [mixed, kernel.reduce(products, [0, 2], "0", "{0} + {1}")]


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Leaves the table of ops as it was."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


def run(step: Any, engine: str) -> Any:
    generator = torch.Generator().manual_seed(8)
    carry = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    xs = torch.randn(6, 4, 3, 2, generator=generator, dtype=torch.float64)
    return scan_lanes(step, carry, xs, shared=False, engine=engine)


def test_a_custom_op_agrees_with_eager() -> None:
    def step(c: Any, x: Any) -> Any:
        mixed, _ = mix(c, x)
        return mixed, mix(c.flip(0), x + 1, weight=0.25)

    with pytest.raises(native.UnsupportedError, match="no op 'popart_tests::mix'"):
        run(step, "native")
    register_op("popart_tests::mix", lower_mix)  # the very same step now runs
    assert difference(run(step, "native"), run(step, "eager")) < 1e-14


def test_an_aten_op_that_the_engine_lacks() -> None:
    def step(c: Any, x: Any) -> Any:
        return c + x, torch.linalg.matrix_exp(c.reshape(-1)[:1, None].tanh())

    def matrix_exp(kernel: Kernel, out: Any, x: Any) -> Any:
        """The power series Σ xᵏ / k!, of a matrix of one number."""
        x = kernel.stored(x)
        total = term = kernel.operand(1.0, out.dtype)
        for k in range(1, 30):
            factor = kernel.operand(float(k), out.dtype)
            term = kernel.stored(kernel.pointwise("{0} * {1} / {2}", out.dtype, term, x, factor))
            total = kernel.stored(kernel.pointwise("{0} + {1}", out.dtype, total, term))
        return total

    register_op("aten::linalg_matrix_exp", matrix_exp)
    assert difference(run(step, "native"), run(step, "eager")) < 1e-12


def test_a_kernel_that_was_built_does_not_hide_a_replaced_op() -> None:
    def step(c: Any, x: Any) -> Any:
        return c, torch.tanh(x)

    assert difference(run(step, "native"), run(step, "eager")) < 1e-14
    register_op("tanh", lambda kernel, out, x: kernel.pointwise("{0} + 1", out.dtype, x), replace=True)
    assert difference(run(step, "native"), run(lambda c, x: (c, x + 1), "eager")) == 0


@pytest.mark.parametrize(
    ("name", "lower", "error", "message"),
    [
        (3, print, ValueError, "`op` must be an op of PyTorch or its name, 'namespace::name', got 3"),
        ("a b", print, ValueError, "`op` must be an op of PyTorch or its name, .* got 'a b'"),
        ("aten::i0", 3, TypeError, r"`lower` must be a function \(kernel, out, \*arguments\), got int"),
        ("no_such_op", print, ValueError, "`op` must be .*, got 'no_such_op': a custom op has to be defined before"),
        ("popart_tests::no", print, ValueError, "`op` must be .*, got 'popart_tests::no'"),
        ("addcmul", print, ValueError, "tracing replaces 'addcmul' by simpler ops, so that no step has it"),
        ("matmul", print, ValueError, "tracing replaces 'matmul' by simpler ops, so that no step has it"),
        ("aten::mul", print, ValueError, "native has the op 'mul' already: pass replace=True"),
        ("convolution", print, ValueError, "native has the op 'convolution' already: pass replace=True"),
    ],
)
def test_refuses_what_can_not_be_registered(name: Any, lower: Any, error: type[Exception], message: str) -> None:
    before = dict(OPS)
    with pytest.raises(error, match=f"register_op: .*{message}"):
        register_op(name, lower)
    assert before == OPS


@pytest.mark.parametrize(
    ("lower", "got"),
    [
        (lambda kernel, outs, x, y, weight: x, "got float64[3, 2]"),
        (lambda kernel, outs, x, y, weight: [x], "got [<"),
        (lambda kernel, outs, x, y, weight: [x, kernel.reshape(x, (6,))], "got [<"),
        (lambda kernel, outs, x, y, weight: None, "got None"),
        (lambda kernel, outs, x, y, weight: [x, kernel.cast(kernel.select(x, 1, 0), torch.float32)], "got [<"),
    ],
)
def test_says_what_a_lowering_must_return(lower: Any, got: str) -> None:
    register_op("popart_tests::mix", lower)
    with pytest.raises(TypeError) as caught:
        run(lambda c, x: (c, mix(c, x)[0]), "native")
    message = str(caught.value)
    assert "register_op: `lower` of 'popart_tests::mix' must return expressions of what the op returns" in message
    assert "float64[3, 2], float64[3]" in message
    assert "test_native_register_op.py" in message  # the line of the step
    assert got.replace("<", "") in message


def test_a_lowering_may_refuse_its_arguments() -> None:
    def lower(kernel: Kernel, outs: Any, x: Any, y: Any, weight: Any) -> Any:
        raise NotLoweredError(f"weight={weight}")

    register_op("popart_tests::mix", lower)
    with pytest.raises(native.UnsupportedError, match=r"'popart_tests::mix'.*: weight=0.75; .*test_native_register_op"):
        run(lambda c, x: (c, mix(c, x, 0.75)[0]), "native")


def test_says_what_the_compiler_refuses() -> None:
    register_op(
        "popart_tests::mix", lambda kernel, outs, x, y, weight: [kernel.pointwise("nonsense({0})", x.dtype, x)] * 2
    )
    with pytest.raises(TypeError, match="must return expressions"):
        run(lambda c, x: (c, mix(c, x)[0]), "native")
    register_op("linalg_matrix_exp", lambda kernel, out, x: kernel.pointwise("nonsense({0})", out.dtype, x))
    with pytest.raises(native.BuildError, match="nonsense"):
        run(lambda c, x: (c, torch.linalg.matrix_exp(x.reshape(-1)[:1, None])), "native")
