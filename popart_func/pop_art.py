"""Pop-Art: adaptively rescale targets (ART), preserve outputs precisely (POP).

A head's output is *normalized*, ``n = W h + b``; ``f(x) = σ n + μ`` is *unnormalized*. ART moves the statistics μ
(shift) and σ (scale) with the targets (`target_statistics`). POP moves the head so that f does not move. Both are pure
functions, written for one lane.

State: PopArtState(shift, scale, variance, count, residue), each ``[tasks]``
init:   popart(num_outputs, step_size).init() -> PopArtState
update: popart(num_outputs, step_size).update(params, state, targets, indices, weights) -> (params, PopArtState)

`popart` makes the two; `scales` has others that differ in what a scale is. A head may be anywhere in a network, have
several layers, and give several outputs that share a statistic: `heads`. `PopArt.update_network` moves everything that
is in a statistic's units at once: statistics, heads, target networks and the optimizer's moments.

Source: van Hasselt et al., *Learning values across many orders of magnitude* (2016), Algorithm 1 and Proposition 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor

from popart_func import _checks, optim
from popart_func._checks import Reduction
from popart_func._typing import Integer, Num, Scalar, Shaped
from popart_func.heads import Head, HeadLike, Layer, as_heads, find_layers, one_layer
from popart_func.models import Params
from popart_func.optim import gradient_factors, map_parameters
from popart_func.target_statistics import (
    ArtOptions,
    Gather,
    PopArtState,
    art,
    art_with,
    init_state,
    largest_normalized,
    normalize,
    unnormalize,
)
from popart_func.tree import PyTree

__all__ = [
    "Gather",
    "Head",
    "HeadLike",
    "PopArt",
    "PopArtState",
    "Reduction",
    "art",
    "fold",
    "init_like",
    "init_state",
    "normalize",
    "pop",
    "popart",
    "unnormalize",
]


@dataclass(frozen=True)
class PopArt:
    """Pop-Art as pure functions, made by `popart` or by one of `scales`: ``init, update = popart(...)``.

    Attributes:
        init: ``init(params=None) -> PopArtState``: the first statistics.
        art: ``art(state, targets, indices=None, weights=None) -> PopArtState``: ART alone.
        groups: the statistic of each output of the network, where several outputs share one, integers ``[outputs]``.
        bound: ``bound(count, share, samples, dtype)``, `target_statistics.largest_normalized`: Proposition 2's bound of
            a target that is ``share`` of the ``samples`` of its task; None where there is no bound.
        parts: how many numbers a target has, on an axis behind all others; 0 where it is one number, without an axis.
    """

    init: Callable[..., PopArtState]
    art: Callable[..., PopArtState]
    groups: Tensor | None = field(default=None, compare=False)
    bound: Callable[..., Tensor] | None = None
    parts: int = 0

    def update(
        self,
        params: Params,
        state: PopArtState,
        targets: Num[Tensor, "..."],
        indices: Integer[Tensor, "..."] | None = None,
        weights: Shaped[Tensor, "..."] | None = None,
    ) -> tuple[dict[str, Tensor], PopArtState]:
        """ART and POP of one linear layer: the popped head and the new statistics, *together*.

        Keeping one without the other moves every prediction. Arguments as in `art` and `pop`.
        """
        new = self.moved(state, targets, indices, weights)
        return pop(params, state, new, None if state.shift.shape[-1] == 1 else self.groups), new

    def update_network(
        self,
        params: Params | Sequence[Params],
        opt_state: PyTree,
        state: PopArtState,
        targets: Num[Tensor, "..."],
        indices: Integer[Tensor, "..."] | None = None,
        weights: Shaped[Tensor, "..."] | None = None,
        *,
        head: HeadLike = "output_linear",
        rescale_moments: bool | Literal["head", "all"] = True,
    ) -> tuple[Any, PyTree, PopArtState]:
        """ART and POP of a whole network: statistics, heads, target networks and the optimizer's moments, *together*.

        A training loop with a loss of its own calls this, takes the gradient of the loss of normalized targets
        (`normalize`), and calls the optimizer. For statistics that stand still during some epochs, call it once before
        them.

        Args:
            params: the flat parameters of a network; or several of them, the network and then its target networks
                and other copies, which are popped alike.
            opt_state: the state of the network's optimizer, of `optim` or of anything that `optim.register_state`
                knows; ``()`` for none.
            state: the statistics.
            targets: unnormalized targets, as in `art`. With ``groups``, their last axis may be the outputs.
            indices: the task of each target.
            weights: the weight of each target; 0 is absent.
            head: the name of the last layer, a `heads.Head`, or a list of them: see `heads`.
            rescale_moments: which moments follow into the new units: ``"head"`` or True, those of the heads; ``"all"``,
                also those below them, for one statistic only; False, none.

        Returns:
            ``(params, opt_state, state)``; of several networks, a tuple in the place of ``params``.

        Raises:
            TypeError, ValueError: as `art`, `pop` and `optim.rescale_moments`; `params` that are not flat
                parameters, an unknown ``rescale_moments``, an ``opt_state`` of another network.

        >>> import torch
        >>> from popart_func.optim import adam
        >>> params = {"body": torch.ones(2), "head.weight": torch.ones(1, 2), "head.bias": torch.zeros(1)}
        >>> art = popart(1, step_size=0.1)
        >>> parts = params, adam(0.1).init(params), art.init(params)
        >>> params, opt_state, state = art.update_network(*parts, torch.tensor([1000.0]), head="head")
        >>> state.scale * params["head.weight"].sum() + state.scale * params["head.bias"] + state.shift
        tensor([2.])
        """
        networks = (params,) if isinstance(params, Mapping) else params
        if not isinstance(networks, list | tuple) or not networks or not all(isinstance(n, Mapping) for n in networks):
            raise TypeError(
                "update_network: `params` must be the flat parameters of a network, or a list of at least one of them, "
                f"got {type(params).__name__}. `init_params` gives those of a module."
            )
        _checks.check_rescale_moments("update_network", rescale_moments)
        heads = as_heads("update_network", head)
        new = self.moved(state, targets, indices, weights)
        tasks = state.shift.shape[-1]
        layers = [find_layers("update_network", network, heads, tasks, self.groups) for network in networks]

        def pop_layers(held: Params, own: Sequence[Layer]) -> dict[str, Tensor]:
            moved = dict(held)
            for layer in own:
                if layer.weight in held or layer.bias in held:
                    moved.update(_popped("update_network", layer, held, state, new))
            return moved

        popped = tuple(map(pop_layers, networks, layers))
        if rescale_moments:
            factors, others = _gradient_factors(layers[0], state, new), None
            if rescale_moments == "all":
                (others,) = gradient_factors(state.scale / new.scale, (), ("others",)).values()
            opt_state = optim.rescale_moments(opt_state, factors, others, network=networks[0])
            opt_state = map_parameters(lambda held: pop_layers(held, layers[0]), opt_state)
        return popped[0] if isinstance(params, Mapping) else popped, opt_state, new

    def moved(
        self, state: PopArtState, targets: Tensor, indices: Tensor | None = None, weights: Tensor | None = None
    ) -> PopArtState:
        """ART alone. The last axis of the targets is the tasks, or the outputs of the network."""
        if indices is None and isinstance(targets, Tensor):
            indices = self.tasks_of(state, targets[..., 0] if self.parts and targets.ndim else targets)
        if weights is None:
            return self.art(state, targets, indices)
        return self.art(state, targets, indices, weights)

    def tasks_of(self, state: PopArtState, values: Tensor) -> Tensor | None:
        """The statistic of each value where the last axis is the network's outputs; None where it is the tasks."""
        if self.groups is None or state.shift.shape[-1] == 1 or values.shape[-1:] != self.groups.shape[-1:]:
            return None
        return self.groups

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))


