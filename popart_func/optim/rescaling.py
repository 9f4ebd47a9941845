"""What POP does to an optimizer's state: moments follow the gradients' units, averages of parameters follow the head.

A state is a NamedTuple that says of its fields how they scale with the gradients: `register_state` is open to anyone's.

| power | a field that holds, by name of the parameter | such as | after POP |
|---|---|---|---|
| 0 | what does not depend on the size of gradients | a count, Adadelta's sum of squared updates | stays |
| 1 | sums of gradients, or a largest gradient | momentum, Adam's first moment | times r |
| 2 | sums of squared gradients | Adam's second moment, Adagrad's sum | times r² |
| `PARAMETERS` | parameters, or what they decay toward | an average of parameters | popped |
| a function | anything else | Adafactor's column means | ``f(trees, factors)`` |

Here r = σ/σ' is the factor of a gradient, output by output: `gradient_factors`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from torch import Tensor

from popart_func._checks import check_factors
from popart_func.tree import PyTree

__all__ = ["PARAMETERS", "Power", "gradient_factors", "map_parameters", "register_state", "rescale_moments", "scaled"]

PARAMETERS = "parameters"
"""The power of a field that holds parameters."""

Leaves = Mapping[str, Tensor]
Power = int | str | Callable[[Mapping[str, Leaves], Mapping[str, Tensor]], Leaves]
"""How a field scales with gradients: 0, 1, 2, `PARAMETERS`, or a function of all fields and the gradients' factors."""

Cls = TypeVar("Cls", bound=type)


class _Kind(NamedTuple):
    """How to read and write the fields of a state, and the power of each; a field without one stays.

    ``powers`` may be a function of the state. ``unknown`` gives what may hold moments of an unknown power.
    """

    powers: Mapping[str, Power] | Callable[[Any], Mapping[str, Power]]
    read: Callable[[Any], Mapping[str, Any]]
    write: Callable[[Any, Mapping[str, Any]], Any]
    unknown: Callable[[Any], PyTree] = lambda state: ()

    def powers_of(self, state: Any) -> Mapping[str, Power]:
        """The power of each field of a state."""
        return self.powers(state) if callable(self.powers) else self.powers


_kinds: dict[type, _Kind] = {}


def register_state(cls: Cls, **powers: Power) -> Cls:
    """Says how the fields of an optimizer's state scale with gradients. With `functools.partial` also a decorator.

    Args:
        cls: the state, a NamedTuple. It may be another library's.
        **powers: field to power, see the module. A field that holds moments is a flat dict, name of the parameter to
            moment. A field that is not named stays as it is.

    Returns:
        ``cls``.

    >>> class Signs(NamedTuple):
    ...     last: dict[str, Tensor]
    >>> register_state(Signs, last=1) is Signs
    True
    >>> rescale_moments(Signs({"w": torch.tensor([3.0])}), {"w": torch.tensor(0.5)})
    Signs(last={'w': tensor([1.5000])})
    """
    fields = getattr(cls, "_fields", ())
    unknown = sorted(powers.keys() - set(fields))
    if not fields or unknown:
        raise TypeError(f"register_state: `cls` must be a NamedTuple with the fields {sorted(powers)}, got {cls!r}.")
    return register_entries(cls, powers, lambda state: state._asdict(), lambda state, new: state._replace(**new))


def register_entries(
    cls: Cls,
    powers: Mapping[str, Power] | Callable[[Any], Mapping[str, Power]],
    read: Callable[[Any], Mapping[str, Any]],
    write: Callable[[Any, Mapping[str, Any]], Any],
    unknown: Callable[[Any], PyTree] = lambda state: (),
) -> Cls:
    """`register_state` for a state whose entries are not its fields; see `_Kind`."""
    _kinds[cls] = _Kind(powers, read, write, unknown)
    return cls


