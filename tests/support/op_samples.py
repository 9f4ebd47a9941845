"""PyTorch's own table of ops with samples of their arguments, `op_db`, for tests of what replaces an op."""

from __future__ import annotations

import contextlib
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["SPECIAL", "all_samples", "op_entries", "op_samples", "with_special_values"]

# Without NaN: PyTorch's own kernels treat it in one way in their vector loops, and in another behind those.
SPECIAL = torch.tensor([0.0, 1.0, -1.0, torch.inf, 0.5, 0.5, -torch.inf, -0.0, 2.0, -3.0, 3.0, 6.0])


def op_entries() -> list[Any]:
    """The entries of `op_db` that have samples in float32."""
    if "expecttest" not in sys.modules:  # which PyTorch's test classes need, and its table does not
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db

    return [entry for entry in op_db if torch.float32 in entry.dtypes]


def all_samples(entry: Any) -> Iterator[Any]:
    """The samples of an entry, without gradients.

    `OpInfo.sample_inputs` takes most of a second for some: it looks for a test case in the stack at each sample.
    """
    return iter(entry.sample_inputs_func(entry, "cpu", torch.float32, False))


def op_samples(entry: Any, most: int) -> Iterator[Any]:
    """The first samples of an entry, without gradients; none where PyTorch itself fails to make them."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, sample in zip(range(most), all_samples(entry), strict=False):
            yield sample


def with_special_values(sample: Any) -> Any:
    """A sample with zeros, equal entries, kinks and infinities in the place of its values."""

    def special(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.layout != torch.strided:
            return value
        return SPECIAL.repeat(value.numel() // len(SPECIAL) + 1)[: value.numel()].reshape(value.shape)

    parts = tree_map(special, (sample.input, tuple(sample.args), sample.kwargs))
    return type(sample)(parts[0], args=parts[1], kwargs=parts[2])
