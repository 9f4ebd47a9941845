"""The formulas of `torch.optim`'s optimizers, one for each, for one parameter: `FORMULAS`.

A formula reads no value. Weight decay is not part of it: `torch_optimizers.from_torch` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from popart_func._typing import Scalar
from popart_func.optim.transformations import as_dtype, one_minus_power

__all__ = ["FORMULAS", "Row", "Step"]


@dataclass(frozen=True)
class Step:
    """A formula's arguments beside the gradient: the options, the rate, the count of updates and the parameter."""

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
Formula = Callable[[Step, Tensor, Entries], tuple[Tensor, Entries]]
"""``formula(step, grad, entries)`` -> the update and the entries afterwards, of one parameter."""


def _mix(decay: Scalar, moment: Tensor, value: Tensor) -> Tensor:
    return decay * moment + (1 - decay) * value


def _sgd(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    if "momentum_buffer" not in entries:
        return -step.rate * grad, {}
    # The first buffer is the gradient itself, without dampening.
    share = 1 - step["dampening"] * (step.count > 1).to(grad.dtype)
    buffer = step["momentum"] * entries["momentum_buffer"] + share * grad
    direction = grad + step["momentum"] * buffer if step.options["nesterov"] else buffer
    return -step.rate * direction, {"momentum_buffer": buffer}


def _adam(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    new = {"exp_avg": _mix(b1, entries["exp_avg"], grad), "exp_avg_sq": _mix(b2, entries["exp_avg_sq"], grad.square())}
    second = new["exp_avg_sq"]
    if "max_exp_avg_sq" in entries:
        second = new["max_exp_avg_sq"] = torch.maximum(entries["max_exp_avg_sq"], second)
    denominator = second.sqrt() / step.correction(b2).sqrt() + step["eps"]
    return -step.rate / step.correction(b1) * new["exp_avg"] / denominator, new


def _nadam(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
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


def _radam(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
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


def _adamax(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    b1, b2 = step["betas"]
    first = _mix(b1, entries["exp_avg"], grad)
    largest = torch.maximum(b2 * entries["exp_inf"], grad.abs() + step["eps"])
    return -step.rate / step.correction(b1) * first / largest, {"exp_avg": first, "exp_inf": largest}


def _adagrad(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    total = entries["sum"] + grad.square()
    rate = step.rate / (1 + (step.time() - 1) * step["lr_decay"])
    return -rate * grad / (total.sqrt() + step["eps"]), {"sum": total}


def _adadelta(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    square = _mix(step["rho"], entries["square_avg"], grad.square())
    delta = (entries["acc_delta"] + step["eps"]).sqrt() / (square + step["eps"]).sqrt() * grad
    deltas = _mix(step["rho"], entries["acc_delta"], delta.square())
    return -step.rate * delta, {"square_avg": square, "acc_delta": deltas}


def _rmsprop(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    new = {"square_avg": _mix(step["alpha"], entries["square_avg"], grad.square())}
    square = new["square_avg"]
    if "grad_avg" in entries:
        new["grad_avg"] = _mix(step["alpha"], entries["grad_avg"], grad)
        square = square - new["grad_avg"].square()
    direction = grad / (square.sqrt() + step["eps"])
    if "momentum_buffer" in entries:
        direction = new["momentum_buffer"] = step["momentum"] * entries["momentum_buffer"] + direction
    return -step.rate * direction, new


def _rprop(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    (smaller, larger), (least, most) = step["etas"], step["step_sizes"]
    sign, one = grad * entries["prev"], torch.ones_like(grad)
    factor = torch.where(sign > 0, larger * one, torch.where(sign < 0, smaller * one, one))
    size = torch.where(step.count == 1, step.rate * one, entries["step_size"])
    size = (size * factor).clamp(least, most)
    grad = torch.where(sign < 0, 0, grad)
    return -grad.sign() * size, {"prev": grad, "step_size": size}


def _asgd(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
    before = step.time() - 1
    rate = step.rate / torch.exp(step["alpha"] * torch.log(1 + step["lambd"] * step.rate * before))
    update = -rate * (step["lambd"] * (step.param - entries["center"]) + grad)
    share = 1 / (before - step["t0"]).clamp(min=1)
    average = entries["ax"] + share * (step.param + update - entries["ax"])
    return update, {"ax": torch.where(share == 1, step.param + update, average), "center": entries["center"]}


def _adafactor(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
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


def _muon(step: Step, grad: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
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


class Row(NamedTuple):
    """An optimizer: its formula, and the entries of one parameter before the first update."""

    formula: Formula
    init: Callable[[Mapping[str, Any], Tensor], Entries]
    decoupled: bool | None = False
    """Whether weight decay is AdamW's; None: as the option ``decoupled_weight_decay`` says."""


FORMULAS: dict[str, Row] = {
    "SGD": Row(_sgd, _init_sgd),
    "Adam": Row(_adam, _init_adam, None),
    "AdamW": Row(_adam, _init_adam, True),
    "NAdam": Row(
        _nadam,
        lambda options, param: {**_zeros("exp_avg", "exp_avg_sq")(options, param), "mu_product": param.new_ones(())},
        None,
    ),
    "RAdam": Row(_radam, _zeros("exp_avg", "exp_avg_sq"), None),
    "Adamax": Row(_adamax, _zeros("exp_avg", "exp_inf")),
    "Adagrad": Row(
        _adagrad, lambda options, param: {"sum": torch.zeros_like(param) + options["initial_accumulator_value"]}
    ),
    "Adadelta": Row(_adadelta, _zeros("square_avg", "acc_delta")),
    "RMSprop": Row(_rmsprop, _init_rmsprop),
    "Rprop": Row(_rprop, _zeros("prev", "step_size")),
    "ASGD": Row(_asgd, _zeros("ax", "center")),
    "Adafactor": Row(_adafactor, _init_adafactor, True),
    "Muon": Row(_muon, _init_muon, True),
}
"""Each optimizer, by the name of its class."""
