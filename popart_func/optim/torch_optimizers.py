"""Every optimizer of `torch.optim` as a pure transformation: `from_torch`.

State: TorchState(count, entries), with the entries' names that `torch.optim` uses in its ``state_dict``
init:   from_torch(torch.optim.NAdam, lr=0.01).init(params) -> state
update: from_torch(torch.optim.NAdam, lr=0.01).update(grads, state, params) -> (updates, state)

Each optimizer is one formula for one parameter, a row of `torch_formulas.FORMULAS`, and equals ``step()`` to rounding.
Every option that is a number may be a 0-d tensor, so that each lane can have its own; the rate may be a schedule too.
Nothing reads a value, so that a step runs in `torch.vmap`, on every engine and in JAX. A new optimizer is a new row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func.optim.rescaling import PARAMETERS, Leaves, Power, register_entries, scaled
from popart_func.optim.torch_formulas import FORMULAS, Step
from popart_func.optim.transformations import (
    GradientTransformation,
    Rate,
    as_dtype,
    check_rate,
    rate_at,
    zero_count,
)

__all__ = ["RMSpropState", "TorchState", "from_torch", "state_of"]


class TorchState(NamedTuple):
    """The state of an optimizer of `torch.optim`.

    Attributes:
        count: the number of updates so far, 0-d int32.
        entries: such as ``"exp_avg"``: a tensor for each parameter, by name. ``"center"`` is what a weight decay pulls
            the parameters toward: 0, which POP keeps where it is in the targets' units.
    """

    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not missed
    entries: dict[str, dict[str, Tensor]]


def _rescaled_columns(trees: Mapping[str, Leaves], factors: Mapping[str, Tensor]) -> Leaves:
    """Adafactor's column means, where rows scale: times the rows' mean factor, weighted as in its model."""
    rows, before = scaled(trees["row_var"], factors, 2), trees["row_var"]
    ratios = {name: rows[name].mean(-2, keepdim=True) / before[name].mean(-2, keepdim=True) for name in rows}
    return {
        name: torch.where(ratios[name].isfinite(), ratios[name], 1) * leaf if name in factors else leaf
        for name, leaf in trees["col_var"].items()
    }


_POWERS: dict[str, Power] = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "sum": 2,
    "square_avg": 2,
    "grad_avg": 1,
    "prev": 1,
    "row_var": 2,
    "col_var": _rescaled_columns,
    "variance": 2,
    "ax": PARAMETERS,
    "center": PARAMETERS,
    **dict.fromkeys(("step", "acc_delta", "mu_product", "step_size", "eta", "mu"), 0),
}
"""How entries scale with gradients, by the names that `torch.optim` has for them."""

_RMSPROP_POWERS: dict[str, Power] = {**_POWERS, "momentum_buffer": 0}


class RMSpropState(NamedTuple):
    """`TorchState` of RMSprop, whose momentum is a sum of updates, which do not scale with gradients."""

    count: Tensor  # type: ignore[assignment]
    entries: dict[str, dict[str, Tensor]]


for _cls, _powers in ((TorchState, _POWERS), (RMSpropState, _RMSPROP_POWERS)):
    register_entries(
        _cls, _powers, lambda state: state.entries, lambda state, new: state._replace(entries={**state.entries, **new})
    )


def state_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> TorchState | RMSpropState:
    """The state that a `torch.optim` optimizer holds of some parameters, with its own tensors.

    Raises:
        TypeError: no optimizer, or an entry that may scale with gradients in an unknown way.
        ValueError: an optimizer that trains none of the parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = type(optimizer).__name__
        raise TypeError(f"PopArtHead.update: `optimizer` must be an optimizer of torch.optim, got {got}.")
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if trained.isdisjoint(map(id, params.values())):
        raise ValueError(
            "PopArtHead.update: `optimizer` must train this layer, got one without its weight and bias. Make it anew "
            "where the layer has been copied; pass optimizer=None where no moments should follow."
        )
    entries: dict[str, dict[str, Tensor]] = {}
    for name, param in params.items():
        for entry, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                entries.setdefault(entry, {})[name] = value
    unknown = sorted(entries.keys() - _POWERS.keys())
    if unknown:
        raise TypeError(
            f"PopArtHead.update: `optimizer` must be one of torch.optim, got {type(optimizer).__name__}, whose "
            f"entries {unknown} may scale with gradients in an unknown way. Pass optimizer=None to leave them."
        )
    kind: Any = RMSpropState if isinstance(optimizer, torch.optim.RMSprop) else TorchState
    return kind(torch.zeros((), dtype=torch.int32), entries)


