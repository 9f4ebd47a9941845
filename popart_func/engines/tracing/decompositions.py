"""Decompositions: ops replaced by simpler ones while tracing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popart_func._torch import core_decompositions, is_composite, overloads, schema, torch_pytree

__all__ = ["decomposition", "name_to_register", "taken_apart", "taken_apart_in_body"]

_aten = torch.ops.aten

Decomposition = Callable[..., Any]


@functools.cache
def decomposition(op: Any) -> Decomposition | None:
    """The function that computes an op with simpler ops; None for an op that a graph may have."""
    own = _OWN.get(getattr(op, "overloadpacket", None))
    if own is not None and schema(op).overload_name != "out":
        return own
    wrapped = _table().get(op) or _copy_of_view(op)
    if wrapped is None or schema(op).is_mutable:
        return wrapped
    return _light(_lerp if op.overloadpacket is torch.ops.aten.lerp else inspect.unwrap(wrapped), wrapped)


@functools.cache
def _table() -> dict[Any, Decomposition]:
    """PyTorch's core decompositions, and those of some ops that PyTorch keeps whole for speed."""
    aten = torch.ops.aten
    table, every = core_decompositions()
    for packet in (
        *(aten.leaky_relu, aten.native_layer_norm, aten.native_group_norm),
        *(aten._native_batch_norm_legit_functional, aten._batch_norm_with_update_functional, aten.ldexp, aten.dist),
        *(aten.narrow_copy, aten.unbind_copy),
    ):
        ops = (getattr(packet, overload) for overload in packet.overloads())
        table |= {op: every[op] for op in ops if op in every}
    return table


def _light(plain: Decomposition, wrapped: Decomposition) -> Decomposition:
    """Calls a decomposition without PyTorch's wrappers around it where they would do nothing.

    The wrappers compute in float32 for narrower dtypes, and find the dtype of the result of several dtypes. To know
    whether they have to, they import sympy and TorchDynamo, which takes a second.
    """

    @functools.wraps(wrapped)
    def light(*args: Any, **kwargs: Any) -> Any:
        dtypes = {part.dtype for part in (*args, *kwargs.values()) if isinstance(part, Tensor)}
        return (plain if dtypes in ({torch.float32}, {torch.float64}) else wrapped)(*args, **kwargs)

    return light


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """`lerp` without PyTorch's check of strides, which imports sympy."""
    weight = weight if isinstance(weight, Tensor) else start.new_full((), weight)
    is_near_end = weight.abs() >= 0.5
    rate = torch.where(is_near_end, weight - 1, weight)
    nearest = torch.where(is_near_end, end, start)
    return rate * (end - start) + nearest


def _copy_of_view(op: Any) -> Decomposition | None:
    """The view that an op such as `permute_copy` copies, and the copy; None of another op."""
    name = op.overloadpacket.__name__ if torch.Tag.view_copy in op.tags else ""
    packet = getattr(torch.ops.aten, name.removesuffix("_copy"), None) if name.endswith("_copy") else None
    view = getattr(packet, schema(op).overload_name or "default", None)
    if view is None or schema(op).is_mutable:
        return None
    return lambda *args, **kwargs: torch_pytree.tree_map(torch.clone, view(*args, **kwargs))


