from __future__ import annotations

import pytest
import torch

from popart_func import tree
from popart_func.pop_art import init_state


def test_unstack_inverts_stack():
    trees = [{"b": torch.tensor([float(lane), 7.0]), "a": (torch.tensor(lane),)} for lane in range(3)]
    again = tree.unstack(tree.stack(trees))
    assert len(again) == 3
    for before, after in zip(trees, again, strict=True):
        assert torch.equal(before["b"], after["b"])
        assert torch.equal(before["a"][0], after["a"][0])


def test_stack_keeps_named_tuples():
    assert tree.stack([init_state(2), init_state(2)]).shift.shape == (2, 2)


def test_combine_inverts_partition():
    mixed = {"w": torch.ones(2), "n": torch.tensor(3), "inner": [torch.zeros(1), torch.tensor(True)]}
    floats, others = tree.partition(mixed, torch.is_floating_point)
    assert floats["n"] is None
    assert others["w"] is None
    together = tree.combine(floats, others)
    assert together["n"] is mixed["n"]
    assert together["inner"][0] is mixed["inner"][0]


def test_max_difference_sees_the_largest_leaf():
    a = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor([1, 2])}
    b = {"n": torch.tensor([1, 9]), "x": torch.tensor([1.5, 2.0])}
    assert tree.max_difference(a, b) == 7


def test_max_difference_of_nan_is_nan_and_of_equal_infinities_zero():
    infinite = torch.tensor([torch.inf])
    assert tree.max_difference(infinite, infinite) == 0
    assert torch.isnan(tree.max_difference(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])))


def test_max_difference_in_float64_is_not_rounded():
    a, b = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-15], dtype=torch.float64)
    assert 0 < tree.max_difference(a, b) < 2e-15


def test_max_difference_under_vmap():
    a, b = torch.zeros(3, 2), torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    assert torch.vmap(lambda x, y: tree.max_difference({"x": x}, {"x": y}))(a, b).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tree.stack([]), "stack: `trees` must hold at least one tree"),
        (
            lambda: tree.stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}]),
            r"stack: `trees\[1\]` must have the structure",
        ),
        (
            lambda: tree.unstack({"a": torch.ones(2), "b": torch.ones(3)}),
            r"share one leading axis, got shapes \[\(2,\)",
        ),
        (lambda: tree.unstack({"a": torch.tensor(1.0)}), "share one leading axis"),
        (lambda: tree.unstack({}), "share one leading axis"),
        (lambda: tree.combine({"a": torch.ones(1)}, {"a": torch.ones(1)}), "combine: a place holds a leaf in both"),
        (lambda: tree.max_difference({"a": torch.ones(1)}, {"b": torch.ones(1)}), "`second` must have the structure"),
        (lambda: tree.max_difference(torch.ones(2), torch.ones(1)), r"same shape, got \(2,\) and \(1,\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
