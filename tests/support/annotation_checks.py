"""The type checker of the tests: beartype, which compiles a check once for each signature.

jaxtyping decorates a function whenever its ``def`` is executed, so a function inside another one is decorated again at
every call: a learner's ``update`` in each step. What it hands to the type checker is a function without a body, so two
with equal signatures can share their check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import beartype

_CHECKS: dict[Any, Callable[..., Any]] = {}


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
