"""Any optimizer of optax for a learner here, with moments that follow POP: `from_optax`.

How an entry of the optimizer's state scales with gradients is measured, once for each optimizer: it runs on random
gradients and on the same times four. An entry that is then four times as large holds gradients, one that is sixteen
times as large holds their squares. So a momentum behind a preconditioner, which looks like any other momentum, is told
from one of gradients. An entry that scales in another way, or depends on the parameters, is not known, and a learner
with POP refuses it, as `optim.rescale_moments` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import optree
from torch import Tensor

from popart_func._extras import require
from popart_func.optim import GradientTransformation
from popart_func.optim.rescaling import register_entries

require("popart_func.interop.optax", "jax", ["jax"])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from popart_func.interop.jax import from_jax  # noqa: E402

__all__ = ["OptaxState", "from_optax"]


class OptaxState(NamedTuple):
    """The state of an optimizer of optax.

    Attributes:
        moments: its entries of one tensor for each parameter, by place and power, such as ``"0^2"``.
        others: what does not scale with gradients.
        unknown: what scales in a way that is not known.
    """

    moments: dict[str, dict[str, Tensor]]
    others: tuple[Any, ...]
    unknown: tuple[Any, ...]


register_entries(
    OptaxState,
    lambda state: {name: int(name[-1]) for name in state.moments},
    lambda state: state.moments,
    lambda state, new: state._replace(moments={**state.moments, **new}),
    lambda state: state.unknown,
)


def from_optax(transformation: optax.GradientTransformation) -> GradientTransformation:
    """An optimizer of optax as a gradient transformation over a flat dict of parameters.

    Args:
        transformation: such as ``optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))``. It takes any flat
            dict of parameters, and no more arguments: `optax.masked` and `optax.lbfgs` are refused.

    Weight decay of optax, such as that of ``optax.adamw``, pulls the head's parameters toward 0 in normalized units.
    With Pop-Art that pulls every prediction toward the mean of the targets. `optim.adamw` and
    `optim.add_decayed_weights` decay the folded head, so predictions are pulled toward 0.

    Raises:
        ValueError: an optimizer that can't be measured so; a state that another optimizer has made.

    >>> import torch
    >>> init, update = from_optax(optax.adam(0.1))
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state = update({"w": torch.tensor([2.0])}, init(params), params)
    >>> updates, sorted(state.moments)
    ({'w': tensor([-0.1000])}, ['1^1', '2^2'])
    """
    try:
        powers = _measured_powers(transformation)
    except Exception as error:
        raise ValueError(
            f"from_optax: `transformation` must take any flat dict of parameters, since it is measured on two named "
            f"'a' and 'b', and nothing but gradients, state and parameters; it raised {type(error).__name__}: {error}"
        ) from error
    moment_names = [f"{place}^{power}" for place, power in enumerate(powers) if power in (1, 2)]
    init_in_torch, update_in_torch = from_jax(transformation.init), from_jax(transformation.update)
    structures: dict[tuple[str, ...], optree.PyTreeSpec] = {}

    def sorted_by_power(state: Any, names: tuple[str, ...]) -> OptaxState:
        entries, structures[names] = optree.tree_flatten(state, is_leaf=_is_of(names))
        return OptaxState(
            {f"{place}^{power}": entries[place] for place, power in enumerate(powers) if power in (1, 2)},
            tuple(entry for entry, power in zip(entries, powers, strict=True) if power == 0),
            tuple(entry for entry, power in zip(entries, powers, strict=True) if power is None),
        )

    def init(params: Mapping[str, Tensor]) -> OptaxState:
        return sorted_by_power(init_in_torch(dict(params)), tuple(params))

    def update(
        grads: Mapping[str, Tensor], state: OptaxState, params: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], OptaxState]:
        names = tuple(grads)
        if names not in structures:  # a state that was loaded
            init(grads)
        made = {name: set(moments) for name, moments in state.moments.items()}, len(state.others), len(state.unknown)
        if made != ({name: set(names) for name in moment_names}, powers.count(0), powers.count(None)):
            raise ValueError(
                f"from_optax: `state` must be one that this optimizer made for parameters {sorted(names)}, got moments "
                f"{ {name: sorted(moments) for name, moments in state.moments.items()} }."
            )
        others, unknown = iter(state.others), iter(state.unknown)
        entries = [
            next(others) if power == 0 else next(unknown) if power is None else state.moments[f"{place}^{power}"]
            for place, power in enumerate(powers)
        ]
        whole = structures[names].unflatten(entries)
        updates, new = update_in_torch(dict(grads), whole, None if params is None else dict(params))
        return updates, sorted_by_power(new, names)

    return GradientTransformation(init, update)


def _is_of(names: tuple[str, ...]) -> Any:
    return lambda part: isinstance(part, dict) and part.keys() == set(names)


def _measured_powers(transformation: optax.GradientTransformation) -> list[int | None]:
    """The power of gradients that each entry of a state holds: 0, 1, 2, or None where that is not known."""
    random = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (3,)}
    drawn = [
        {name: random.choice([-1, 1], shape) * random.uniform(0.8, 1.2, shape) for name, shape in shapes.items()}
        for _ in range(4)
    ]

    def entries_after(factor: float, params: dict[str, Any]) -> list[Any]:
        params = jax.tree.map(jnp.float32, params)
        state = transformation.init(params)
        for grads in drawn[:2]:
            _, state = transformation.update(jax.tree.map(lambda one: jnp.float32(factor * one), grads), state, params)
        entries: list[Any] = optree.tree_leaves(state, is_leaf=_is_of(tuple(shapes)))
        return entries

    def powers_at(size: float) -> list[int | None]:
        runs = [entries_after(size, drawn[2]), entries_after(4 * size, drawn[2]), entries_after(size, drawn[3])]
        return [_power(shapes, *entry) for entry in zip(*runs, strict=True)]

    # Beside large gradients a first value or an epsilon is nothing; small ones show what a clipping hides.
    return [small if large == 0 else large for large, small in zip(powers_at(1e3), powers_at(0.03), strict=True)]


def _power(shapes: Mapping[str, tuple[int, ...]], before: Any, after: Any, elsewhere: Any) -> int | None:
    """The power of an entry, from its values for some gradients, for four times as large ones, and at other params."""
    one, four, other = (_numbers(entry) for entry in (before, after, elsewhere))
    if not np.issubdtype(one.dtype, np.floating):
        return 0
    by_name = isinstance(before, dict)
    like_params = by_name and all(before[name].shape == shape for name, shape in shapes.items())
    if by_name and not like_params and not one.any():
        return None  # placeholders, which may be moments for parameters of other shapes, as those of adafactor are
    if np.allclose(one, other, rtol=1e-3, atol=0) and (one.any() or not like_params):  # zeros tell nothing
        for power in (0, 1, 2) if like_params else (0,):
            if np.allclose(four, 4.0**power * one, rtol=0.1, atol=0):
                return power
    return None


def _numbers(entry: Any) -> Any:
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(entry)])