def _addbmm(x: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """`addbmm`: the sum of matrix products, added to a matrix, which is not read where beta is 0."""
    product = alpha * torch.bmm(left, right).sum(0)
    return product if beta == 0 else beta * x + product


def _log_ndtr(x: Tensor) -> Tensor:
    """`special_log_ndtr`, whose derivative is not NaN on the side that is not taken."""
    is_low = x < -1
    scaled = x / 2**0.5
    tail = (torch.special.erfcx(-torch.where(is_low, scaled, -1.0)) / 2).log() - scaled * scaled
    return torch.where(is_low, tail, (-torch.erfc(torch.where(is_low, 0, scaled)) / 2).log1p())


def _root(total: Tensor, power: float = 2.0) -> Tensor:
    """A root whose derivative at 0 is 0, as PyTorch has it for norms and standard deviations."""
    is_extreme = total == (0 if power > 0 else torch.inf)
    inside = torch.where(is_extreme, 1, total)
    return torch.where(is_extreme, 0, inside.sqrt() if power == 2 else inside ** (1 / power))


def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """`linalg_vector_norm`; PyTorch's decomposition serves for the powers whose derivative at 0 is no NaN."""
    if ord in (0, 1, torch.inf, -torch.inf) or x.numel() == 0 or not x.dtype.is_floating_point or dtype is not None:
        return core_decompositions()[1][torch.ops.aten.linalg_vector_norm.default](x, ord, dim, keepdim, dtype=dtype)
    if ord == 2:
        powers = x * x
    else:
        at_zero = x == 0
        powers = torch.where(at_zero, 0 if ord > 0 else torch.inf, torch.where(at_zero, 1, x).abs() ** ord)
    return _root(powers.sum(list(range(x.ndim)) if dim is None else dim, keepdim), float(ord))


def _std(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`std`: the root of the variance."""
    return _root(torch.var(x, *arguments, **options))


def _std_mean(x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, *arguments, **options)
    return _root(var), mean


def _elu(x: Tensor, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Tensor:
    """`elu`, whose derivative is not NaN where the exponential that is not taken overflows."""
    below = torch.where(x > 0, 0, x)
    return torch.where(x > 0, x * scale, torch.expm1(below * input_scale) * (alpha * scale))


def _hardsigmoid(x: Tensor) -> Tensor:
    """`hardsigmoid`, whose derivative at both kinks is 0, as in PyTorch."""
    return torch.where(x <= -3, 0, torch.where(x >= 3, 1, (x + 3) / 6))


def _hardswish(x: Tensor) -> Tensor:
    """`hardswish`, whose derivative is 0 and 1 at the kinks, as in PyTorch."""
    inside = torch.where(x.abs() >= 3, 0, x)  # beyond, the product may overflow
    return torch.where(x <= -3, x * 0, torch.where(x >= 3, x, inside * (inside + 3) / 6))


def _smooth_l1_loss_backward(cotangent: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float = 1.0) -> Tensor:
    """`smooth_l1_loss_backward`, which keeps NaN: PyTorch's decomposition takes its sign, which is 0."""
    difference = x - target
    far = torch.where(difference.isnan(), difference, difference.sign())
    slope = torch.where(difference.abs() < beta, difference / beta, far)
    return slope * (cotangent / difference.numel() if reduction == 1 else cotangent)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`take` without PyTorch's read of a 0-d index, which a trace can't follow."""
    return x.reshape(-1)[index.reshape(-1)].reshape(index.shape)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy`: the source in the shape, dtype and device of x."""
    return source.to(x.dtype).to(x.device).expand(x.shape).clone()


def _fill(x: Tensor, value: Any) -> Tensor:
    """`fill`, for which `torch.vmap` has no rule."""
    return value.to(x.dtype).expand(x.shape).clone() if isinstance(value, Tensor) else torch.full_like(x, value)


def _sinc(x: Tensor) -> Tensor:
    """`sinc` whose derivative at 0 is not NaN, as that of PyTorch's decomposition would be."""
    at_zero = x == 0
    angle = torch.pi * torch.where(at_zero, 1, x)
    return torch.where(at_zero, 1, angle.sin() / angle)


def _rrelu(
    x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Any:
    """`rrelu_with_noise`, which draws in training only."""
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`masked_scatter`: the place of a value in the source is the number of places that are masked before it."""
    x, mask = torch.broadcast_tensors(x, mask)
    if source.numel() == 0:
        return x.clone()
    places = (mask.reshape(-1).long().cumsum(0) - 1).clamp(0, source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[places].reshape(x.shape), x)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`native_batch_norm`, whose schema does not say that it writes new running statistics in training."""
    axes, shape = [0, *range(2, x.ndim)], (-1, *(1 for _ in x.shape[2:]))
    if training:
        var, mean = torch.var_mean(x, axes, correction=0)
        count = x.numel() // x.shape[1]
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(momentum * mean)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(momentum * (var * (count / max(count - 1, 1))))
    else:
        assert running_mean is not None, "PyTorch checks that there are running statistics"
        assert running_var is not None, "PyTorch checks that there are running statistics"
        mean, var = running_mean, running_var
    inverse = (var + eps).rsqrt()
    scale = inverse if weight is None else inverse * weight
    result = (x - mean.reshape(shape)) * scale.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result, *((mean, inverse) if training else (x.new_zeros(0), x.new_zeros(0)))


def _zero_tangents(tangent: Tensor, value: Tensor, *, self_num_batch_dims: int = 0) -> Tensor:
    """`_new_zeros_with_same_feature_meta`: a value's zero tangents under `torch.vmap`, with the axes of lanes first.

    PyTorch compares their strides with those of the value.
    """
    lanes = tangent.shape[:self_num_batch_dims]
    order = sorted(range(value.ndim), key=value.stride().__getitem__, reverse=True)
    zeros = value.new_zeros((*lanes, *(value.shape[axis] for axis in order)))
    return zeros.permute(*range(len(lanes)), *(len(lanes) + order.index(axis) for axis in range(value.ndim)))


def _label_margins(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The labels before the first -1, which classes are among them, and the margins ``[row, label, class]``.

    The last of the results says which margins count: those between a label and a class that is none.
    """
    rows, labels = torch.atleast_2d(x), torch.atleast_2d(target)
    classes = torch.arange(rows.shape[1], device=x.device)
    is_label = (labels != -1).long().cumprod(-1).bool()
    is_target = ((labels.unsqueeze(-1) == classes) & is_label.unsqueeze(-1)).any(1)
    labels = torch.where(is_label, labels, 0)
    margins = 1 - rows.gather(-1, labels).unsqueeze(-1) + rows.unsqueeze(1)
    return labels, is_target, margins, is_label.unsqueeze(-1) & ~is_target.unsqueeze(1)


def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """`multilabel_margin_loss_forward`; PyTorch's decomposition counts what stands behind the first -1, too."""
    _, is_target, margins, counts = _label_margins(x, target)
    loss = torch.where(counts, margins.clamp(min=0), 0).sum((1, 2)) / margins.shape[-1]
    by_row = loss if x.ndim == 2 else loss.squeeze(0)
    return (by_row, loss.mean(), loss.sum())[reduction], is_target.to(x.dtype).reshape(x.shape)


def _multilabel_margin_loss_backward(
    cotangent: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    labels, _, margins, counts = _label_margins(x, target)
    share = cotangent.reshape(-1, 1) / (margins.shape[-1] * (labels.shape[0] if reduction == 1 else 1))
    pushed = (counts & (margins > 0)).to(x.dtype)
    slope = pushed.sum(1).scatter_add(1, labels, -pushed.sum(2))
    return (slope * share).reshape(x.shape)


_OWN: dict[Any, Decomposition] = {
    torch.ops.aten.multilabel_margin_loss_forward: _multilabel_margin_loss,
    torch.ops.aten.multilabel_margin_loss_backward: _multilabel_margin_loss_backward,
    torch.ops.aten.native_batch_norm: _batch_norm,
    torch.ops.aten.masked_scatter: _masked_scatter,
    torch.ops.aten.smooth_l1_loss_backward: _smooth_l1_loss_backward,
    torch.ops.aten.take: _take,
    torch.ops.aten.elu: _elu,
    torch.ops.aten.hardsigmoid: _hardsigmoid,
    torch.ops.aten.hardswish: _hardswish,
    torch.ops.aten.linalg_vector_norm: _vector_norm,
    torch.ops.aten.std: _std,
    torch.ops.aten.std_mean: _std_mean,
    torch.ops.aten.addbmm: _addbmm,
    torch.ops.aten.special_log_ndtr: _log_ndtr,
    torch.ops.aten.sinc: _sinc,
    torch.ops.aten.rrelu_with_noise: _rrelu,
    _aten._new_zeros_with_same_feature_meta: _zero_tangents,
}


@functools.cache
def taken_apart(op: Any) -> Decomposition | None:
    """The function by which tracing replaces an op: its decomposition, or the parts into which autograd takes it."""
    return decomposition(op) or (op.decompose if is_composite(op) else None)


@functools.cache
def taken_apart_in_body(op: Any) -> Decomposition | None:
    """The function that replaces an op in the body of a loop, which PyTorch differentiates by its own rules for ops."""
    return _EVEN_IN_BODIES.get(getattr(op, "overloadpacket", None)) or (op.decompose if is_composite(op) else None)


_EVEN_IN_BODIES: dict[Any, Decomposition] = {
    torch.ops.aten.native_batch_norm: _batch_norm,  # whose schema hides that it writes
    torch.ops.aten.detach: torch.ops.aten.alias.default,  # autograd's own: the user's are marked otherwise
    torch.ops.aten.copy: _copy,  # which has no derivative
    torch.ops.aten.fill: _fill,
    torch.ops.aten.take: _take,
    torch.ops.aten.rrelu_with_noise: _rrelu,
    _aten._new_zeros_with_same_feature_meta: _zero_tangents,
}


def name_to_register(caller: str, op: Any) -> str:
    """The name under which a user registers an op, without ``aten::``.

    Args:
        caller: the function that registers it.
        op: the op: its name, ``"namespace::name"`` or ``"name"`` of an ATen op; what `torch.library.custom_op` returns;
            or ``torch.ops.namespace.name``.

    Raises:
        ValueError: there is no such op, or tracing replaces it by simpler ones, so that no graph has it.
    """
    found = overloads(op)
    if not found:
        raise ValueError(
            f"{caller}: `op` must be an op of PyTorch or its name, 'namespace::name', got {op!r}: a custom op has to "
            f"be defined before, with torch.library.custom_op."
        )
    name: str = schema(found[0]).name.removeprefix("aten::")
    if all(map(taken_apart, found)):
        raise ValueError(
            f"{caller}: tracing replaces {name!r} by simpler ops, so that no step has it: register those of them that "
            f"are lacking. Print popart_func.engines.explain(...).graph to see them."
        )
    return name
