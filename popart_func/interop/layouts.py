"""Layouts: parameters and statistics as PyTorch, haiku, rlax and flax keep them, converted to each other.

PyTorch keeps a linear layer's ``weight`` as ``[out, in]``, the JAX libraries keep it as ``[in, out]`` and call it ``w``
(haiku, rlax; bias ``b``) or ``kernel`` (flax; bias ``bias``). The functions here only rename and transpose: tensors
stay tensors, arrays stay arrays, and leading axes, such as lanes, stay in front. `to_jax` and `to_torch` change the
library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from popart_func._extras import require
from popart_func.pop_art import PopArtState

require("popart_func.interop.layouts", "jax", ["jax"])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from popart_func.interop.trees import to_jax, to_torch  # noqa: E402

__all__ = ["RlaxState", "from_layout", "from_rlax_state", "to_layout", "to_rlax_state"]

Layout = Literal["haiku", "rlax", "flax"]

_NAMES = {"haiku": ("w", "b"), "rlax": ("w", "b"), "flax": ("kernel", "bias")}


class RlaxState(NamedTuple):
    """The fields of `rlax.PopArtState`, where rlax is not installed. Each ``[tasks]``.

    Attributes:
        shift: μ.
        scale: σ.
        second_moment: ν, with ``σ² = ν − μ²``.
    """

    shift: Any
    scale: Any
    second_moment: Any


def to_layout(params: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """PyTorch's flat parameters of linear layers in the layout of another library.

    Args:
        params: ``{"0.weight": [..., out, in], "0.bias": [..., out], ...}``, or one layer's ``{"weight", "bias"}``.
        layout: ``"haiku"`` or ``"rlax"`` (``w``, ``b``), or ``"flax"`` (``kernel``, ``bias``).

    Returns:
        ``{"0": {"w": [..., in, out], "b": [..., out]}, ...}``, a dict for each layer; for one layer without a prefix
        only its dict.

    Raises:
        ValueError: an unknown layout; a parameter of another kind of layer (but a convolution's ``weight`` looks like
            that of a linear layer with lanes).
        TypeError: ``params`` is not a dict of tensors or arrays.

    >>> to_layout({"head.weight": torch.ones(1, 4), "head.bias": torch.zeros(1)}, "flax")["head"]["kernel"].shape
    torch.Size([4, 1])
    """
    weight_name, bias_name = _names("to_layout", layout)
    _check_tree("to_layout", "params", params)
    layers: dict[str, Any] = {}
    for name, value in params.items():
        prefix, _, kind = name.rpartition(".")
        layer = layers.setdefault(prefix, {})
        if kind == "weight" and value.ndim >= 2:
            layer[weight_name] = _transposed(value)
        elif kind == "bias":
            layer[bias_name] = value
        else:
            raise ValueError(
                f"to_layout: `params` must be linear layers' 'weight' [..., out, in] and 'bias', got {name!r} of shape "
                f"{tuple(value.shape)}."
            )
    return layers[""] if set(layers) == {""} else layers


def from_layout(layers: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The inverse of `to_layout`: PyTorch's flat parameters, ``{"0.weight": [..., out, in], ...}``.

    Args:
        layers: a dict of layers, nested to any depth, or one layer; as haiku, rlax or flax keep them.
        layout: ``"haiku"``, ``"rlax"`` or ``"flax"``.

    Raises:
        ValueError: an unknown layout; a name that the layout does not have.
        TypeError: ``layers`` is not a dict of tensors or arrays.

    >>> from_layout({"w": torch.ones(4, 1), "b": torch.zeros(1)}, "rlax")["weight"].shape
    torch.Size([1, 4])
    """
    weight_name, bias_name = _names("from_layout", layout)
    _check_tree("from_layout", "layers", layers)
    params: dict[str, Any] = {}

    def add(prefix: str, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}." if name else prefix, value)
            elif name == weight_name and value.ndim >= 2:
                params[f"{prefix}weight"] = _transposed(value)
            elif name == bias_name:
                params[f"{prefix}bias"] = value
            else:
                raise ValueError(
                    f"from_layout: `layers` must hold {weight_name!r} [..., in, out] and {bias_name!r}, got "
                    f"{prefix + name!r} of shape {tuple(value.shape)}."
                )

    add("", layers)
    return params


def to_rlax_state(state: PopArtState) -> Any:
    """Statistics in rlax's form, as JAX arrays: `rlax.PopArtState` where rlax is installed, else `RlaxState`.

    rlax keeps ``ν = σ² + μ²`` in float32, in which ``ν − μ²`` cancels: of targets 1000 ± 1 it keeps no digit of σ. The
    count, the residue and a variance beyond the bounds have no place in it and are dropped.

    Args:
        state: each ``[..., tasks]``.

    >>> from popart_func.pop_art import init_state
    >>> to_rlax_state(init_state(1)).second_moment
    Array([1.], dtype=float32)
    """
    if not isinstance(state, PopArtState):
        raise TypeError(f"to_rlax_state: `state` must be a PopArtState, got {type(state).__name__}.")
    mean = state.shift.double() + state.residue.double()
    second = (state.variance.double() + mean.square()).to(state.shift.dtype)
    fields = (to_jax(field) for field in (mean.to(state.shift.dtype), state.scale, second))
    try:
        from rlax import PopArtState as Theirs
    except ModuleNotFoundError:
        Theirs = RlaxState
    return Theirs(*fields)


def from_rlax_state(state: Any, *, count: int | Tensor = 1) -> PopArtState:
    """Statistics of rlax as a `PopArtState` of tensors.

    Args:
        state: `rlax.PopArtState` or `RlaxState`, of arrays ``[..., tasks]``.
        count: how many updates each task has had, which rlax does not keep; only a bias correction uses it.

    Raises:
        TypeError: ``state`` lacks fields.

    >>> from_rlax_state(RlaxState(jnp.array([3.0]), jnp.array([2.0]), jnp.array([13.0]))).variance
    tensor([4.])
    """
    if not all(hasattr(state, name) for name in RlaxState._fields):
        raise TypeError(
            f"from_rlax_state: `state` must have the fields {RlaxState._fields}, got {type(state).__name__}."
        )
    fields = (jnp.asarray(getattr(state, name)) for name in RlaxState._fields)
    shift, scale, second = (to_torch(field) for field in fields)
    variance = (second.double() - shift.double().square()).clamp(min=0).to(shift.dtype)  # ν has been rounded
    counts = torch.as_tensor(count, dtype=torch.int32, device=shift.device).expand(shift.shape).clone()
    return PopArtState(shift, scale, variance, counts, torch.zeros_like(shift))


def _names(caller: str, layout: str) -> tuple[str, str]:
    if layout not in _NAMES:
        raise ValueError(f"{caller}: `layout` must be one of {list(_NAMES)}, got {layout!r}.")
    return _NAMES[layout]


def _check_tree(caller: str, name: str, tree: Any) -> None:
    if not isinstance(tree, Mapping):
        raise TypeError(f"{caller}: `{name}` must be a dict of tensors or arrays, got {type(tree).__name__}.")
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"{caller}: `{name}` must have names for keys, got {key!r}.")
        if isinstance(value, Mapping):
            _check_tree(caller, name, value)
        elif not hasattr(value, "shape"):
            raise TypeError(f"{caller}: `{name}` must hold tensors or arrays, got {type(value).__name__} at {key!r}.")


def _transposed(value: Any) -> Any:
    return value.transpose(-1, -2) if isinstance(value, Tensor) else jax.numpy.swapaxes(value, -1, -2)