_SPEED = {"foreach", "fused", "capturable", "differentiable"}


def from_torch(cls: type[torch.optim.Optimizer], **options: Any) -> GradientTransformation:
    """An optimizer of `torch.optim` as a gradient transformation, equal to its ``step()`` to rounding.

    Parameters are a flat dict, and ``update`` needs them. With Pop-Art its moments are rescaled like those of `adam`,
    its averages of parameters are popped, and weight decay pulls the *folded* head toward 0, as in
    `add_decayed_weights`.

    Args:
        cls: such as ``torch.optim.NAdam``: SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, Adadelta, RMSprop, Rprop,
            ASGD, Adafactor or Muon.
        **options: those of ``cls``, with its defaults and checks. Numbers may be 0-d tensors; ``lr`` may be a schedule.

    Raises:
        TypeError: an optimizer without a formula here, or an option that it does not have.
        ValueError: an option out of range; for Muon, at ``init``, a parameter that is no matrix.

    >>> init, update = from_torch(torch.optim.Adamax, lr=0.1)
    >>> params = {"w": torch.tensor(1.0)}
    >>> update({"w": torch.tensor(2.0)}, init(params), params)[0]
    {'w': tensor(-0.1000)}
    """
    name = getattr(cls, "__name__", str(cls))
    if name not in FORMULAS or cls is not getattr(torch.optim, name, None):
        raise TypeError(f"from_torch: `cls` must be one of torch.optim's {sorted(FORMULAS)}, got {name}.")
    row = FORMULAS[name]
    wrong = sorted(options.keys() & _SPEED)
    if wrong:
        raise TypeError(
            f"from_torch: {wrong} choose how {name}.step runs, which is left to the engine here: leave them out."
        )
    _check_options(cls, options)
    defaults = {name: one.default for name, one in inspect.signature(cls).parameters.items() if name != "params"}
    every: dict[str, Any] = {**defaults, **options}
    learning_rate: Rate = every["lr"]
    check_rate("from_torch", learning_rate)
    decay = every.get("weight_decay", 0)
    decays = isinstance(decay, Tensor) or decay != 0
    decoupled = every.get("decoupled_weight_decay", False) if row.decoupled is None else row.decoupled
    state_type: Any = RMSpropState if name == "RMSprop" else TorchState

    def init(params: Leaves) -> Any:
        entries: dict[str, dict[str, Tensor]] = {}
        for key, param in params.items():
            if param.is_complex():
                raise TypeError(f"from_torch: complex parameters need popart_func.adam or sgd, got {key!r}.")
            own = row.init(every, param)
            if decays:
                own["center"] = torch.zeros_like(param)
            for entry, leaf in own.items():
                entries.setdefault(entry, {})[key] = leaf
        return state_type(zero_count(params), entries)

    def update(grads: Leaves, state: Any, params: Leaves | None = None) -> tuple[dict[str, Tensor], Any]:
        if params is None:
            raise ValueError("from_torch: `params` must be given to update.")
        count = state.count + 1
        rate = rate_at(learning_rate, state.count)
        updates: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Tensor]] = {}
        for key, grad in grads.items():
            param = params[key]
            own = {entry: leaves[key] for entry, leaves in state.entries.items() if key in leaves}
            step = Step(every, as_dtype(rate, param), count, param)
            grad = -grad if every.get("maximize", False) else grad
            pull = as_dtype(decay, param) * (param - own["center"]) if decays else None
            if pull is not None and not decoupled:
                grad = grad + pull
            change, new = row.formula(step, grad, own)
            updates[key] = change if pull is None or not decoupled else change - step.rate * pull
            if decays:
                new["center"] = own["center"]
            for entry, leaf in new.items():
                entries.setdefault(entry, {})[key] = leaf
        return updates, state_type(count, entries)

    return GradientTransformation(init, update)


def _check_options(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Lets the optimizer itself check its options, without those that have no value yet."""

    def known(value: Any) -> bool:
        return not (isinstance(value, Tensor) or callable(value)) and not (
            isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value)
        )

    plain = {name: value for name, value in options.items() if known(value)}
    if not known(options.get("momentum", 0)):
        plain["momentum"] = 0.5  # any: `nesterov` needs one
    unknown = sorted(options.keys() - inspect.signature(cls).parameters.keys())
    if unknown:
        raise TypeError(f"from_torch: {cls.__name__} has no options {unknown}.")
    try:
        cls([torch.zeros(1, 1)], **plain)
    except ValueError as error:
        raise ValueError(f"from_torch: {cls.__name__}: {error}") from None
