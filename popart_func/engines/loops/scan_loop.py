"""`ScanLoop`: a body along the leading axis of xs, with a carry; its maps, derivatives and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import jvp, vjp, vmap

from popart_func.engines.loops.bodies import check_carry_stays, in_dtype_of, replay, trace_body
from popart_func.engines.loops.primitive import Loop, Maybe, Tensors, is_real
from popart_func.engines.loops.reverse import split_backward
from popart_func.engines.loops.same import covering
from popart_func.engines.tracing.loop_nodes import Body
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.engines.tracing.tidy import part_of

__all__ = ["ScanLoop"]


@dataclass(frozen=True, eq=False)
class ScanLoop(Loop):
    """Operands are the carry, the xs ``[length, ...]`` and what the body closes over, in this order.

    Attributes:
        caller: the function that the user has called, for errors.
        body: (carry, x, closed over) -> (carry, y).
        carries: how many tensors the carry has.
        xs: how many xs.
        length: how many rounds.
        reverse: whether the last x comes first.
        recomputes: whether the backward loop computes a round again from its carry, rather than stores values.
        unroll: how many rounds an engine may write as one, a hint.
    """

    caller: str
    body: Body
    carries: int
    xs: int
    length: int
    reverse: bool = False
    recomputes: bool = False
    unroll: int = 1

    name = "scan"

    @property
    def bodies(self) -> tuple[tuple[str, Body], ...]:
        """The body, with the words that introduce it in a printed graph."""
        order = ", in reverse" if self.reverse else ""
        return ((f"{self.length} rounds{order}; carry: {self.carries}, xs: {self.xs}", self.body),)

    @property
    def rounds(self) -> int:
        """How often the body runs."""
        return self.length

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Specs of the results."""
        carry, ys = self.body.outputs[: self.carries], self.body.outputs[self.carries :]
        return (*carry, *(spec._replace(shape=(self.length, *spec.shape)) for spec in ys))

    def run(self, tensors: Tensors) -> list[Tensor]:
        """The results, computed in Python."""
        carry, xs, constants = self._parts(tensors)
        ys: list[list[Tensor]] = []
        order = range(self.length)
        for time in reversed(order) if self.reverse else order:
            results = replay(self.body, [*carry, *(x[time] for x in xs), *constants])
            carry = results[: self.carries]
            ys.append(results[self.carries :])
        if self.reverse:
            ys.reverse()
        return [*(leaf.clone() for leaf in carry), *map(torch.stack, zip(*ys, strict=True))]

    def for_engines(self) -> tuple[Loop, list[Tensor]]:
        """The loop with its ops taken apart, and further operands."""
        body, more = trace_body(self.caller, lambda *t: replay(self.body, t), self.body.inputs, keeps_ops=False)
        return replace(self, body=body), more

    def mapped(self, size: int, axes: Sequence[int | None], tensors: Tensors) -> tuple[list[Tensor], list[int | None]]:
        """The results in lanes; see `Loop.mapped`."""
        inputs, outputs = self.body.reached_from([axis is not None for axis in axes], self.carries)
        moved, specs = [], []
        for position, (tensor, axis, is_mapped) in enumerate(zip(tensors, axes, inputs, strict=True)):
            start = int(self.carries <= position < self.carries + self.xs)  # an x has its time first
            if axis is not None:
                tensor = tensor.movedim(axis, start)
            elif is_mapped:
                tensor = tensor.expand(size, *tensor.shape)
            moved.append(tensor)
            spec = self.body.inputs[position]
            specs.append(spec._replace(shape=(size, *spec.shape)) if is_mapped else spec)
        in_dims, out_dims = (tuple(0 if one else None for one in places) for places in (inputs, outputs))
        function = vmap(lambda *t: tuple(replay(self.body, t)), in_dims, out_dims)  # type: ignore[arg-type]
        results = self._with_body(function, specs, moved, self.carries, self.xs)
        ends = [0] * self.carries + [1] * (len(outputs) - self.carries)
        return results, [place if one else None for place, one in zip(ends, outputs, strict=True)]

    def pushed_forward(self, tensors: Tensors, tangents: Maybe) -> Maybe:
        """The tangents of the results, by a loop that computes them along with the values."""
        given = [tangent is not None and is_real(tensor) for tensor, tangent in zip(tensors, tangents, strict=True)]
        active, outputs = self._active(given)
        places = [position for position, one in enumerate(active) if one]
        # Within each of carry, xs and constants, values come first and tangents after them.
        kinds = self._kinds(len(tensors))
        order = [
            (position, is_tangent)
            for kind in range(3)
            for is_tangent in (False, True)
            for position in range(len(tensors))
            if kinds[position] == kind and (active[position] or not is_tangent)
        ]
        filled = [
            torch.zeros_like(tensor) if tangent is None and one else in_dtype_of(tensor, tangent)
            for tensor, tangent, one in zip(tensors, tangents, active, strict=True)
        ]
        operands: list[Tensor] = [filled[p] if is_tangent else tensors[p] for p, is_tangent in order]
        carry_out = [n for n, one in enumerate(outputs) if one and n < self.carries]
        ys_out = [n for n, one in enumerate(outputs) if one and n >= self.carries]

        def function(*flat: Tensor) -> list[Tensor]:
            values = dict(zip(order, flat, strict=True))
            primals = [values[position, False] for position in range(len(tensors))]

            def of_active(*chosen: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
                given = list(primals)
                for position, value in zip(places, chosen, strict=True):
                    given[position] = value
                results = replay(self.body, given)
                return tuple(results[n] for n in (*carry_out, *ys_out)), results

            chosen, given = tuple(primals[p] for p in places), tuple(values[p, True] for p in places)
            found: Any = jvp(of_active, chosen, given, has_aux=True)
            outputs, moved, results = found
            moved = [in_dtype_of(*pair) for pair in zip(outputs, moved, strict=True)]
            carry_moved, ys_moved = moved[: len(carry_out)], moved[len(carry_out) :]
            return [*results[: self.carries], *carry_moved, *ys_moved]

        specs = [self.body.inputs[position] for position, _ in order]
        carries = self.carries + len(carry_out)
        xs = sum(kinds[position] == 1 for position, _ in order)
        results = self._with_body(function, specs, operands, carries, xs)
        moved = dict(zip((*carry_out, *ys_out), results[self.carries :], strict=True))
        return [moved.get(n) for n in range(len(self.outputs))]

    def pulled_back(self, needed: Sequence[bool], tensors: Tensors, cotangents: Maybe) -> Maybe:
        """The gradients of the operands, by a loop in the other direction.

        A second forward loop stores what the backward loop needs. `join_loops` joins it with the loop itself. The
        carry of the backward loop consists of the cotangents of the carry and the gradients of the constants so far.
        """
        active, outputs = self._active([one and is_real(t) for one, t in zip(needed, tensors, strict=True)])
        kinds = self._kinds(len(tensors))
        carry_out = [n for n in range(self.carries) if outputs[n]]
        ys_out = [n for n in range(self.carries, len(outputs)) if outputs[n] and cotangents[n] is not None]
        differentiated = [n for n, one in enumerate(active) if one]

        def joint(*flat: Tensor) -> list[Tensor]:
            primals, given = flat[: len(tensors)], flat[len(tensors) :]

            def of_active(*chosen: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
                values = list(primals)
                for position, value in zip(differentiated, chosen, strict=True):
                    values[position] = value
                results = replay(self.body, values)
                return tuple(results[n] for n in (*carry_out, *ys_out)), results

            found: Any = vjp(of_active, *(primals[n] for n in differentiated), has_aux=True)
            _, pull, results = found
            return [*results, *pull(tuple(given))]

        specs = [*self.body.inputs, *(self.body.outputs[n] for n in (*carry_out, *ys_out))]
        body, more = trace_body(self.caller, joint, specs)
        forward, backward = split_backward(
            body,
            len(self.body.outputs),
            self.carries,
            self.xs,
            range(len(tensors), len(specs)),
            recomputes=self.recomputes,
        )
        constants = [*tensors[self.carries + self.xs :], *more]
        before = [*tensors[: self.carries + self.xs], *constants]
        kept = replace(self, body=forward.body)(*before)[len(self.body.outputs) :] if forward.stored else []
        sums = [n for n in differentiated if kinds[n] == 2]
        x_grads = [n for n in differentiated if kinds[n] == 1]
        start = [torch.zeros_like(tensors[n]) if cotangents[n] is None else cotangents[n] for n in carry_out]
        start += [torch.zeros_like(tensors[n]) for n in sums]
        xs = [tensors[self.carries + n] for n in backward.xs]
        given = [cotangents[n] for n in ys_out]
        used = [constants[n] for n in backward.constants]
        sizes = (len(carry_out), len(sums), len(kept), len(xs), len(given), len(used))

        def step(*flat: Tensor) -> list[Tensor]:
            parts, begin = [], 0
            for size in sizes:
                parts.append(flat[begin : begin + size])
                begin += size
            moved, total, residuals, x, y_moved, closed = parts
            grads = dict(
                zip(differentiated, replay(backward.body, [*residuals, *x, *closed, *moved, *y_moved]), strict=True)
            )
            return [
                *(grads[n] for n in carry_out),
                *(one + grads[n] for one, n in zip(total, sums, strict=True)),
                *(grads[n] for n in x_grads),
            ]

        residual_specs = [TensorSpec.of(one)._replace(shape=tuple(one.shape[1:])) for one in (*kept, *xs, *given)]  # type: ignore[arg-type, union-attr]
        specs = [*(TensorSpec.of(one) for one in start), *residual_specs, *map(TensorSpec.of, used)]  # type: ignore[arg-type]
        back = replace(self, reverse=not self.reverse, recomputes=False)
        operands: list[Tensor] = [*start, *kept, *xs, *given, *used]  # type: ignore[list-item]
        results = back._with_body(step, specs, operands, len(start), len(residual_specs))
        found = dict(zip((*carry_out, *sums, *x_grads), results, strict=True))
        return [found.get(n) if one else None for n, one in enumerate(needed)]

    def simplify(self, node: fx.Node) -> None:
        """Removes results that nothing reads, and the operands that only they need."""
        places: Any = {part.args[1] for part in node.users}
        body, (carries, xs) = self.body, (self.carries, self.xs)
        needed = set(places)
        while True:  # what the results are computed from, over all rounds
            read = frozenset[int]().union(*(body.dependencies[place] for place in needed))
            more = needed | {position for position in read if position < carries}
            if more == needed:
                break
            needed = more
        outputs = [n for n in range(len(body.outputs)) if n in needed]
        inputs = [n for n in range(len(body.inputs)) if n in read or (n < carries and n in needed)]
        if len(outputs) == len(body.outputs) and len(inputs) == len(body.inputs):
            return
        part = part_of(body, [body.placeholders[n] for n in inputs], [body.results[n] for n in outputs])
        kept_carries = sum(n < carries for n in outputs)
        kept_xs = sum(carries <= n < carries + xs for n in inputs)
        node.target = replace(self, body=part, carries=kept_carries, xs=kept_xs)
        node.args = tuple(node.args[n] for n in inputs)
        node.meta["val"] = [node.meta["val"][n] for n in outputs]
        for user in list(node.users):
            place: Any = user.args[1]
            user.args = (node, outputs.index(place))

    def covers(self, node: fx.Node, other: fx.Node) -> list[int] | None:
        """Where this loop has the results of another node, if its body computes what that one does."""
        loop = other.target
        if not isinstance(loop, ScanLoop) or (loop.length, loop.reverse) != (self.length, self.reverse):
            return None
        return covering((loop.body, other.args, loop.carries, loop.xs), (self.body, node.args, self.carries, self.xs))

    def _with_body(
        self, function: object, specs: Sequence[TensorSpec], operands: Tensors, carries: int, xs: int
    ) -> list[Tensor]:
        """The results of a loop with another body."""
        body, more = trace_body(self.caller, function, specs)  # type: ignore[arg-type]
        check_carry_stays(self.caller, body, carries)
        return replace(self, body=body, carries=carries, xs=xs)(*operands, *more)

    def _active(self, given: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Which inputs and outputs of the body have derivatives, when these operands have one."""
        inputs, outputs = self.body.reached_from(given, self.carries)
        inputs = [one and is_real(spec) for one, spec in zip(inputs, self.body.inputs, strict=True)]
        return inputs, [one and is_real(spec) for one, spec in zip(outputs, self.body.outputs, strict=True)]

    def _kinds(self, operands: int) -> list[int]:
        """For each operand 0 if it is carry, 1 if it is an x, else 2."""
        return [0] * self.carries + [1] * self.xs + [2] * (operands - self.carries - self.xs)

    def _parts(self, tensors: Tensors) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        xs = self.carries + self.xs
        return list(tensors[: self.carries]), list(tensors[self.carries : xs]), list(tensors[xs:])
