"""Statistics that several processes share: every rank brings its own batch, and all end with the same statistics.

As `popart_func.art` and `popart_func.popart`, of all ranks' targets together: the result is that of one process on the
joined batch, up to rounding, however many ranks there are and however the targets lie among them. It is bit-identical
on every rank, if ``state`` is. For that, each rank gathers every rank's moments, three numbers for each task, and joins
them in the order of the ranks.

These are collectives: all ranks of the group call them together, with the same number of tasks, the same dtype of
targets and the same options. A rank without targets calls with none, ``targets[:0]``; a rank that raises an error, or
does not call, leaves the others waiting. Lanes are `torch.vmap`s outside, as ever, and share one collective.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from popart_func import _torch, pop_art
from popart_func._checks import Reduction, check_count, check_hyper_parameters, check_sum_of_samples, is_known
from popart_func._typing import Integer, Num, Scalar
from popart_func.moments import Moments, join, moments
from popart_func.pop_art import PopArt, PopArtState

__all__ = ["art", "popart"]


def art(
    state: PopArtState,
    targets: Num[Tensor, "..."],
    indices: Integer[Tensor, "..."] | None = None,
    *,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
    group: dist.ProcessGroup | None = None,
) -> PopArtState:
    """Moves the statistics toward the targets of all ranks, as `popart_func.art` does toward those of one.

    ``"mean"`` and ``"sum"`` gather three numbers for each task from every rank. ``"sequential"`` takes the targets of
    rank 0, then those of rank 1, and so on; it gathers them all, and can't be traced, for it must know how many these
    are.

    Args:
        state: the statistics, the same on every rank.
        targets: this rank's targets; how many may differ from rank to rank, and may be none.
        indices: the task of each target. A task that no rank has keeps its entries to the bit.
        step_size: as in `popart_func.art`; so are the others.
        scale_lb: least scale.
        scale_ub: greatest scale.
        reduction: how the joined batch acts.
        bias_correction: forget the start values at once.
        group: the ranks that take part; all by default.

    Returns:
        The statistics, bit-identical on every rank.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: as `popart_func.art`; or this process is not in the group.
        ValueError: as `popart_func.art`.
    """
    caller = "distributed.art"
    check_hyper_parameters(caller, step_size, scale_lb, scale_ub, reduction)
    group = _checked_group(caller, group)
    state, targets, indices = pop_art.prepare(caller, state, targets, indices)
    options: dict[str, Any] = {
        "step_size": step_size,
        "scale_lb": scale_lb,
        "scale_ub": scale_ub,
        "reduction": reduction,
        "bias_correction": bias_correction,
    }
    if reduction == "sequential":
        sizes = _gathered(torch.tensor(targets.shape[0], device=targets.device), group).tolist()
        joined = None if indices is None else _joined(indices, sizes, group)
        return pop_art.art(state, _joined(targets, sizes, group), joined, **options)
    own = moments(state.shift, state.residue, targets, indices)
    batch = join(Moments(*_gathered(torch.stack(own), group).unbind(1)))
    if reduction == "sum" and not isinstance(step_size, Tensor) and is_known(batch.samples):
        check_sum_of_samples(caller, step_size, int(batch.samples.max()))
    return pop_art.art_from_moments(state, batch, **options)


def popart(
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
    group: dist.ProcessGroup | None = None,
) -> PopArt:
    """`popart_func.popart` with the statistics of all ranks: heads that are equal on every rank stay so.

    Any learner takes it. Its gradients are those of this rank's batch: averaging them is the caller's affair.

    Args:
        num_outputs: the number of tasks; 1 for one statistic shared by all outputs.
        step_size: as in `art`; so are the others.
        scale_lb: least scale.
        scale_ub: greatest scale.
        reduction: how the joined batch acts.
        bias_correction: forget the start values at once.
        group: the ranks that take part; all by default.

    Raises:
        RuntimeError, TypeError, ValueError: as `art` and `popart_func.pop`.
    """
    check_count("distributed.popart", "num_outputs", num_outputs)
    check_hyper_parameters("distributed.popart", step_size, scale_lb, scale_ub, reduction)
    return pop_art.with_art(
        partial(
            art,
            step_size=step_size,
            scale_lb=scale_lb,
            scale_ub=scale_ub,
            reduction=reduction,
            bias_correction=bias_correction,
            group=group,
        ),
        num_outputs,
    )


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, all of one shape, stacked in the order of the ranks."""
    return _all_gather(own, group.group_name, group.size())


# An operator of its own, for torch.vmap has no rule for the collective: it would make one for each lane, and in
# torch.compile not wait for them.
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


def _joined(own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, ``sizes`` of them, one rank after the other."""
    padded = torch.cat([own, own.new_zeros(max(sizes) - own.shape[0], *own.shape[1:])])
    return torch.cat([rows[:size] for rows, size in zip(_gathered(padded, group), sizes, strict=True)])


def _checked_group(caller: str, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise RuntimeError(
            f"{caller}: torch.distributed is not initialized. Call torch.distributed.init_process_group first, or, for "
            f"one process, use popart_func.art and popart_func.popart."
        )
    chosen = dist.group.WORLD if group is None else group
    if isinstance(chosen, dist.ProcessGroup):
        return chosen
    # new_group gives a number to the processes that it leaves out.
    got = "one without this process" if isinstance(chosen, int) else type(group).__name__
    raise TypeError(f"{caller}: `group` must be a ProcessGroup that this process is in, or None, got {got}.")
