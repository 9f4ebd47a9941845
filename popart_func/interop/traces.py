"""Traces a function for JAX: what PyTorch or the tracer raises becomes an error that names the user's line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch

from popart_func.engines.lane_scan import UnsupportedError, summary
from popart_func.engines.tracing.source_lines import TraceError, describe_line, user_line
from popart_func.engines.tracing.step_graph import StepGraph, TensorSpec
from popart_func.engines.tracing.tracer import trace_step
from popart_func.interop.trees import has_64_bits

__all__ = ["Traces"]


class Traces:
    """Traces one function, and remembers for which arguments PyTorch needs int64 where JAX has int32."""

    def __init__(self) -> None:
        self._widened: set[tuple[TensorSpec, ...]] = set()

    def trace(
        self, function: Callable[..., Any], structure: optree.PyTreeSpec, specs: Sequence[TensorSpec]
    ) -> StepGraph:
        """The step graph of a function.

        With JAX's 64-bit types off, int32 stands for both of PyTorch's dtypes: where PyTorch refuses it, as some ops do
        for indices, the function is traced with int64.

        Args:
            function: of flat tensors.
            structure: of the tuple of its arguments.
            specs: of its arguments.

        Raises:
            TraceError: the function reads values, has shapes that depend on values, or draws random numbers.
            UnsupportedError: it can't be traced for another reason, and runs in PyTorch.
            Exception: what the function itself raises in PyTorch.
        """
        key, wide = tuple(specs), [_widened(spec) for spec in specs]
        trace = lambda specs: trace_step(function, structure, specs, caller="to_jax_function")  # noqa: E731
        if key in self._widened:
            return trace(wide)
        try:
            return trace(specs)
        except (TraceError, UnsupportedError):
            raise
        except Exception as error:
            failure = error
        if wide != list(specs) and not has_64_bits():
            try:
                graph = trace(wide)
            except Exception as error:
                if isinstance(error, TraceError | UnsupportedError):
                    raise  # it says more than that PyTorch refuses a dtype
            else:
                self._widened.add(key)
                return graph
        raise _explained(function, [specs, wide], failure)


def _widened(spec: TensorSpec) -> TensorSpec:
    return spec._replace(dtype=torch.int64) if spec.dtype == torch.int32 else spec


def _explained(function: Callable[..., Any], several: list[Any], failure: Exception) -> Exception:
    """The error to raise: what the function raises in PyTorch, if that is of the same type."""
    errors = [_failure_in_pytorch(function, specs) for specs in several]
    if all(type(error) is type(failure) for error in errors):
        return errors[-1] or failure
    frames = [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]
    line = describe_line(next(filter(None, map(user_line, reversed(frames))), None))
    error = UnsupportedError(
        f"to_jax_function: the function can't be traced, in {line}: {summary(failure)} to_jax_callback runs it."
    )
    error.__cause__ = failure
    return error


def _failure_in_pytorch(function: Callable[..., Any], specs: Sequence[TensorSpec]) -> Exception | None:
    """What a function raises in PyTorch, given ones. Integers, which may be indices, are zeros."""
    is_real = [spec.dtype.is_floating_point or spec.dtype.is_complex for spec in specs]
    try:
        with torch.enable_grad():
            function(*(torch.full(spec.shape, one, dtype=spec.dtype) for spec, one in zip(specs, is_real, strict=True)))
    except Exception as error:
        return error
    return None
