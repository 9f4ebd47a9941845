"""Pop-Art: adaptively rescale targets (ART), preserve outputs precisely (POP).

A head's output is *normalized*, ``n = W h + b``; ``f(x) = σ n + μ`` is *unnormalized*. ART moves the statistics μ
(shift) and σ (scale) with the targets (`target_statistics`). POP moves the head so that f does not move. Both are pure
functions, written for one lane.

State: PopArtState(shift, scale, variance, count, residue), each ``[tasks]``
init:   popart(num_outputs, step_size).init() -> PopArtState
update: popart(num_outputs, step_size).update(params, state, targets, indices) -> (params, PopArtState)

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithm 1 and Proposition 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from popart_func._checks import Reduction, as_head_names, check_art_options, check_count, check_same_mean
from popart_func._typing import Integer, Num, Scalar
from popart_func.models import Params
from popart_func.target_statistics import (
    ArtOptions,
    Gather,
    PopArtState,
    art,
    art_with,
    init_state,
    normalize,
    unnormalize,
)

__all__ = [
    "Gather",
    "PopArt",
    "PopArtState",
    "Reduction",
    "art",
    "fold",
    "init_state",
    "normalize",
    "pop",
    "popart",
    "unnormalize",
]


@dataclass(frozen=True)
class PopArt:
    """Pop-Art as pure functions, made by `popart`: ``init, update = popart(...)``.

    Attributes:
        init: ``init(params=None) -> PopArtState``: the first statistics.
        art: ``art(state, targets, indices=None) -> PopArtState``: ART alone.
    """

    init: Callable[..., PopArtState]
    art: Callable[..., PopArtState]

    def update(
        self,
        params: Params,
        state: PopArtState,
        targets: Num[Tensor, "..."],
        indices: Integer[Tensor, "..."] | None = None,
    ) -> tuple[dict[str, Tensor], PopArtState]:
        """ART and POP: the popped head and the new statistics, *together*.

        Keeping one without the other moves every prediction.
        """
        new = self.art(state, targets, indices)
        return pop(params, state, new), new

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))


def pop(params: Params, old: PopArtState, new: PopArtState) -> dict[str, Tensor]:
    """Moves a head so that its unnormalized outputs stay where they are while the statistics move (POP).

    ``W' = (σ/σ') W`` and ``b' = (σ b + μ − μ') / σ'``. Everything that is normalized by the same statistics needs it:
    target networks, Polyak averages, every head of an ensemble.

    Args:
        params: one linear layer: ``"weight"`` ``[..., outputs, inputs]`` and ``"bias"`` ``[..., outputs]``, under
            these names or with a common prefix (``"critic.head.weight"``), as `models.split` cuts it. ``outputs`` is
            the number of tasks; a single task may be shared by all outputs.
        old: the statistics before.
        new: the statistics after.

    Returns:
        The head, same names, shapes and dtypes. Computed in the statistics' dtype.

    Raises:
        ValueError: not one layer, shapes that do not fit, or no bias while the shift moves (or may move: in a
            transform its value cannot be known).

    Source: the 2016 paper, Proposition 1.

    >>> import torch
    >>> old = init_state(1)
    >>> new = art(old, torch.tensor([1000.0]), step_size=0.1)
    >>> head = pop({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, old, new)
    >>> unnormalize(new, torch.ones(2) @ head["weight"].T + head["bias"])
    tensor([2.])
    """
    weight, bias = as_head_names("pop", params, old.shift)
    if old.shift.shape != new.shift.shape:
        raise ValueError(
            f"pop: `old` and `new` must have the same tasks, got shapes {tuple(old.shift.shape)} and "
            f"{tuple(new.shift.shape)}."
        )
    if bias is None:
        check_same_mean("pop", (old.shift, old.residue), (new.shift, new.residue))
    moved: dict[str, Tensor] = dict(params)
    ratio = old.scale / new.scale
    moved[weight] = (params[weight] * ratio[..., None]).to(params[weight].dtype)
    if bias is not None:
        difference = (old.shift - new.shift) + (old.residue - new.residue)
        # As in the equation, but written so that a task whose statistics stay keeps its bias to the bit.
        moved[bias] = (ratio * params[bias] + difference / new.scale).to(params[bias].dtype)
    return moved


def fold(params: Params, state: PopArtState) -> dict[str, Tensor]:
    """The head that gives unnormalized outputs directly, ``(σW, σb + μ)``: what POP preserves.

    Args:
        params: one linear layer, as in `pop`.
        state: its statistics.

    Returns:
        The folded head in the statistics' dtype. A head without bias gets one.

    >>> import torch
    >>> state = init_state(1)._replace(scale=torch.tensor([2.0]), shift=torch.tensor([7.0]))
    >>> fold({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, state)
    {'weight': tensor([[2., 2.]]), 'bias': tensor([9.])}
    """
    weight, bias = as_head_names("fold", params, state.shift)
    folded: dict[str, Tensor] = dict(params)
    folded[weight] = params[weight] * state.scale[..., None]
    if bias is None:
        bias = weight.removesuffix("weight") + "bias"
        folded[bias] = (state.shift + state.residue).expand(params[weight].shape[:-1])
    else:
        folded[bias] = (params[bias] * state.scale + state.residue) + state.shift
    return folded


def popart(
    num_outputs: int,
    step_size: Scalar,
    scale_lb: Scalar = 1e-4,
    scale_ub: Scalar = 1e6,
    *,
    reduction: Reduction = "mean",
    bias_correction: bool = False,
    gather: Gather | None = None,
) -> PopArt:
    """Pop-Art as two pure functions, ``init`` and ``update``.

    ``init(params=None)`` gives the first statistics: float64 where ``params`` are, else float32, on the device of
    ``params``. ``update(params, state, targets, indices=None)`` runs `art` and `pop` and returns the popped head and
    the new statistics *together*. ``popart(...).art(state, targets, indices=None)`` is ART alone.

    Args:
        num_outputs: the number of tasks; 1 for one statistic that all outputs share.
        step_size: β, see `art`; so are the others.
        scale_lb: least scale.
        scale_ub: greatest scale.
        reduction: how the targets of a batch act together.
        bias_correction: forget the start values at once.
        gather: brings the tensors of several processes together.

    Raises:
        ValueError, TypeError: as `art` and `pop`.

    Source: the 2016 paper, Algorithm 1, its first half.

    >>> import torch
    >>> init, update = popart(num_outputs=1, step_size=0.1)
    >>> head, state = update({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, init(), torch.tensor([1000.0]))
    >>> state.shift
    tensor([100.])
    """
    options = ArtOptions("popart", step_size, scale_lb, scale_ub, reduction, bias_correction, gather)
    check_count("popart", "num_outputs", num_outputs)
    check_art_options(*options[:5])

    def init(params: Params | None = None) -> PopArtState:
        if not params:
            return init_state(num_outputs)
        some = next(iter(params.values()))
        return init_state(num_outputs, dtype=some.dtype, device=some.device)

    return PopArt(init, partial(art_with, options))
