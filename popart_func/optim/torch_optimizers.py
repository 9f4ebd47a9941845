"""Every optimizer of `torch.optim` as a pure transformation: `from_torch`.

State: TorchState(count, entries), with the entries' names that `torch.optim` uses in its ``state_dict``
init:   from_torch(torch.optim.NAdam, lr=0.01).init(params) -> state
update: from_torch(torch.optim.NAdam, lr=0.01).update(grads, state, params) -> (updates, state)

Each optimizer is one formula for one parameter, a row of `_FORMULAS`, and equals ``step()`` to rounding. Every option
that is a number may be a 0-d tensor, so that each lane can have its own; the rate may be a schedule too. Nothing reads
a value, so that a step runs in `torch.vmap`, on every engine and in JAX. A new optimizer is a new row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._typing import Scalar
from popart_func.optim.rescaling import PARAMETERS, Leaves, Power, register_entries, scaled
from popart_func.optim.transformations import (
    GradientTransformation,
    Rate,
    as_dtype,
    check_rate,
    one_minus_power,
    rate_at,
    zero_count,
)

__all__ = ["TorchState", "from_torch"]


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
    """Adafactor's column means, if rows scale: by the mean of the rows' factors, weighted by the rows, as in its model."""
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
}
"""How entries scale with gradients; those that are not named, such as Adadelta's ``acc_delta``, do not."""

_RMSPROP_POWERS: dict[str, Power] = {**_POWERS, "momentum_buffer": 0}


class RMSpropState(NamedTuple):
    """`TorchState` of RMSprop, whose momentum is a sum of updates, which do not scale with gradients."""

    count: Tensor  # type: ignore[assignment]
    entries: dict[str, dict[str, Tensor]]


for _cls, _powers in ((TorchState, _POWERS), (RMSpropState, _RMSPROP_POWERS)):
    register_entries(
        _cls, _powers, lambda state: state.entries, lambda state, new: state._replace(entries={**state.entries, **new})
    )


class _Step(NamedTuple):
    """What a formula gets beside the gradient: the options, the rate, the number of this update, and the parameter."""

    options: Mapping[str, Any]
    rate: Scalar
    count: Tensor
    param: Tensor

    def __getitem__(self, name: Any) -> Any:
        """An option, in the parameter's dtype."""
        value = self.options[name]
        if isinstance(value, tuple):
            return tuple(as_dtype(one, self.param) for one in value)
        return as_dtype(value, self.param)

    def time(self) -> Tensor:
        """The number of this update, from 1, as a float."""
        return self.count.to(self.param.dtype)

    def correction(self, decay: Scalar) -> Tensor:
        """``1 − decay^t``."""
        return one_minus_power(decay, self.count, self.param.dtype)


Entries = dict[str, Tensor]
_Formula = Callable[[_Step, Tensor, Entries], tuple[Tensor, Entries]]
"""``formula(step, grad, entries)`` -> the update and the entries afterwards, of one parameter."""


def _mix(decay: Scalar, moment: Tensor, value: Tensor) -> Tensor:
    return decay * moment + (1 - decay) * value


