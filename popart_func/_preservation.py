"""Checks once that POP preserves a network's unnormalized outputs, and refuses a network where it does not.

POP is exact only where ``apply`` returns what the head returns: one linear layer, used once, with nothing behind it or
beside it, whose weights nothing else uses. That can't be seen in shapes. So the network runs twice, with a head and
with that head popped to other statistics, and its unnormalized outputs must be the same.

Parameters and inputs whose values can be read are taken as they are. Others (in `torch.vmap`, in `torch.func.grad`, in
an engine's trace, on a GPU) are replaced by random ones of their shapes and dtypes; the head always is. The network
runs in a thread of its own, outside of every transform and trace of the caller's.
"""

from __future__ import annotations

import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from popart_func._checks import is_known
from popart_func._networks import Network
from popart_func.heads import Layer, find_layers
from popart_func.models import Stateless
from popart_func.target_statistics import PopArtState

__all__ = ["check_not_tied", "check_preservation"]

_ALLOWED = 5e-3
"""The largest difference, relative to the outputs and the shift, that is rounding: networks may compute in bfloat16."""

_EXPECTED = "`apply` must return what the head {!r} returns, and nothing else may use its weights."

_MOST = 1024
_checked: dict[Hashable, None] = {}
"""The networks that have been checked, at most `_MOST`."""


def check_not_tied(network: Network) -> None:
    """Raises if a module says that its head shares weights with another layer: no values are needed for that."""
    pairs = list(network.apply._aliases.items() if isinstance(network.apply, Stateless) else ())
    for head in network.heads:
        below = f"{head.name}."
        sides = [sorted(pair, key=lambda name: name.startswith(below)) for pair in pairs]
        others = [other for other, own in sides if own.startswith(below) and not other.startswith(below)]
        if others:
            raise ValueError(
                f"{network.caller}: POP does not preserve the outputs of `apply`: {_tied(head.name, others)}"
            )


def check_preservation(
    network: Network, params: Mapping[str, Tensor], x: Any, statistics: PopArtState, groups: Tensor | None = None
) -> None:
    """Raises if POP moves a network's unnormalized outputs; runs it twice, at the first call with a network and a head.

    A network that fails on random inputs, or returns nothing finite, is let through with a warning.

    Args:
        network: with a head.
        params: parameters and buffers by name.
        x: the input, a tree.
        statistics: the learner's: how many there are.
        groups: the statistic of each output; None: the outputs are the tasks, or all share one.

    Raises:
        ValueError: POP moves the outputs; the message says why, and what to do.
    """
    if torch.compiler.is_dynamo_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    ):
        return  # neither can run anything beside what it records; a call outside of it is checked
    shapes = tuple((name, tuple(leaf.shape)) for name, leaf in params.items())
    tasks = statistics.shift.shape[-1]
    heads = tuple((head.name, head.axis, head.indices is None) for head in network.heads)
    key: Hashable = (_identity(network.apply), heads, tasks, groups is None, shapes)
    # Where indices can't be read, as while tracing, one check stands for all of them.
    indices = [one for one in (groups, *(head.indices for head in network.heads)) if one is not None]
    keys = [key, (key, *map(_values, indices))] if indices and is_known(*indices) else [key]
    if keys[-1] in _checked:
        return
    leaves, structure = optree.tree_flatten(x)
    leaves = [_as_given(leaf) for leaf in leaves]
    given = {name: _as_given(leaf) for name, leaf in params.items()}
    groups = None if groups is None or tasks == 1 else groups.detach()
    layers = find_layers(network.caller, params, network.heads, tasks, groups)
    found: list[str | Exception | None] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(_why_moved(network, given, structure, leaves, tasks, layers, groups))
        except Exception as error:  # whatever the user's network raises on values that it was not made for
            found.append(error)

    thread = threading.Thread(target=run, name="popart_func-check", daemon=True)
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, str):
        raise ValueError(f"{network.caller}: POP does not preserve the outputs of `apply`: {result}")
    if len(_checked) >= _MOST:
        _checked.clear()
    _checked.update(dict.fromkeys(keys))
    if result is not None:
        warnings.warn(
            f"{network.caller}: whether POP preserves the outputs of `apply` could not be checked on random inputs: "
            f"{type(result).__name__}: {result}",
            stacklevel=2,
        )