def rescale_moments(
    state: PyTree, factors: Mapping[str, Tensor], others: Tensor | None = None, *, network: Iterable[str] = ()
) -> PyTree:
    """Rescales an optimizer's moments when the units of gradients change, as POP changes them.

    Where gradients become larger by a factor c, first moments become ``c m`` and second moments ``c² v``, as if all
    earlier gradients had been in the new units. States are found anywhere in ``state``. Counts and other numbers stay
    as they are.

    Args:
        state: of any transformation over a flat dict of parameters, made of NamedTuples that `register_state` knows.
        factors: name of a parameter to the factor of its gradient, of a shape that broadcasts with it. After POP,
            `gradient_factors` gives them.
        others: the factor of all parameters that ``factors`` does not name, a 0-d tensor; None for 1.
        network: the names of all parameters of the network. With them, ``factors`` may name parameters without moments,
            such as those of a frozen head.

    Returns:
        The state, with the named parameters' moments rescaled.

    Raises:
        TypeError: floats, bytes or objects that belong to no known state: whether they are moments is not known.
        ValueError: a name that the moments do not have; with ``network``, a state of another network; or
            an infinite factor, where it can be read (on the CPU, outside of transforms): it makes NaN of a moment of
            zero. A factor that is NaN makes its moments NaN.

    >>> from popart_func.optim import trace
    >>> state = trace(0.9).init({"w": torch.ones(1), "b": torch.ones(1)})
    >>> state.trace["b"] += 3
    >>> rescale_moments(state, {"b": torch.tensor(2.0)})
    MomentumState(trace={'w': tensor([0.]), 'b': tensor([6.])})
    """
    check_factors("rescale_moments", factors)
    seen: set[str] = set()
    averaged: set[str] = set()

    def rescale(path: tuple[Any, ...], part: Any) -> Any:
        kind = _kinds.get(type(part))
        if kind is None:
            _check_known(path, part)
            return part
        for place, leaf in enumerate(optree.tree_leaves(kind.unknown(part))):
            _check_known((*path, "unknown", place), leaf)
        trees = kind.read(part)
        new = {}
        for field, power in kind.powers_of(part).items():
            if field not in trees or power == 0:
                continue
            tree = trees[field]
            names = tree.keys() if isinstance(tree, Mapping) else ()
            (averaged if power == PARAMETERS else seen).update(names)
            if power == PARAMETERS:
                continue
            of_leaves = factors if others is None else {name: factors.get(name, others) for name in names}
            new[field] = power(trees, of_leaves) if callable(power) else scaled(tree, of_leaves, int(power))
        return kind.write(part, new) if new else part

    result = optree.tree_map_with_path(rescale, state, is_leaf=lambda part: type(part) in _kinds)
    network, missing = set(network), sorted(factors.keys() - seen)
    known = seen | averaged
    if known and network and known.isdisjoint(network):
        raise ValueError(
            f"rescale_moments: `state` must be that of an optimizer of the network, whose parameters are "
            f"{sorted(network)}, got one of {sorted(known)}. Make it by `init` of these parameters."
        )
    if seen and missing and not network:
        raise ValueError(f"rescale_moments: `factors` must name parameters, one of {sorted(seen)}, got {missing}.")
    return result


def scaled(moments: Leaves, factors: Mapping[str, Tensor], power: int) -> dict[str, Tensor]:
    """Moments times a power of the factors, in the moments' dtypes."""
    # Multiply twice: the square of a factor may overflow where the result does not.
    return {
        name: functools.reduce(torch.mul, [factors[name]] * power, moment).to(moment.dtype)
        if name in factors
        else moment
        for name, moment in moments.items()
    }


def map_parameters(change: Callable[[Leaves], Leaves], state: PyTree) -> PyTree:
    """Applies a function to every flat dict of parameters that a state holds, such as an average of them."""

    def map_one(part: Any) -> Any:
        kind = _kinds.get(type(part))
        if kind is None:
            return part
        trees = kind.read(part)
        new = {
            field: change(trees[field])
            for field, power in kind.powers_of(part).items()
            if power == PARAMETERS and trees.get(field)
        }
        return kind.write(part, new) if new else part

    return optree.tree_map(map_one, state, is_leaf=lambda part: type(part) in _kinds)


def _check_known(path: tuple[Any, ...], part: Any) -> None:
    """Raises if a part of a state that is not known may be a moment: as floats, quantized, or inside of an object."""
    if part is None or isinstance(part, bool | int | float | str):
        return
    if isinstance(part, Tensor):
        is_quantized = part.ndim > 0 and part.dtype in (torch.int8, torch.uint8)
        if not part.is_floating_point() and not part.is_complex() and not is_quantized:
            return
    got = (
        f"a tensor of shape {tuple(part.shape)}"
        if isinstance(part, Tensor)
        else f"an object of type {type(part).__name__}"
    )
    raise TypeError(
        f"rescale_moments: `state` must be made of the states of popart_func.optim, or of those that "
        f"popart_func.optim.register_state knows, got {got} at {list(path)} that is in none of them and may be a "
        f"moment. Say how it scales with register_state, or, with a learner, pass rescale_moments=False."
    )


def gradient_factors(ratio: Tensor, upper: Iterable[str], lower: Iterable[str] = ()) -> dict[str, Tensor]:
    """The factors by which POP changes the gradients of a loss in normalized units, ``½ (n − (y − μ)/σ)²``.

    With ``r = σ/σ'``, every error becomes r times as large, and so do the gradients of the head, row by row. Gradients
    below the head also pass through its weights, which POP multiplies by r: they become r² times as large. That holds
    for one statistic. With several, a gradient below the head is a sum over outputs with different ratios, and no
    factor turns the old sum into the new one.

    Args:
        ratio: σ/σ', ``[tasks]``.
        upper: the names of the head's parameters.
        lower: the names of the parameters below the head whose moments shall follow too.

    Returns:
        The factors for `rescale_moments`.

    Raises:
        ValueError: ``lower`` with several statistics; `learners.popart_learner` with ``rescale_moments="all"`` raises
            it in its first update.

    Source: derived for this library.

    >>> gradient_factors(torch.tensor([0.5]), ["head.weight", "head.bias"], ["hidden.bias"])
    {'head.weight': tensor([[0.5000]]), 'head.bias': tensor([0.5000]), 'hidden.bias': tensor(0.2500)}
    """
    lower = list(lower)
    if lower and ratio.shape[-1] != 1:
        raise ValueError(
            f"gradient_factors: `lower` can be rescaled with one statistic only, got {ratio.shape[-1]}: a gradient "
            f"below the head is a sum over outputs, each with a ratio of its own."
        )
    factors = {name: ratio[..., None] if name.endswith("weight") else ratio for name in upper}
    # 0-d, so that it broadcasts with a parameter of any shape.
    return factors | {name: ratio.squeeze(-1).square() for name in lower}
