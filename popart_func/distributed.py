"""Statistics that several processes share: each brings its own batch, all end with the same statistics.

`art` and `popart` are those of `pop_art`, for the targets of all ranks together. The result is that of one process on
the joined batch, up to rounding, however many ranks there are and however the targets lie among them. Where ``state``
is bit-identical on every rank, so is the result: each rank gathers every rank's moments, three numbers for each task,
and joins them in the order of the ranks.

These are collectives. All ranks of the group call them together, with the same number of tasks, the same dtype of
targets and the same options. A rank without targets calls with none, ``targets[:0]``. A rank that raises an error, or
does not call, leaves the others waiting. Lanes, `torch.vmap` around the call, share one collective.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from popart_func import _torch, pop_art
from popart_func._typing import Integer, Num, Scalar, Shaped
from popart_func.pop_art import Gather, PopArt, PopArtState

__all__ = ["all_gather", "art", "popart"]


def art(
    state: PopArtState,
    targets: Num[Tensor, "..."],
    indices: Integer[Tensor, "..."] | None = None,
    weights: Shaped[Tensor, "..."] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> PopArtState:
    """`pop_art.art` with the targets of all ranks.

    ``"mean"`` and ``"sum"`` gather three numbers for each task from every rank. ``"sequential"`` takes the targets of
    rank 0, then those of rank 1, and so on. It gathers all of them and can't be traced, because it reads how many there
    are.

    Args:
        state: the statistics, the same on every rank.
        targets: this rank's targets. Their number may differ from rank to rank and may be 0.
        indices: the task of each target. A task that no rank has keeps its entries to the bit.
        weights: the weight of each target; all ranks give weights, or none does.
        group: the ranks that take part; all by default.
        **options: ``step_size`` and all others of `pop_art.art`, with the same meaning.

    Returns:
        The statistics, bit-identical on every rank.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: as `pop_art.art`; or this process is not in the group.
        ValueError: as `pop_art.art`.
    """
    return pop_art.art(state, targets, indices, weights, gather=all_gather(group), **options)


def popart(num_outputs: int, step_size: Scalar, *, group: dist.ProcessGroup | None = None, **options: Any) -> PopArt:
    """`pop_art.popart` with the statistics of all ranks: heads that are equal on every rank stay equal.

    Any learner takes it. A learner's gradients are those of this rank's batch: average them yourself.

    Args:
        num_outputs: the number of tasks; 1 for one statistic that all outputs share.
        step_size: β, see `pop_art.art`.
        group: the ranks that take part; all by default.
        **options: the other options of `pop_art.popart`, with the same meaning.

    Raises:
        RuntimeError, TypeError, ValueError: as `art` and `pop_art.pop`.
    """
    return pop_art.popart(num_outputs, step_size, gather=all_gather(group), **options)


def all_gather(group: dist.ProcessGroup | None = None) -> Gather:
    """The ``gather`` of `pop_art.art` and `pop_art.popart`: every rank's tensor, stacked in the order of the ranks.

    Args:
        group: the ranks that take part; all by default. It is looked up at each call.
    """
    return partial(_gathered, group)


def _gathered(group: dist.ProcessGroup | None, own: Tensor) -> Tensor:
    if not dist.is_initialized():
        raise RuntimeError(
            "distributed: torch.distributed is not initialized. Call torch.distributed.init_process_group first, or, "
            "for one process, use popart_func.art and popart_func.popart."
        )
    chosen = dist.group.WORLD if group is None else group
    if not isinstance(chosen, dist.ProcessGroup):
        # new_group gives a number to the processes that it leaves out.
        got = "one without this process" if isinstance(chosen, int) else type(group).__name__
        raise TypeError(f"distributed: `group` must be a ProcessGroup that this process is in, or None, got {got}.")
    return _all_gather(own, chosen.group_name, chosen.size())


# An operator of our own: `torch.vmap` has no rule for the collective (it would call one for each lane), and
# `torch.compile` would not wait for it.
@torch.library.custom_op(
    "popart_func::all_gather", mutates_args=(), schema="(Tensor own, str group, int ranks) -> Tensor"
)
def _all_gather(own: Tensor, group: Any, ranks: int) -> Tensor:
    return _torch.all_gather(own[None], group)


@_all_gather.register_fake
def _(own: Tensor, group: str, ranks: int) -> Tensor:
    return own.new_empty((ranks, *own.shape))


@_all_gather.register_vmap
def _(info: Any, in_dims: tuple[int, None, None], own: Tensor, group: str, ranks: int) -> tuple[Tensor, int]:
    return _all_gather(own.movedim(in_dims[0], 0), group, ranks), 1
