"""The plain path of every layer: what PyTorch has beside it for speed, or to check values, is off while tracing.

Engines and JAX trace in the same way, whatever was switched on in the process before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, embedding_bag
from torch.overrides import TorchFunctionMode

from popart_func._torch import tells_libraries_of_a_trace, without_mkldnn
from popart_func.engines.tracing.batchable import Batchable
from popart_func.engines.tracing.zero_d_indices import ZeroDIndices

__all__ = ["further_paths", "plain_paths"]

further_paths: list[Callable[[], contextlib.AbstractContextManager[None]]] = []
"""What else is entered while a function is traced: `loops` adds how PyTorch's own loops are replaced."""


@contextlib.contextmanager
def plain_paths() -> Iterator[None]:
    """Within it, layers call ATen's general ops, and libraries hear that they are traced.

    Gradients are recorded: the graph is kept, and must not depend on the mode in which it was traced. Anomaly mode does
    not look for NaN in them, for they have no values.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), check_nan=False),
        tells_libraries_of_a_trace(),
        without_mkldnn(),
        sdpa_kernel(SDPBackend.MATH),
        _EmbeddingBags(),
        ZeroDIndices(),
        Batchable(),
        contextlib.ExitStack() as others,
    ):
        for other in further_paths:
            others.enter_context(other())
        yield


class _EmbeddingBags(TorchFunctionMode):
    """Replaces `embedding_bag`, which reads where its bags begin, by lookups and sums."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_bags if func is embedding_bag else func)(*args, **(kwargs or {}))


def _bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`embedding_bag` by a lookup of each row, and a reduction over the rows of each bag; an empty bag gives zeros."""
    if input.ndim == 2:
        bags, indices = input.shape[0], input.reshape(-1)
        owner = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    elif offsets is not None:
        bags, indices = offsets.shape[0] - include_last_offset, input
        places = torch.arange(input.shape[0], device=input.device)
        owner = (places.unsqueeze(-1) >= offsets[:bags]).sum(-1) - 1
    else:
        raise ValueError("embedding_bag: `offsets` must be given for indices of one axis.")
    rows = embedding(indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    is_counted = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        is_counted = indices != padding_idx % weight.shape[0]
    counts = is_counted.new_zeros(bags, dtype=rows.dtype).index_add(0, owner, is_counted.to(rows.dtype)).unsqueeze(-1)
    if mode == "max":
        members = (owner == torch.arange(bags, device=input.device).unsqueeze(-1)) & is_counted
        greatest = torch.where(members.unsqueeze(-1), rows, -torch.inf).max(1).values
        return torch.where(counts > 0, greatest, 0)
    kept = torch.where(is_counted.unsqueeze(-1), rows, 0)
    total = rows.new_zeros(bags, rows.shape[-1]).index_add(0, owner, kept)
    return total if mode == "sum" else total / counts.clamp(min=1)