def _sgd(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    if "momentum_buffer" not in entries:
        return -step.rate * grad, {}
    # The first buffer is the gradient itself, without dampening.
    share = 1 - step["dampening"] * (step.count > 1).to(grad.dtype)
    buffer = step["momentum"] * entries["momentum_buffer"] + share * grad
    direction = grad + step["momentum"] * buffer if step.options["nesterov"] else buffer
    return -step.rate * direction, {"momentum_buffer": buffer}


def _adam(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    new = {"exp_avg": _mix(b1, entries["exp_avg"], grad), "exp_avg_sq": _mix(b2, entries["exp_avg_sq"], grad.square())}
    second = new["exp_avg_sq"]
    if "max_exp_avg_sq" in entries:
        second = new["max_exp_avg_sq"] = torch.maximum(entries["max_exp_avg_sq"], second)
    denominator = second.sqrt() / step.correction(b2).sqrt() + step["eps"]
    return -step.rate / step.correction(b1) * new["exp_avg"] / denominator, new


def _nadam(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    first, second = _mix(b1, entries["exp_avg"], grad), _mix(b2, entries["exp_avg_sq"], grad.square())

    def momentum(time: Tensor) -> Tensor:
        return b1 * (1 - 0.5 * torch.exp(math.log(0.96) * time * step["momentum_decay"]))

    now, following = momentum(step.time()), momentum(step.time() + 1)
    product = entries["mu_product"] * now
    denominator = (second / step.correction(b2)).sqrt() + step["eps"]
    of_grad, of_first = (1 - now) / (1 - product), following / (1 - product * following)
    update = -step.rate * (of_grad * grad + of_first * first) / denominator
    return update, {"exp_avg": first, "exp_avg_sq": second, "mu_product": product}


def _langevin(z: Tensor) -> Tensor:
    """``coth z − 1/z`` for z > 0, without cancellation."""
    square = z.square()
    series = z * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    # Both are right to rounding where z is about here: the first leaves out a term in z⁹, the other is off by ε/z².
    return torch.where(z < torch.finfo(z.dtype).eps ** (1 / 12), series, 1 / torch.tanh(z) - 1 / z)


def _radam(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    first, second = _mix(b1, entries["exp_avg"], grad), _mix(b2, entries["exp_avg_sq"], grad.square())
    # ρ_t = ρ_∞ − 2t β^t / (1 − β^t), a difference of two large numbers, with x = −ln β:
    # ρ_∞ = coth(x/2) and 2t β^t / (1 − β^t) = t coth(tx/2) − t.
    half = -0.5 * torch.log(b2 + torch.zeros_like(step.time()))
    rho = step.time() + _langevin(half) - step.time() * _langevin(step.time() * half)
    limit = 1 / torch.tanh(half)
    rectified = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).clamp(min=0).sqrt()
    adaptive = step.correction(b2).sqrt() / (second.sqrt() + step["eps"])
    update = -step.rate * first / step.correction(b1) * torch.where(rho > 5, rectified * adaptive, 1)
    return update, {"exp_avg": first, "exp_avg_sq": second}


def _adamax(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    first = _mix(b1, entries["exp_avg"], grad)
    largest = torch.maximum(b2 * entries["exp_inf"], grad.abs() + step["eps"])
    return -step.rate / step.correction(b1) * first / largest, {"exp_avg": first, "exp_inf": largest}


def _adagrad(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    total = entries["sum"] + grad.square()
    rate = step.rate / (1 + (step.time() - 1) * step["lr_decay"])
    return -rate * grad / (total.sqrt() + step["eps"]), {"sum": total}


def _adadelta(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    square = _mix(step["rho"], entries["square_avg"], grad.square())
    delta = (entries["acc_delta"] + step["eps"]).sqrt() / (square + step["eps"]).sqrt() * grad
    deltas = _mix(step["rho"], entries["acc_delta"], delta.square())
    return -step.rate * delta, {"square_avg": square, "acc_delta": deltas}


def _rmsprop(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    new = {"square_avg": _mix(step["alpha"], entries["square_avg"], grad.square())}
    square = new["square_avg"]
    if "grad_avg" in entries:
        new["grad_avg"] = _mix(step["alpha"], entries["grad_avg"], grad)
        square = square - new["grad_avg"].square()
    direction = grad / (square.sqrt() + step["eps"])
    if "momentum_buffer" in entries:
        direction = new["momentum_buffer"] = step["momentum"] * entries["momentum_buffer"] + direction
    return -step.rate * direction, new


def _rprop(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    (smaller, larger), (least, most) = step["etas"], step["step_sizes"]
    sign, one = grad * entries["prev"], torch.ones_like(grad)
    factor = torch.where(sign > 0, larger * one, torch.where(sign < 0, smaller * one, one))
    size = torch.where(step.count == 1, step.rate * one, entries["step_size"])
    size = (size * factor).clamp(least, most)
    grad = torch.where(sign < 0, 0, grad)
    return -grad.sign() * size, {"prev": grad, "step_size": size}


def _asgd(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    before = step.time() - 1
    rate = step.rate / torch.exp(step["alpha"] * torch.log(1 + step["lambd"] * step.rate * before))
    update = -rate * (step["lambd"] * (step.param - entries["center"]) + grad)
    share = 1 / (before - step["t0"]).clamp(min=1)
    average = entries["ax"] + share * (step.param + update - entries["ax"])
    return update, {"ax": torch.where(share == 1, step.param + update, average), "center": entries["center"]}


def _adafactor(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    eps1, eps2 = step.options["eps"]
    eps1 = torch.finfo(grad.dtype).eps if eps1 is None else as_dtype(eps1, grad)
    share = torch.exp(step["beta2_decay"] * step.time().log())
    new = {}
    if "row_var" in entries:
        new["row_var"] = torch.lerp(entries["row_var"], grad.square().mean(-1, keepdim=True), share)
        new["col_var"] = torch.lerp(entries["col_var"], grad.square().mean(-2, keepdim=True), share)
        square = new["row_var"] * new["col_var"] / new["row_var"].mean(-2, keepdim=True).clamp(min=eps1)
    else:
        square = new["variance"] = torch.lerp(entries["variance"], grad.square(), share)
    update = grad * square.clamp(min=eps1 * eps1).rsqrt()
    size = step.param.square().mean().sqrt().clamp(min=as_dtype(eps2, grad))
    rate = torch.minimum(step.rate + torch.zeros_like(size), step.time().rsqrt())
    return -rate * size / (update.square().mean().sqrt() / step["d"]).clamp(min=1) * update, new


def _muon(step: _Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    buffer = _mix(step["momentum"], entries["momentum_buffer"], grad)
    direction = grad + step["momentum"] * (buffer - grad) if step.options["nesterov"] else buffer
    a, b, c = step.options["ns_coefficients"]
    rows, columns = grad.shape
    x = direction.bfloat16()
    x = x.mT if rows > columns else x
    x = x / x.norm().clamp(min=step.options["eps"])
    for _ in range(step.options["ns_steps"]):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    adjust = step.options["adjust_lr_fn"]
    ratio = 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
    return -step.rate * ratio * x.to(grad.dtype), {"momentum_buffer": buffer}


def _zeros(*names: str) -> Callable[[Mapping[str, Any], Tensor], Entries]:
    return lambda options, param: {name: torch.zeros_like(param) for name in names}


def _init_sgd(options: Mapping[str, Any], param: Tensor) -> Entries:
    momentum = options["momentum"]
    return {"momentum_buffer": torch.zeros_like(param)} if isinstance(momentum, Tensor) or momentum else {}


def _init_adam(options: Mapping[str, Any], param: Tensor) -> Entries:
    extra = ("max_exp_avg_sq",) if options["amsgrad"] else ()
    return _zeros("exp_avg", "exp_avg_sq", *extra)(options, param)


def _init_rmsprop(options: Mapping[str, Any], param: Tensor) -> Entries:
    extra = ("grad_avg",) if options["centered"] else ()
    return _zeros("square_avg", *extra)(options, param) | _init_sgd(options, param)


def _init_adafactor(options: Mapping[str, Any], param: Tensor) -> Entries:
    if param.ndim < 2:
        return {"variance": torch.zeros_like(param)}
    zeros = torch.zeros_like(param)
    return {"row_var": zeros[..., :1].clone(), "col_var": zeros[..., :1, :].clone()}


def _init_muon(options: Mapping[str, Any], param: Tensor) -> Entries:
    if param.ndim != 2:
        raise ValueError(
            f"from_torch: Muon is for matrices, got a parameter of shape {tuple(param.shape)}. Give the others another "
            f"optimizer, with popart_func.optim.partition."
        )
    return {"momentum_buffer": torch.zeros_like(param)}


class _Row(NamedTuple):
    formula: _Formula
    init: Callable[[Mapping[str, Any], Tensor], Entries]
    decoupled: bool | None = False
    """Whether weight decay is AdamW's; None: as the option ``decoupled_weight_decay`` says."""


_FORMULAS: dict[str, _Row] = {
    "SGD": _Row(_sgd, _init_sgd),
    "Adam": _Row(_adam, _init_adam, None),
    "AdamW": _Row(_adam, _init_adam, True),
    "NAdam": _Row(
        _nadam,
        lambda options, param: {**_zeros("exp_avg", "exp_avg_sq")(options, param), "mu_product": param.new_ones(())},
        None,
    ),
    "RAdam": _Row(_radam, _zeros("exp_avg", "exp_avg_sq"), None),
    "Adamax": _Row(_adamax, _zeros("exp_avg", "exp_inf")),
    "Adagrad": _Row(
        _adagrad, lambda options, param: {"sum": torch.zeros_like(param) + options["initial_accumulator_value"]}
    ),
    "Adadelta": _Row(_adadelta, _zeros("square_avg", "acc_delta")),
    "RMSprop": _Row(_rmsprop, _init_rmsprop),
    "Rprop": _Row(_rprop, _zeros("prev", "step_size")),
    "ASGD": _Row(_asgd, _zeros("ax", "center")),
    "Adafactor": _Row(_adafactor, _init_adafactor, True),
    "Muon": _Row(_muon, _init_muon, True),
}
"""Each optimizer, by the name of its class."""

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
    if name not in _FORMULAS or cls is not getattr(torch.optim, name, None):
        raise TypeError(f"from_torch: `cls` must be one of torch.optim's {sorted(_FORMULAS)}, got {name}.")
    row = _FORMULAS[name]
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
            step = _Step(every, as_dtype(rate, param), count, param)
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
    unknown = sorted(options.keys() - inspect.signature(cls).parameters.keys())
    if unknown:
        raise TypeError(f"from_torch: {cls.__name__} has no options {unknown}.")
    try:
        cls([torch.zeros(1, 1)], **plain)
    except ValueError as error:
        raise ValueError(f"from_torch: {cls.__name__}: {error}") from None
