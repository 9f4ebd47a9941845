"""Static arguments: they reach a PyTorch function as they are, and it is traced once for each of their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

__all__ = ["Static", "is_static", "static_arguments"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Static:
    """A static argument. Values that Python takes for equal are told apart: 1, 1.0 and True, or 0.0 and -0.0."""

    def __init__(self, value: Any) -> None:
        self.value: Any = value.value if isinstance(value, Static) else value
        self._key = _exact(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def is_static(leaf: Any) -> bool:
    """Whether a leaf of the arguments is static: a `Static`, or a bool or string of Python."""
    return isinstance(leaf, Static | bool | str)


def static_arguments(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Any, Any], Arguments]:
    """A function that marks the static arguments of a call, given by position or by name.

    Args:
        function: whose arguments they are.
        names: the names of its static arguments.

    Raises:
        ValueError: the function has no argument with one of the names.
    """
    called = function.forward if isinstance(function, torch.nn.Module) else function
    parameters = inspect.signature(called).parameters if names else {}
    named = [name for name, parameter in parameters.items() if parameter.kind not in _SEVERAL]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [name for name in names if name not in named]
    if unknown:
        raise ValueError(
            f"to_jax_function: `static_argnames` must name arguments of the function, {named}, got {unknown}."
        )
    order = [name for name in named if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]

    def mark(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        marked = [
            _marked(order[at], one) if at < len(order) and order[at] in names else one for at, one in enumerate(args)
        ]
        return tuple(marked), {name: _marked(name, one) if name in names else one for name, one in kwargs.items()}

    return mark


def _marked(name: str, value: Any) -> Static:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"to_jax_function: the static argument {name!r} is traced by JAX: name it in the static_argnames of "
            f"jax.jit, too."
        )
    static = Static(value)
    try:
        hash(static)
    except TypeError:
        raise TypeError(
            f"to_jax_function: the static argument {name!r} must be hashable, got {type(value).__name__}: give a tuple "
            f"in the place of a list, or leave it out of static_argnames."
        ) from None
    return static


def _exact(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value), tuple(map(_exact, value))
    return type(value), value.hex() if isinstance(value, float) else value
