"""`WhileLoop`: a body that runs as long as a condition holds; its maps and derivatives. It has no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from popart_func.engines.loops.bodies import check_carry_stays, in_dtype_of, replay, trace_bodies
from popart_func.engines.loops.primitive import Loop, Maybe, Tensors, is_real
from popart_func.engines.tracing.loop_nodes import Body
from popart_func.engines.tracing.shapes import TensorSpec

__all__ = ["NO_GRADIENT", "WhileLoop", "where_lanes"]

NO_GRADIENT = (
    "while_loop: it has no gradient in reverse mode, since the number of rounds is not known and nothing can be stored "
    "for each of them: use scan with a mask over the most rounds that there can be, or forward mode (jvp, jacfwd)."
)


def where_lanes(going: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new value in lanes that go on, else the old one; the lanes are the leading axis."""
    return torch.where(going.reshape(-1, *(1 for _ in new.shape[1:])), new, old)


@dataclass(frozen=True, eq=False)
class WhileLoop(Loop):
    """Operands are the carry and what condition and body close over.

    Attributes:
        caller: the function that the user has called, for errors.
        condition: (carry, closed over) -> a bool.
        body: (carry, closed over) -> carry.
        carries: how many tensors the carry has.
    """

    caller: str
    condition: Body
    body: Body
    carries: int

    name = "while_loop"

    @property
    def bodies(self) -> tuple[tuple[str, Body], ...]:
        """Condition and body, each with the words that introduce it in a printed graph."""
        return ("while", self.condition), (f"do; carry: {self.carries}", self.body)

    @property
    def rounds(self) -> int:
        """1, since the number of rounds is not known."""
        return 1

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the results."""
        return self.body.outputs

    def run(self, tensors: Tensors) -> list[Tensor]:
        """The results, computed in Python."""
        carry, constants = list(tensors[: self.carries]), tensors[self.carries :]
        while replay(self.condition, [*carry, *constants])[0]:
            carry = replay(self.body, [*carry, *constants])
        return [leaf.clone() for leaf in carry]

    def for_engines(self) -> tuple[Loop, list[Tensor]]:
        """The loop with its ops taken apart, and further operands."""
        functions = [lambda *t: replay(self.condition, t), lambda *t: replay(self.body, t)]
        (condition, body), more = trace_bodies(self.caller, functions, self.body.inputs, keeps_ops=False)
        return replace(self, condition=condition, body=body), more

    def mapped(self, size: int, axes: Sequence[int | None], tensors: Tensors) -> tuple[list[Tensor], list[int | None]]:
        """The results in lanes; see `Loop.mapped`."""
        inputs, carry = self.body.reached_from([axis is not None for axis in axes], self.carries)
        going = any(inputs[position] for position in self.condition.dependencies[0])
        if going:  # a lane that is done keeps its carry, so that all of it is the lane's own
            inputs[: self.carries] = carry = [True] * self.carries
        moved, specs = [], []
        for tensor, axis, is_mapped, spec in zip(tensors, axes, inputs, self.body.inputs, strict=True):
            own = tensor if axis is None else tensor.movedim(axis, 0)
            moved.append(own.expand(size, *own.shape) if axis is None and is_mapped else own)
            specs.append(spec._replace(shape=(size, *spec.shape)) if is_mapped else spec)
        in_dims = tuple(0 if one else None for one in inputs)
        condition = vmap(lambda *t: replay(self.condition, t)[0], in_dims, out_dims=0 if going else None)
        out_dims: Any = tuple(0 if one else None for one in carry)
        step = vmap(lambda *t: tuple(replay(self.body, t)), in_dims, out_dims)

        def masked(*flat: Tensor) -> list[Tensor]:
            goes_on = condition(*flat)
            return [where_lanes(goes_on, new, old) for new, old in zip(step(*flat), flat, strict=False)]

        any_lane: Callable[..., list[Tensor]] = lambda *t: [condition(*t).any() if going else condition(*t)]  # noqa: E731
        results = self._with_bodies(any_lane, masked if going else step, specs, moved, self.carries)
        return results, [0 if one else None for one in carry]

    def pushed_forward(self, tensors: Tensors, tangents: Maybe) -> Maybe:
        """The tangents of the results, by a loop that computes them along with the values."""
        given = [tangent is not None and is_real(tensor) for tensor, tangent in zip(tensors, tangents, strict=True)]
        inputs, _ = self.body.reached_from(given, self.carries)
        active = [one and is_real(spec) for one, spec in zip(inputs, self.body.inputs, strict=True)]
        places = [n for n, one in enumerate(active) if one]
        carried = [n for n in places if n < self.carries]
        order = [
            *((n, False) for n in range(self.carries)),
            *((n, True) for n in carried),
            *((n, False) for n in range(self.carries, len(tensors))),
            *((n, True) for n in places if n >= self.carries),
        ]
        filled = [
            torch.zeros_like(t) if m is None else in_dtype_of(t, m) for t, m in zip(tensors, tangents, strict=True)
        ]
        operands = [filled[n] if is_tangent else tensors[n] for n, is_tangent in order]

        def primals(flat: Sequence[Tensor]) -> list[Tensor]:
            return [value for value, (_, is_tangent) in zip(flat, order, strict=True) if not is_tangent]

        def step(*flat: Tensor) -> list[Tensor]:
            values, tangent = primals(flat), dict(zip(order, flat, strict=True))

            def of_active(*chosen: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
                given = list(values)
                for n, value in zip(places, chosen, strict=True):
                    given[n] = value
                results = replay(self.body, given)
                return tuple(results[n] for n in carried), results

            chosen = tuple(values[n] for n in places)
            found: Any = jvp(of_active, chosen, tuple(tangent[n, True] for n in places), has_aux=True)
            outputs, moved, results = found
            return [*results, *(in_dtype_of(*pair) for pair in zip(outputs, moved, strict=True))]

        specs = [self.body.inputs[n] for n, _ in order]
        if not carried:
            return [None] * self.carries
        condition: Callable[..., list[Tensor]] = lambda *t: replay(self.condition, primals(t))  # noqa: E731
        results = self._with_bodies(condition, step, specs, operands, self.carries + len(carried))
        found = dict(zip(carried, results[self.carries :], strict=True))
        return [found.get(n) for n in range(self.carries)]

    def pulled_back(self, needed: Sequence[bool], tensors: Tensors, cotangents: Maybe) -> Maybe:
        """The gradients of the operands; see `Loop.pulled_back`."""
        raise NotImplementedError(NO_GRADIENT)

    def _with_bodies(
        self,
        condition: Callable[..., Sequence[Tensor]],
        body: Callable[..., Sequence[Tensor]],
        specs: Sequence[TensorSpec],
        operands: Tensors,
        carries: int,
    ) -> list[Tensor]:
        """The results of a loop with other bodies."""
        (test, step), more = trace_bodies(self.caller, (condition, body), specs)
        check_carry_stays(self.caller, step, carries)
        return replace(self, condition=test, body=step, carries=carries)(*operands, *more)
