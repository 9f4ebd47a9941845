"""The native engine's layouts against PyTorch's own strides."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from popart_func.engines.native.layouts import (
    NotViewableError,
    StridedLayout,
    address,
    bounds,
    contiguous,
    expand_layout,
    permute_layout,
    reshape_layout,
    slice_layout,
)


def elements(layout: StridedLayout) -> Tensor:
    """The place of each element, counted one by one."""
    places = torch.full(layout.shape, layout.offset)
    for axis, (size, stride) in enumerate(zip(layout.shape, layout.strides, strict=True)):
        along = (torch.arange(size) * stride).reshape(-1, *(1 for _ in layout.shape[axis + 1 :]))
        places = places + along
    return places


def viewed(seed: int) -> tuple[StridedLayout, Tensor]:
    """A layout after some random views, and a tensor of places after the same views by PyTorch."""
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 4)))
    layout, tensor = contiguous(shape), torch.arange(math.prod(shape)).reshape(shape)
    for _ in range(draw.randint(0, 4)):
        rank = len(layout.shape)
        kind = draw.choice(["permute", "slice", "flip", "expand", "unsqueeze"])
        if kind == "permute":
            axes = draw.sample(range(rank), rank)
            layout, tensor = permute_layout(layout, axes), tensor.permute(axes)
        elif kind == "slice" and rank:
            axis = draw.randrange(rank)
            start, step = draw.randrange(layout.shape[axis]), draw.randint(1, 2)
            part = tensor[(*(slice(None) for _ in range(axis)), slice(start, None, step))]
            layout, tensor = slice_layout(layout, axis, start, part.shape[axis], step), part
        elif kind == "flip" and rank:
            axis = draw.randrange(rank)
            layout = slice_layout(layout, axis, layout.shape[axis] - 1, layout.shape[axis], -1)
            tensor = tensor.flip(axis)
        elif kind == "expand":
            shape = (draw.randint(1, 2), *(draw.randint(1, 3) if size == 1 else size for size in layout.shape))
            layout, tensor = expand_layout(layout, shape), tensor.expand(shape)
        elif kind == "unsqueeze":
            axis = draw.randint(0, rank)
            shape = (*layout.shape[:axis], 1, *layout.shape[axis:])
            layout, tensor = reshape_layout(layout, shape), tensor.reshape(shape)
    return layout, tensor


def test_views_show_the_elements_that_pytorch_shows() -> None:
    for seed in range(400):
        layout, tensor = viewed(seed)
        assert layout.shape == tensor.shape, seed
        assert torch.equal(elements(layout), tensor), seed


def test_bounds_are_the_lowest_and_the_highest_place() -> None:
    for seed in range(400):
        layout, tensor = viewed(seed)
        assert bounds(layout) == (tensor.min(), tensor.max()), seed


def test_the_address_is_the_place_of_an_element() -> None:
    for seed in range(400):
        layout, tensor = viewed(seed)
        names = [f"i{axis}" for axis in range(tensor.ndim)]
        for index in [tuple(0 for _ in tensor.shape), tuple(size - 1 for size in tensor.shape)]:
            assert eval(address(layout, names), dict(zip(names, index, strict=True))) == tensor[index], seed


def another_shape(seed: int, numel: int) -> tuple[int, ...]:
    draw, shape = random.Random(seed), []
    while numel > 1 or draw.random() < 0.3:
        size = draw.choice([size for size in range(1, numel + 1) if numel % size == 0])
        shape.append(size)
        numel //= size
    return tuple(draw.sample(shape, len(shape)))


def test_reshapes_as_pytorch_does_or_says_that_no_strides_do() -> None:
    done = {True: 0, False: 0}
    for seed in range(1000):
        layout, tensor = viewed(seed)
        shape = another_shape(seed, tensor.numel())
        try:
            got = reshape_layout(layout, shape)
        except NotViewableError:
            done[False] += 1
            # PyTorch can't either. It has no negative strides, so a flipped layout has nothing to be compared with.
            if all(stride >= 0 for stride in layout.strides):
                strided = torch.zeros(bounds(layout)[1] + 1).as_strided(*layout)
                with pytest.raises(RuntimeError, match="view size is not compatible"):
                    strided.view(shape)
            continue
        done[True] += 1
        assert got.shape == shape, seed
        assert torch.equal(elements(got), tensor.reshape(shape)), seed
    assert min(done.values()) > 100


@pytest.mark.parametrize(
    ("layout", "shape", "strides"),
    [
        (contiguous((6, 4)), (2, 3, 2, 2), (12, 4, 2, 1)),
        (contiguous((2, 3, 4)), (24,), (1,)),
        (StridedLayout((2, 1, 3), (3, 77, 1)), (6,), (1,)),  # the stride of an axis of length 1 means nothing
        (StridedLayout((4, 3), (1, 4)), (2, 2, 3), (2, 1, 4)),
        (StridedLayout((3,), (0,)), (3, 1), (0, 0)),  # expanded
        (StridedLayout((6,), (-1,), 5), (2, 3), (-3, -1)),  # flipped
        (StridedLayout((0, 3), (3, 1)), (3, 0, 2), (0, 2, 1)),
    ],
)
def test_reshapes_without_a_copy(layout: StridedLayout, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    assert reshape_layout(layout, shape) == StridedLayout(shape, strides, layout.offset)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (StridedLayout((4, 3), (1, 4)), (12,)),  # transposed
        (StridedLayout((2, 2), (4, 1)), (4,)),  # every other pair
        (StridedLayout((2, 6), (1, 2)), (3, 4)),  # an axis would span two runs
    ],
)
def test_a_reshape_that_needs_a_copy(layout: StridedLayout, shape: tuple[int, ...]) -> None:
    with pytest.raises(NotViewableError):
        reshape_layout(layout, shape)
