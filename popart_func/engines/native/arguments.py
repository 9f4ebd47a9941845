"""What a kernel is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Arguments", "Launch"]


class Arguments(NamedTuple):
    """A kernel's arguments; what one lane reads in one step is contiguous.

    Attributes:
        inputs: carry, xs, hyper-parameters, constants.
        lane_strides: of each input, in elements; 0 where all lanes share it.
        time_strides: of each input, in elements; 0 where it stays.
        outputs: carry ``[lanes, ...]`` and ys ``[steps, lanes, ...]``, contiguous.
        lanes: how many lanes.
        steps: how many time steps.
    """

    inputs: Sequence[Tensor]
    lane_strides: Sequence[int]
    time_strides: Sequence[int]
    outputs: Sequence[Tensor]
    lanes: int
    steps: int


Launch = Callable[[Arguments], int]
"""Runs a kernel and gives the bits of what was bad in any lane: `BAD_INDEX`, `BAD_DIVISOR`."""