def _as_given(leaf: Any) -> Any:
    """A tensor whose values can be read, or what makes one like it; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    if is_known(leaf):
        return leaf.detach().clone()
    device = torch.device("cpu") if leaf.device.type == "meta" else leaf.device
    return partial(_stand_in, tuple(leaf.shape), leaf.dtype, device)


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, positive: bool = False) -> Tensor:
    """Random floats; 0 for integers, which may be indices, and True for booleans, which may be masks."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.full(shape, dtype == torch.bool, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    drawn = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32, generator=generator)
    if positive:  # a vector of parameters or a buffer may be a variance
        drawn = drawn.abs() + 0.5
    elif len(shape) > 1:
        drawn = drawn / shape[-1] ** 0.5
    return drawn.to(dtype).to(device)


def _made(leaf: Any, **options: bool) -> Any:
    return leaf(**options) if isinstance(leaf, partial) and leaf.func is _stand_in else leaf


def _why_moved(
    network: Network,
    given: Mapping[str, Any],
    structure: Any,
    leaves: list[Any],
    tasks: int,
    layers: Sequence[Layer],
    groups: Tensor | None,
) -> str | None:
    """Why POP moves the outputs; None if it does not. Raises if that can't be told."""
    x = optree.tree_unflatten(structure, [_made(leaf) for leaf in leaves])
    matrices = _matrices(given)
    params = {name: _made(leaf, positive=name not in matrices) for name, leaf in given.items()}
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name is not None]
    shapes = {name: (tuple(params[name].shape), params[name].dtype, params[name].device) for name in names}
    head = {name: _stand_in(*shapes[name]) for name in names}
    has_bias = all(layer.bias is not None for layer in layers)

    random_state = _random_state(params)

    def outputs(head: Mapping[str, Tensor]) -> Tensor:
        try:
            return network.apply({**params, **head}, optree.tree_map(_copied, x))
        finally:
            random_state()  # dropout draws the same in each pass, and the user's own draws stay what they are

    before = outputs(head)
    size = float(torch.nan_to_num(before, 0, 0, 0).abs().max()) or 1.0
    # Powers of two, which no dtype rounds; another pair for each task, or outputs that are exchanged would not show.
    # The first moves the head's outputs far, into what may clip them.
    scale = torch.tensor([(0.125, 4.0, 0.5)[task % 3] for task in range(tasks)], device=before.device)
    shift = torch.tensor([(3.0, -2.0, 1.0, -1.0, 2.0)[task % 5] for task in range(tasks)], device=before.device)
    shift = shift * size * has_bias
    # POP from 0 and 1, by itself: a mistake in `pop_art.pop` is no fault of the network.
    popped = {}
    for layer in layers:
        own = slice(None) if layer.indices is None else layer.indices.long()
        popped[layer.weight] = (head[layer.weight] / layer.along_weight(scale[own])).to(head[layer.weight].dtype)
        if layer.bias is not None:
            popped[layer.bias] = ((head[layer.bias] - shift[own]) / scale[own]).to(head[layer.bias].dtype)
    after = outputs(popped)
    if groups is not None:
        scale, shift = scale[groups.long()], shift[groups.long()]
    was, now = before.double(), after.double() * scale + shift
    finite = was.isfinite() & now.isfinite()
    if not finite.any():
        raise ArithmeticError("the outputs are not finite.")
    moved = (now - was)[finite].abs().max()
    if moved <= _ALLOWED * float(was[finite].abs().max() + shift.abs().max()):
        return None
    name = " and ".join(one.name for one in network.heads)
    try:
        return _reason(name, layers, popped, outputs)
    except Exception:  # the network has run; why its outputs move is all that is open
        return f"they move with the statistics. {_EXPECTED.format(name)}"


