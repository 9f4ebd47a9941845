"""The type checker of the tests: beartype, which compiles a check once for each signature, and jaxtyping for shapes.

jaxtyping's decorator takes most of a millisecond to decorate a function and several microseconds a call, and it
decorates a function whenever its ``def`` is executed: one inside another function again at every call. So functions
without shapes in their annotations, which are nine in ten, are decorated by beartype alone (`jaxtyped`). For the others
jaxtyping hands a function without a body to the type checker, so two with equal signatures can share their check
(`check`).
"""

from __future__ import annotations

import contextlib
import functools
import re
import typing
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import beartype
import beartype.roar
import jaxtyping

_CHECKS: dict[Any, Callable[..., Any]] = {}
_CHECKED: dict[tuple[str, CodeType], FunctionType | None] = {}
_PLAIN = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))
# The types of `popart_func._typing`, and an alias of one.
_SHAPES = re.compile(r"\b(Float|Integer|Num|Rate|Scalar|Shaped)\b")
_SWITCH = """
def switched(function, checked, config):
    def called(*args, **kwargs):
        return (function if config.jaxtyping_disable else checked)(*args, **kwargs)
    return called
"""
_NAMES: dict[str, Any] = {}
# Under a name that the tracer takes for generated code, so that errors name the user's lines.
exec(compile(_SWITCH, "<@beartype, unless checks are disabled>", "exec"), _NAMES)


def jaxtyped(*, typechecker: Any, with_shapes: Any = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """jaxtyping's decorator of the same name, which leaves functions without shapes to beartype."""

    def decorate(part: Any) -> Any:
        checked = _checked(part) if isinstance(part, FunctionType) else None
        if checked is None:
            return with_shapes(typechecker=typechecker)(part)
        if checked is part:
            return part
        return functools.update_wrapper(_NAMES["switched"](part, checked, jaxtyping.config), part)

    return decorate


def _checked(function: FunctionType) -> FunctionType | None:
    """A function with its annotations enforced; None where they have shapes, or names that can't be looked up.

    Where there are no annotations, the function itself.
    """
    key = function.__module__, function.__code__  # codes are equal if they differ by their files alone
    if key not in _CHECKED:
        _CHECKED[key] = None
        if not _SHAPES.search(" ".join(map(str, function.__annotations__.values()))):
            with contextlib.suppress(NameError, TypeError, AttributeError, beartype.roar.BeartypeException):
                typing.get_type_hints(function)
                _CHECKED[key] = _PLAIN(function)
    first = _CHECKED[key]
    if first is None or first.__code__ is function.__code__:
        return first and function
    # A copy of the check of the first function that this ``def`` has made, which calls this one.
    again = FunctionType(first.__code__, first.__globals__, first.__name__, first.__defaults__, first.__closure__)
    again.__kwdefaults__ = {**first.__kwdefaults__, "__beartype_func": function}
    return again


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    code = function.__code__
    names = function.__module__, function.__qualname__, code.co_varnames, code.co_code, code.co_flags
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    defaults = function.__defaults__, tuple((function.__kwdefaults__ or {}).items())
    key = names, counts, tuple(function.__annotations__.items()), defaults
    try:
        known = _CHECKS.get(key)
    except TypeError:  # a default that has no hash
        return beartype.beartype(function)
    if known is None:
        known = _CHECKS[key] = beartype.beartype(function)
    return known
