"""Every op of the native engine against PyTorch, on random shapes and on special values."""

from __future__ import annotations

import functools
from typing import Any

import native_scenarios as scenarios
import optree
import pytest
import torch
from op_cases import INTEGER, all_floating_point, movement
from op_families import FAMILIES, SHAPES
from torch import Tensor

from popart_func.engines import native
from popart_func.engines.native.ops import OPS
from popart_func.engines.tracing.step_graph import TensorSpec
from popart_func.engines.tracing.tracer import trace_step

pytestmark = pytest.mark.usefixtures("unchecked")
needs_compiler = pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def lanes_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """This schedule for any number of lanes; `test_native_elements` has the other one."""
    monkeypatch.setattr(native, "run", functools.partial(native.run, schedule="lanes"))


@needs_compiler
@pytest.mark.parametrize(("dtype", "shape"), scenarios.FLOATING_POINT)
def test_floating_point(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    scenarios.floating_point_ops_agree(dtype, shape)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers(dtype: torch.dtype) -> None:
    scenarios.integer_ops_agree(dtype)


@needs_compiler
def test_movement() -> None:
    scenarios.movement_agrees()


@needs_compiler
def test_movement_of_what_all_lanes_share() -> None:
    scenarios.movement_of_what_all_lanes_share_agrees()


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
    specs = [TensorSpec(shape, torch.float64, device) for shape in SHAPES.values()]
    for family in FAMILIES.values():
        used |= set(trace_step(family, optree.tree_structure(tuple(0 for _ in specs)), specs).operations)
    used |= {"as_strided_scatter", "new_empty_strided"}  # which eager mode can't batch, or whose values mean nothing
    assert {name for name in OPS if "::" not in name} <= used  # those of other libraries were registered by a test