def pop(
    params: Params,
    old: PopArtState,
    new: PopArtState,
    indices: Integer[Tensor, "..."] | None = None,
    *,
    axis: int | None = None,
) -> dict[str, Tensor]:
    """Moves a head so that its unnormalized outputs stay where they are while the statistics move (POP).

    ``W' = (σ/σ') W`` and ``b' = (σ b + μ − μ') / σ'``. Everything that is normalized by the same statistics needs it:
    target networks, Polyak averages, every head of an ensemble. `PopArt.update_network` does all of it.

    Args:
        params: one affine layer: ``"weight"`` ``[..., outputs, inputs]`` and ``"bias"`` ``[..., outputs]``, under
            these names or with a common prefix (``"critic.head.weight"``), as `models.split` cuts it. Also a
            convolution's ``[outputs, inputs, 1, 1]``. ``outputs`` is the number of tasks; a single task may be shared
            by all outputs.
        old: the statistics before.
        new: the statistics after.
        indices: the statistic of each output, integers that broadcast to the bias, where several outputs share one.
        axis: the axis of the outputs in the weight, where it is not that of `torch.nn`: -1 for ``[inputs, outputs]``.

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
    layer = one_layer("pop", params, old.shift.shape[-1], indices, axis)
    if old.shift.shape != new.shift.shape:
        raise ValueError(
            f"pop: `old` and `new` must have the same tasks, got shapes {tuple(old.shift.shape)} and "
            f"{tuple(new.shift.shape)}."
        )
    return {**params, **_popped("pop", layer, params, old, new)}


def _popped(caller: str, layer: Layer, params: Params, old: PopArtState, new: PopArtState) -> dict[str, Tensor]:
    """The popped weight and bias of a layer, by their names; of one of them where ``params`` hold only that one."""
    weight, bias = layer.weight, layer.bias
    if bias is None:
        _checks.check_same_mean(caller, (old.shift, old.residue), (new.shift, new.residue))
    old, new = layer.at_outputs(old), layer.at_outputs(new)
    ratio = old.scale / new.scale
    moved = {}
    if weight in params:
        moved[weight] = (params[weight] * layer.along_weight(ratio)).to(params[weight].dtype)
    if bias is not None and bias in params:
        difference = (old.shift - new.shift) + (old.residue - new.residue)
        # As in the equation, but written so that a task whose statistics stay keeps its bias to the bit.
        moved[bias] = (ratio * params[bias] + difference / new.scale).to(params[bias].dtype)
    return moved


def _gradient_factors(layers: Sequence[Layer], old: PopArtState, new: PopArtState) -> dict[str, Tensor]:
    """The factors by which POP changes the gradients of heads, in the layout of their parameters."""
    factors = {}
    for layer in layers:
        ratio = layer.at_outputs(old).scale / layer.at_outputs(new).scale
        factors[layer.weight] = layer.along_weight(ratio)
        if layer.bias is not None:
            factors[layer.bias] = ratio
    return factors


def fold(
    params: Params, state: PopArtState, indices: Integer[Tensor, "..."] | None = None, *, axis: int | None = None
) -> dict[str, Tensor]:
    """The head that gives unnormalized outputs directly, ``(σW, σb + μ)``: what POP preserves.

    Args:
        params: one affine layer, as in `pop`.
        state: its statistics.
        indices: the statistic of each output, as in `pop`.
        axis: the axis of the outputs in the weight, as in `pop`.

    Returns:
        The folded head in the statistics' dtype. A head without bias gets one.

    >>> import torch
    >>> state = init_state(1)._replace(scale=torch.tensor([2.0]), shift=torch.tensor([7.0]))
    >>> fold({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, state)
    {'weight': tensor([[2., 2.]]), 'bias': tensor([9.])}
    """
    layer = one_layer("fold", params, state.shift.shape[-1], indices, axis)
    weight, bias, state = layer.weight, layer.bias, layer.at_outputs(state)
    folded: dict[str, Tensor] = dict(params)
    folded[weight] = params[weight] * layer.along_weight(state.scale)
    if bias is None:
        bias = weight.removesuffix("weight") + "bias"
        shape = (layer.outputs,) if layer.axis == -1 else params[weight].shape[: params[weight].ndim + layer.axis + 1]
        folded[bias] = (state.shift + state.residue).expand(shape)
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
    groups: Integer[Tensor, " outputs"] | None = None,
) -> PopArt:
    """Pop-Art as two pure functions, ``init`` and ``update``.

    ``init(params=None)`` gives the first statistics: float64 where ``params`` are, else float32, on their device.
    ``update(params, state, targets, indices=None, weights=None)`` returns the popped head and the new statistics
    *together*. ``popart(...).art`` is ART alone; ``popart(...).update_network`` is for a network with its optimizer.

    Args:
        num_outputs: the number of tasks; 1 for one statistic that all outputs share.
        step_size: β, see `art`; so are the others.
        scale_lb: least scale.
        scale_ub: greatest scale.
        reduction: how the targets of a batch act together.
        bias_correction: forget the start values at once.
        gather: brings the tensors of several processes together.
        groups: the task of each output of the network, where several outputs share a statistic: for two tasks of three
            actions each, ``torch.tensor([0, 0, 0, 1, 1, 1])``.

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
    _checks.check_count("popart", "num_outputs", num_outputs)
    _checks.check_art_options(*options[:5])
    _checks.check_groups("popart", groups, num_outputs)
    bound = None if reduction == "sequential" else partial(largest_normalized, options)
    return PopArt(partial(init_like, num_outputs), partial(art_with, options), groups, bound)


def init_like(num_outputs: int, params: Params | None = None) -> PopArtState:
    """The first statistics, in the dtype and on the device of the parameters."""
    if not params:
        return init_state(num_outputs)
    some = next(iter(params.values()))
    return init_state(num_outputs, dtype=some.dtype, device=some.device)
