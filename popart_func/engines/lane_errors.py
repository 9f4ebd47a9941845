"""Errors of code that `torch.vmap` can't run over lanes: they name the line of the step, and what to write instead.

PyTorch's own messages are about a `torch.vmap` that no user has called. The compiled engines, which trace one lane, run
some of that code.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from popart_func.engines.tracing.source_lines import (
    TraceError,
    depends_on_values,
    describe_line,
    error_line,
    reads_values,
)

__all__ = ["named_errors"]

_READS = ("calling .item()", "data-dependent control flow", "data pointer of Tensor that doesn't have storage")
_SHAPES = ("can output dynamic shape", "can support dynamic shape")
_SETUP = "Give it one; a full backward hook of a module has none."
# Parts of PyTorch's messages, what can't be done in lanes, and what to write instead.
_OTHERS = (
    ("doesn't work on out=", "`out=` can't be given", "Use what the function returns."),
    ("attempting to call Tensor.requires_grad_()", "`requires_grad_` can't be called", "Use torch.func.grad."),
    ("backward() called inside a functorch transform", "`backward` can't be called", "Use torch.func.grad."),
    ("must override the setup_context", "an autograd.Function without `setup_context` can't be called", _SETUP),
    ("support saved tensor hooks", "no gradient can be taken under saved tensors' hooks", "Leave saved_tensors_hooks."),
)


@contextmanager
def named_errors(caller: str) -> Iterator[None]:
    """Replaces PyTorch's errors about `torch.vmap` by ones that name the line of the step.

    Args:
        caller: the function that the user has called.

    Raises:
        TypeError: the step draws random numbers without a key, or does something that `torch.vmap` refuses.
        TraceError: it reads values, or has shapes that depend on them.
    """
    try:
        yield
    except RuntimeError as error:
        explanation = _explained(caller, error)
        if explanation is None:
            raise
        raise explanation from error


def _explained(caller: str, error: RuntimeError) -> TypeError | None:
    """The error that says what PyTorch's means for a step; None for one of the user's own."""
    message = str(error)
    if "randomness error mode" in message:
        return TypeError(
            f"{caller}: random numbers can't be drawn inside `step` without a key, as dropout in training does, for "
            f"lanes would not have their own. Give a module one, stateless(module)(params, x, rngs=key), or enter "
            f"popart_func.random.keyed(key); draw with popart_func.random; or draw before, and pass numbers in xs."
        )
    line = error_line(error)
    if any(sign in message for sign in _READS):
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if any("distributions" in frame.f_code.co_filename for frame in frames):
            return TraceError(
                f"{caller}: a distribution checks the values of its arguments in {describe_line(line)}: give it "
                f"validate_args=False."
            )
        return reads_values(caller, line)
    if any(sign in message for sign in _SHAPES):
        return depends_on_values(caller, line)
    for sign, what, instead in _OTHERS:
        if sign in message:
            return TypeError(f"{caller}: {what} inside `step` in lanes, in {describe_line(line)}. {instead}")
    return None
