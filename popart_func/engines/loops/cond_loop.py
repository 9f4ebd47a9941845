"""`Cond`: one of two bodies, by a predicate; its maps, derivatives and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from popart_func.engines.loops.bodies import in_dtype_of, replay, trace_bodies
from popart_func.engines.loops.primitive import Loop, Maybe, Tensors, is_real, wants_gradient
from popart_func.engines.stop_gradients import StopGradient, keeps_marks
from popart_func.engines.tracing.loop_nodes import Body
from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["Cond"]


@dataclass(frozen=True, eq=False)
class Cond(Loop):
    """Operands are the predicate, a bool without axes, and the inputs of both branches.

    Attributes:
        caller: the function that the user has called, for errors.
        true: operands -> results.
        false: operands -> results.
    """

    caller: str
    true: Body
    false: Body

    name = "cond"

    @property
    def bodies(self) -> tuple[tuple[str, Body], ...]:
        """The two branches, each with the word that introduces it in a printed graph."""
        return ("if", self.true), ("else", self.false)

    @property
    def rounds(self) -> int:
        """1: a branch runs at most once."""
        return 1

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the results."""
        return self.true.outputs

    def run(self, tensors: Tensors) -> list[Tensor]:
        """The results, computed in Python."""
        return [one.clone() for one in replay(self.true if tensors[0] else self.false, tensors[1:])]

    def for_engines(self) -> tuple[Loop, list[Tensor]]:
        """The loop with its ops taken apart, and further operands."""
        functions = [lambda *t: replay(self.true, t), lambda *t: replay(self.false, t)]
        (true, false), more = trace_bodies(self.caller, functions, self.true.inputs, keeps_ops=False)
        return replace(self, true=true, false=false), more

    def mapped(self, size: int, axes: Sequence[int | None], tensors: Tensors) -> tuple[list[Tensor], list[int | None]]:
        """The results in lanes; see `Loop.mapped`."""
        if axes[0] is not None:  # lanes choose differently: both branches run, and each lane takes its own

            def chosen(taken: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                true = replay(self.true, _with_gradient_where(taken, flat))
                false = replay(self.false, _with_gradient_where(taken.logical_not(), flat))
                return tuple(torch.where(taken, one, other) for one, other in zip(true, false, strict=True))

            return list(vmap(chosen, tuple(axes))(*tensors)), [0] * len(self.outputs)
        moved, specs = [], []
        for tensor, axis, spec in zip(tensors[1:], axes[1:], self.true.inputs, strict=True):
            moved.append(tensor if axis is None else tensor.movedim(axis, 0))
            specs.append(spec if axis is None else spec._replace(shape=(size, *spec.shape)))
        in_dims = tuple(None if axis is None else 0 for axis in axes[1:])
        branch = lambda body: vmap(lambda *t: tuple(replay(body, t)), in_dims)  # noqa: E731
        results = self._with_branches((branch(self.true), branch(self.false)), specs, [tensors[0], *moved])
        return results, [0] * len(self.outputs)

    def pushed_forward(self, tensors: Tensors, tangents: Maybe) -> Maybe:
        """The tangents of the results, by a loop that computes them along with the values."""
        places = [n for n, one in enumerate(tangents[1:]) if one is not None and is_real(tensors[1 + n])]
        real = [n for n, spec in enumerate(self.outputs) if is_real(spec)]
        moved = [in_dtype_of(tensors[1 + n], tangents[1 + n]) for n in places]

        def branch(body: Body) -> Callable[..., list[Tensor]]:
            def pushed(*flat: Tensor) -> list[Tensor]:
                primals, given = flat[: len(body.inputs)], flat[len(body.inputs) :]
                of_chosen = _of_chosen(body, primals, places, real)
                found: Any = jvp(of_chosen, tuple(primals[n] for n in places), tuple(given))
                outputs, moved = found
                return [in_dtype_of(*pair) for pair in zip(outputs, moved, strict=True)]

            return pushed

        specs = [*self.true.inputs, *(self.true.inputs[n] for n in places)]
        results = self._with_branches((branch(self.true), branch(self.false)), specs, [*tensors, *moved])
        found = dict(zip(real, results, strict=True))
        return [found.get(n) for n in range(len(self.outputs))]

    def pulled_back(self, needed: Sequence[bool], tensors: Tensors, cotangents: Maybe) -> Maybe:
        """The gradients of the operands; see `Loop.pulled_back`."""
        places = [n for n, one in enumerate(needed[1:]) if one and is_real(tensors[1 + n])]
        given = [n for n, one in enumerate(cotangents) if one is not None and is_real(self.outputs[n])]

        def branch(body: Body) -> Callable[..., list[Tensor]]:
            def pulled(*flat: Tensor) -> list[Tensor]:
                primals, moved = flat[: len(body.inputs)], flat[len(body.inputs) :]
                of_chosen = _of_chosen(body, primals, places, given)
                return list(vjp(of_chosen, *(primals[n] for n in places))[1](tuple(moved)))

            return pulled

        specs = [*self.true.inputs, *(self.outputs[n] for n in given)]
        operands: list[Tensor] = [*tensors, *(cotangents[n] for n in given)]  # type: ignore[list-item]
        results = self._with_branches((branch(self.true), branch(self.false)), specs, operands)
        found = dict(zip(places, results, strict=True))
        return [None, *(found.get(n) for n in range(len(tensors) - 1))]

    def _with_branches(
        self, functions: Sequence[Callable[..., Sequence[Tensor]]], specs: Sequence[TensorSpec], operands: Tensors
    ) -> list[Tensor]:
        """The results of the choice between other branches."""
        (true, false), more = trace_bodies(self.caller, functions, specs)
        return replace(self, true=true, false=false)(*operands, *more)


def _with_gradient_where(taken: Tensor, tensors: Tensors) -> list[Tensor]:
    """Inputs of a branch, with a gradient of 0, and not NaN, in the lanes that don't take it."""
    is_guarded = [is_real(one) and (keeps_marks() or wants_gradient(one)) for one in tensors]
    return [
        torch.where(taken, one, StopGradient.apply(one)) if guarded else one
        for one, guarded in zip(tensors, is_guarded, strict=True)
    ]


def _of_chosen(
    body: Body, values: Tensors, places: Sequence[int], results: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function from some inputs of a body to some of its outputs; the other inputs keep their values."""

    def function(*chosen: Tensor) -> tuple[Tensor, ...]:
        given = list(values)
        for n, value in zip(places, chosen, strict=True):
            given[n] = value
        found = replay(body, given)
        return tuple(found[n] for n in results)

    return function