def _reason(
    head: str, layers: Sequence[Layer], params: Mapping[str, Tensor], outputs: Callable[[Mapping[str, Tensor]], Tensor]
) -> str:
    """What is at fault, told from the outputs of heads without weights, which a sound network returns as they are."""
    if len(layers) > 1:
        return f"they move with the statistics. {_EXPECTED.format(head)}"
    other = "or use art_learner, which needs no head."
    # Of the popped head's size, so that what clips that one clips these.
    weight, bias_name = layers[0].weight, layers[0].bias
    if bias_name is not None:
        unit = params[bias_name].abs().max()
        bias = torch.arange(1.0, params[bias_name].shape[-1] + 1).to(unit) * unit
        bias = bias.expand(params[bias_name].shape)
        none = torch.zeros_like(params[weight])
        zero, once, other_way = (outputs({weight: none, bias_name: factor * bias}).double() for factor in (0, 1, -0.5))
        step = once - zero
        close = partial(torch.allclose, rtol=1e-2, atol=1e-2 * float(unit))
        if not close(2 * (zero - other_way), step):
            return (
                f"they are no linear function of the head {head!r}, so something is behind it, such as a softplus. Let "
                f"`apply` return what the head returns, and put the rest behind popart_func.unnormalize, {other}"
            )
        times = float((step / bias.double()).mean())
        if round(times) > 1 and close(step, round(times) * bias.double().expand_as(step)):
            return (
                f"the head {head!r} is used {round(times)} times in them, as in a sum over agents. Let `apply` return "
                f"what the head returns at one use, and add up what popart_func.unnormalize gives, {other}"
            )
        if not close(step, bias.double().expand_as(step)):
            return (
                f"they mix the outputs of the head {head!r} with one another, as a dueling head does. Let the last "
                f"linear layer give all outputs, {other}"
            )
        if not close(zero, torch.zeros_like(zero)):
            return (
                f"something else than the head {head!r} is added to them, a bypass. Let everything pass through the "
                f"head, such as by concatenating its inputs, {other}"
            )
    return _tied(head)


def _tied(head: str, others: Sequence[str] = ()) -> str:
    by = f" by {list(others)}" if others else ""
    return (
        f"the weights of the head {head!r} are used elsewhere in the network, too{by}, as tied weights are. Give the "
        f"head weights of its own, or use art_learner, which needs no head."
    )


def _matrices(given: Mapping[str, Any]) -> set[str]:
    """The names of the parameters with two axes or more."""
    return {name for name, leaf in given.items() if (len(leaf.args[0]) if isinstance(leaf, partial) else leaf.ndim) > 1}


def _random_state(params: Mapping[str, Tensor]) -> Callable[[], None]:
    """Notes the state of PyTorch's global generators; the function that it returns puts them back, where they moved."""
    devices = {leaf.device for leaf in params.values() if leaf.device.type == "cuda"}
    cpu, others = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

    def put_back() -> None:
        if not torch.equal(torch.get_rng_state(), cpu):  # another thread may draw: nothing is put back without need
            torch.set_rng_state(cpu)
        for device, state in others.items():
            torch.cuda.set_rng_state(state, device)

    return put_back


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _values(indices: Tensor) -> Hashable:
    return (indices.shape, *indices.reshape(-1).tolist())


def _identity(value: Any, depth: int = 0) -> Hashable:
    """A key that two functions share if they compute the same: they are one object, or one code with equal closures.

    A learner is often made inside a step, with a new function each time, which closes over tensors of that step.
    """
    inner = partial(_identity, depth=depth + 1)
    if depth < 5:  # a function may close over itself
        if isinstance(value, types.FunctionType):
            cells = [_cell(cell) for cell in value.__closure__ or ()]
            return (value.__code__, *map(inner, cells), *map(inner, value.__defaults__ or ()))
        if isinstance(value, types.MethodType):
            return (inner(value.__self__), value.__func__)
        if isinstance(value, partial):
            return (inner(value.func), *map(inner, value.args), *map(inner, value.keywords.values()))
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape))
    try:
        hash(value)
    except TypeError:  # such as a list, or a tuple with one inside
        return id(value)
    try:
        return weakref.ref(value)
    except TypeError:  # such as a number
        return value


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
