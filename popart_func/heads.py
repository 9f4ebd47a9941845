"""Where a network's heads are: their parameters by name, the axis of their outputs, and the statistic of each output.

A head is a layer that is affine in its inputs: a linear layer, an ensemble of them with leading axes, a convolution.
`Head` describes one; a name alone stands for the layer of that name in PyTorch's layout. Wherever a function takes
``head``, it takes a name, a `Head`, or a list of them:

- Heads that have as many outputs as the network each give all of its outputs, as the experts of a mixture whose weights
  sum to one do, or a head and its target network.
- Heads that together have as many outputs as the network give them one after the other, as an extrinsic and an
  intrinsic value do.

Outputs may share a statistic, such as all actions or all quantiles of a task: `Head.indices`, or ``groups`` of
`pop_art.popart`, name the statistic of each output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._checks import check_head_name, check_in_range
from popart_func._torch import is_plain
from popart_func.target_statistics import PopArtState

__all__ = ["Head", "HeadLike", "Layer", "as_heads", "find_layers", "locate_layers", "one_layer"]


class Head(NamedTuple):
    """A head in a network's flat parameters.

    Attributes:
        name: the layer, such as ``"critic.head"``; ``""`` where the parameters have no common prefix.
        indices: the statistic of each output, integers that broadcast to the bias. None: the outputs are the tasks, or
            all share the only one; or what ``groups`` of `pop_art.popart` says.
        axis: the axis of the outputs in the weight. None: that of the bias's last axis, counted from the left, as in
            ``[..., outputs, inputs]`` (or -2 without a bias). ``[inputs, outputs]`` needs -1.
        weight: the last part of the weight's name, such as ``"kernel"``.
        bias: the last part of the bias's name.
    """

    name: str
    indices: Tensor | None = None
    axis: int | None = None
    weight: str = "weight"
    bias: str = "bias"


HeadLike = str | Head | Sequence[str | Head]
"""A head, or a list of them."""


@dataclass(frozen=True)
class Layer:
    """A head's parameters, found and checked.

    Attributes:
        weight: the name of the weight.
        bias: the name of the bias, or None.
        outputs: the number of outputs, the size of the weight's output axis.
        axis: that axis, counted from the right: -2 for a linear layer.
        inputs_first: whether leading axes of the bias lie on the other side of the weight's inputs.
        indices: the statistic of each output, or None.
    """

    weight: str
    bias: str | None
    outputs: int
    axis: int
    inputs_first: bool
    indices: Tensor | None = None

    def at_outputs(self, state: PopArtState) -> PopArtState:
        """The shift, scale and residue of each output, to broadcast with the bias."""
        if self.indices is None:
            return state
        rows, shape = self.indices.reshape(-1).long(), self.indices.shape
        fields = (field.index_select(0, rows).reshape(shape) for field in (state.shift, state.scale, state.residue))
        shift, scale, residue = fields
        return state._replace(shift=shift, scale=scale, residue=residue)

    def along_weight(self, values: Tensor) -> Tensor:
        """Values of each output, ready to broadcast with the weight."""
        if self.inputs_first and values.ndim > 1:
            values = values.unsqueeze(-2)
        for _ in range(-1 - self.axis):
            values = values[..., None]
        return values


def as_heads(caller: str, head: HeadLike) -> tuple[Head, ...]:
    """The heads that ``head`` describes.

    Raises:
        TypeError: anything but a name, a `Head`, or a list of them.
    """
    given = (head,) if isinstance(head, str | Head) else head
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, str | Head) for one in given):
        raise TypeError(
            f"{caller}: `head` must be the name of a layer, a popart_func.Head, or a list of them, got {head!r}."
        )
    return tuple(Head(one) if isinstance(one, str) else one for one in given)


def find_layers(
    caller: str, params: Mapping[str, Tensor], heads: Sequence[Head], tasks: int, groups: Tensor | None = None
) -> list[Layer]:
    """The layers of heads in a network's flat parameters, with the statistic of each output.

    Args:
        caller: the function that the user called, which errors name.
        params: parameters by name.
        heads: the heads.
        tasks: the number of statistics.
        groups: the statistic of each output of the network.

    Raises:
        ValueError: a layer that is not there, has other parameters than a weight and a bias, or other outputs.
    """
    layers = locate_layers(caller, params, heads)
    found = list(zip(heads, layers, strict=True))
    open_ones = [layer for head, layer in found if head.indices is None]
    slices: dict[int, slice] = {}
    width = tasks if groups is None else groups.shape[-1]
    total = sum(layer.outputs for layer in open_ones)
    if len(open_ones) > 1 and tasks > 1 and total == width and (groups is None or groups.ndim == 1):
        start = 0
        for layer in open_ones:
            slices[id(layer)] = slice(start, start + layer.outputs)
            start += layer.outputs
    result = []
    for head, layer in found:
        indices = head.indices
        if indices is None and tasks > 1:
            indices = groups
            if id(layer) in slices:
                some = params[layer.weight]
                every = torch.arange(tasks, device=some.device) if groups is None else groups
                indices = every[slices[id(layer)]]
        result.append(_with_indices(caller, params, layer, tasks, indices))
    return result


def locate_layers(caller: str, params: Mapping[str, Tensor], heads: Sequence[Head]) -> list[Layer]:
    """The layers of heads, without the statistics of their outputs."""
    layers = []
    for head in heads:
        below = f"{head.name}."
        if head.name:
            own = {name: leaf for name, leaf in params.items() if name.startswith(below)}
        else:
            own = {name: leaf for name, leaf in params.items() if name in (head.weight, head.bias)}
        if head.name and not own:
            check_head_name(caller, params, head.name)
        layers.append(_located(caller, own, head))
    return layers


def one_layer(
    caller: str, params: Mapping[str, Tensor], tasks: int, indices: Tensor | None = None, axis: int | None = None
) -> Layer:
    """The layer whose parameters are all of ``params``, with any common prefix."""
    return _with_indices(caller, params, _located(caller, params, Head("", axis=axis)), tasks, indices)


_layers: dict[Any, Layer] = {}
"""The layers that have been found, by the arguments of `_layer_of`."""


def _located(caller: str, own: Mapping[str, Tensor], head: Head) -> Layer:
    """The layer of a head whose own parameters are known, without statistics."""
    told = tuple(own), tuple([leaf.shape for leaf in own.values()]), head.axis, head.weight, head.bias
    if not is_plain():  # a shape of a trace may have no hash
        return _layer_of(caller, *told)
    if told not in _layers:
        if len(_layers) > 1000:
            _layers.clear()
        _layers[told] = _layer_of(caller, *told)
    return _layers[told]


def _layer_of(
    caller: str, names: tuple[str, ...], shapes: Sequence[Sequence[int]], axis: int | None, weight: str, bias: str
) -> Layer:
    """The layer of a head, from the names and shapes of its parameters."""
    own = dict(zip(names, map(tuple, shapes), strict=True))
    weights = [name for name in names if name.rpartition(".")[2] == weight]
    prefix = weights[0].removesuffix(weight) if weights else ""
    behind = own.get(prefix + bias)
    if len(weights) != 1 or not own.keys() <= {weights[0], prefix + bias}:
        raise ValueError(
            f"{caller}: `params` must hold one linear layer, a {weight!r} and optionally a {bias!r}, got "
            f"{sorted(own)}. `split` cuts a network's parameters at its head."
        )
    name, size = weights[0], own[weights[0]]
    given = axis is not None
    if axis is None:
        axis = -2 if behind is None else len(behind) - 1 - len(size)
    elif axis >= 0:
        axis -= len(size)
    if len(size) < 2 or not -len(size) <= axis < 0 or (not given and axis == -1):
        raise ValueError(
            f"{caller}: {name!r} must have shape [..., outputs, inputs], or a Head must name the axis of its outputs, "
            f"got {size} beside {behind}."
        )
    expected = size[: len(size) + axis + 1]
    if behind is not None and (not behind or behind[-1] != size[axis] or (not given and behind != expected)):
        raise ValueError(f"{caller}: '{prefix + bias}' must have shape {expected} to go with '{name}', got {behind}.")
    inputs_first = axis == -1 and (behind is None or len(behind) < len(size))
    return Layer(name, None if behind is None else prefix + bias, size[axis], axis, inputs_first)


def _with_indices(caller: str, params: Mapping[str, Tensor], layer: Layer, tasks: int, indices: Tensor | None) -> Layer:
    """A layer with the statistic of each output, if they fit."""
    weight = params[layer.weight]
    if indices is None:
        if tasks not in (1, layer.outputs):
            raise ValueError(
                f"{caller}: '{layer.weight}' must have shape [..., outputs, inputs] with outputs = {tasks} tasks, "
                f"got {tuple(weight.shape)}. Where several outputs share a statistic, name that of each output: "
                f"`groups` of popart, `indices` of pop or of a Head."
            )
        return layer
    check_in_range(caller, "indices", indices, tasks)
    shape = weight.shape[: weight.ndim + layer.axis + 1] if layer.bias is None else params[layer.bias].shape
    if (
        indices.is_floating_point()
        or indices.ndim > len(shape)
        or any(size not in (1, other) for size, other in zip(reversed(indices.shape), reversed(shape), strict=False))
    ):
        raise ValueError(
            f"{caller}: the statistic of each output of '{layer.weight}' must be integers that broadcast to its "
            f"outputs, {tuple(shape)}, got {indices.dtype} of shape {tuple(indices.shape)}."
        )
    return Layer(layer.weight, layer.bias, layer.outputs, layer.axis, layer.inputs_first, indices)
