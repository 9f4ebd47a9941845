"""`fori_loop`, `while_loop` and `cond`, and the `scan` inside a step: loops with the meaning that they have in JAX.

While a step is traced each of them becomes one node of its graph, whose body is traced once; elsewhere it runs in
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor

from popart_func.engines.loops.arguments import (
    Outline,
    check_function,
    check_length,
    check_predicate,
    check_same,
    check_tensors,
    pair,
)
from popart_func.engines.loops.bodies import closed, trace_body, with_same_inputs
from popart_func.engines.loops.cond_loop import Cond
from popart_func.engines.loops.in_python import cond_in_python, scan_in_python, while_in_python
from popart_func.engines.loops.scan_loop import ScanLoop
from popart_func.engines.loops.while_loop import WhileLoop
from popart_func.engines.tracing.recorder import is_recording
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.tree import PyTree

__all__ = ["cond", "fori_loop", "inner_scan", "while_loop"]


def inner_scan(
    step: Callable[..., Any],
    carry: PyTree,
    xs: PyTree,
    *,
    length: int | None,
    reverse: bool,
    unroll: int,
    checkpoint: int | None,
) -> tuple[PyTree, PyTree]:
    """`scan` inside a step or a transform, where no engine can run it alone."""
    caller = "scan"
    check_function(caller, "step", step)
    start = Outline.of(caller, "`carry`", carry)
    rounds = check_length(caller, xs, length)
    if not is_recording() and rounds:
        return scan_in_python(step, carry, xs, rounds, reverse)
    carry_leaves, xs_leaves = optree.tree_leaves(carry), optree.tree_leaves(xs)
    both: PyTree = (carry, xs)
    structure, y_structures = optree.tree_structure(both), []

    def flat(*leaves: Tensor) -> list[Tensor]:
        given: Any = optree.tree_unflatten(structure, leaves)
        new, y = pair(caller, step(*given))
        check_same(caller, "step", start, new)
        y_leaves, y_structure = optree.tree_flatten(y)
        y_structures.append(y_structure)
        return [*optree.tree_leaves(new), *y_leaves]

    specs = [TensorSpec.of(leaf) for leaf in carry_leaves]
    specs += [TensorSpec.of(leaf)._replace(shape=tuple(leaf.shape[1:])) for leaf in xs_leaves]
    body, constants = closed(caller, flat, specs)
    loop = ScanLoop(caller, body, len(carry_leaves), len(xs_leaves), rounds, reverse, unroll=unroll)
    if rounds == 0:
        results = [
            *carry_leaves,
            *(torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in loop.outputs[len(carry_leaves) :]),
        ]
    else:
        results = _checkpointed(loop, carry_leaves, xs_leaves, constants, checkpoint)
    new_carry: PyTree = optree.tree_unflatten(structure.child(0), results[: len(carry_leaves)])
    ys: PyTree = optree.tree_unflatten(y_structures[0], results[len(carry_leaves) :])
    return new_carry, ys


def _checkpointed(
    loop: ScanLoop, carry: list[Tensor], xs: list[Tensor], constants: Sequence[Tensor], every: int | None
) -> list[Tensor]:
    """Runs a scan as a scan over scans of ``every`` rounds; the backward loop computes each inner scan again."""
    if every is None or every >= loop.length:
        return loop(*carry, *xs, *constants)
    inner, many, carries = replace(loop, length=every), loop.length // every, loop.carries
    rest = loop.length - many * every
    # The rounds that are left over come last.
    within = slice(rest, None) if loop.reverse else slice(0, many * every)
    beyond = slice(0, rest) if loop.reverse else slice(many * every, None)
    parts = [x[within].reshape(many, every, *x.shape[1:]) for x in xs]
    specs = [TensorSpec.of(one) for one in carry]
    specs += [TensorSpec.of(part)._replace(shape=tuple(part.shape[1:])) for part in parts]
    specs += [TensorSpec.of(one) for one in constants]
    body, more = trace_body(loop.caller, lambda *t: inner(*t), specs)
    outer = replace(loop, body=body, length=many, recomputes=True)
    results = outer(*carry, *parts, *constants, *more)
    ys = [y.reshape(many * every, *y.shape[2:]) for y in results[carries:]]
    if not rest:
        return [*results[:carries], *ys]
    last = replace(loop, length=rest)(*results[:carries], *(x[beyond] for x in xs), *constants)
    pairs = zip(ys, last[carries:], strict=True)
    return [*last[:carries], *(torch.cat([b, a] if loop.reverse else [a, b]) for a, b in pairs)]


def fori_loop(lower: int | Tensor, upper: int | Tensor, body: Callable[..., PyTree], carry: PyTree) -> PyTree:
    """Runs ``carry = body(i, carry)`` for i from ``lower`` to ``upper - 1``, as `jax.lax.fori_loop` does.

    With Python integers as bounds it is a `scan`, which has gradients. With a tensor as a bound it is a `while_loop`,
    which has none in reverse mode.

    Args:
        lower: the first i, an integer or an integer tensor of shape ().
        upper: one more than the last i.
        body: pure, ``body(i, carry) -> carry``, with i an int64 tensor of shape (); the carry keeps its structure,
            shapes and dtypes.
        carry: a pytree of tensors.

    Returns:
        The last carry.

    Raises:
        TypeError: ``body`` returns a carry of another structure, shape or dtype; or an argument has a wrong type.

    >>> fori_loop(1, 5, lambda i, product: product * i, torch.tensor(1))
    tensor(24)
    """
    check_function("fori_loop", "body", body)
    check_tensors("fori_loop", "`carry`", carry)
    for name, bound in (("lower", lower), ("upper", upper)):
        if not isinstance(bound, int) and not _is_integer(bound):
            raise TypeError(f"fori_loop: `{name}` must be an integer or an integer tensor of shape (), got {bound!r}.")
    start = Outline.of("fori_loop", "`carry`", carry)

    def step(carry: PyTree, i: Tensor) -> tuple[PyTree, tuple[()]]:
        new = body(i, carry)
        check_same("fori_loop", "body", start, new)
        return new, ()

    if isinstance(lower, int) and isinstance(upper, int):
        if upper <= lower:
            return carry
        return inner_scan(
            step,
            carry,
            torch.arange(lower, upper),
            length=None,
            reverse=False,
            unroll=1,
            checkpoint=None,
        )[0]
    first, last = torch.as_tensor(lower).long(), torch.as_tensor(upper).long()
    return while_loop(
        lambda state: state[0] < last, lambda state: (state[0] + 1, step(state[1], state[0])[0]), (first, carry)
    )[1]


def _is_integer(bound: Any) -> bool:
    """Whether a bound is an integer tensor without axes."""
    if not isinstance(bound, Tensor) or bound.ndim:
        return False
    return not (bound.is_floating_point() or bound.is_complex() or bound.dtype == torch.bool)


def while_loop(cond: Callable[..., Any], body: Callable[..., PyTree], carry: PyTree) -> PyTree:
    """Runs ``carry = body(carry)`` as long as ``cond(carry)`` is true, as `jax.lax.while_loop` does.

    In the lanes of `torch.vmap` and of `scan_lanes` it runs until the last lane is done. A lane that is done keeps its
    carry. A lane without any round raises the errors of the body on the engine `eager`, while other lanes have rounds.
    There are derivatives in forward mode (`jvp`, `jacfwd`), and none in reverse mode.

    Args:
        cond: pure, ``cond(carry)`` -> a bool tensor of shape ().
        body: pure, ``body(carry) -> carry``; the carry keeps its structure, shapes and dtypes.
        carry: a pytree of tensors.

    Returns:
        The last carry.

    Raises:
        TypeError: ``body`` returns a carry of another structure, shape or dtype, or ``cond`` no bool.
        NotImplementedError: when a gradient is taken in reverse mode.

    >>> while_loop(lambda x: x < 100, lambda x: 2 * x, torch.tensor(3))
    tensor(192)
    """
    caller = "while_loop"
    check_function(caller, "cond", cond)
    check_function(caller, "body", body)
    leaves = check_tensors(caller, "`carry`", carry)
    if not is_recording():
        return while_in_python(cond, body, carry)
    start = Outline.of(caller, "`carry`", carry)

    def condition(*flat: Tensor) -> list[Tensor]:
        return [check_predicate(caller, "what `cond` returns", cond(optree.tree_unflatten(start.structure, flat)))]

    def step(*flat: Tensor) -> list[Tensor]:
        after = body(optree.tree_unflatten(start.structure, flat))
        check_same(caller, "body", start, after)
        return optree.tree_leaves(after)

    specs = [TensorSpec.of(leaf) for leaf in leaves]
    traced = [closed(caller, function, specs) for function in (condition, step)]
    (test, do), constants = with_same_inputs(traced, len(leaves))
    results: Any = WhileLoop(caller, test, do, len(leaves))(*leaves, *constants)
    return optree.tree_unflatten(start.structure, results)


def cond(
    predicate: bool | Tensor, true: Callable[..., PyTree], false: Callable[..., PyTree], *operands: PyTree
) -> PyTree:
    """Returns ``true(*operands)`` or ``false(*operands)``, as `jax.lax.cond` does.

    In the lanes of `torch.vmap`, and of `scan_lanes` on the engine `eager`, both branches run for all lanes if the
    predicate has a value in each lane, and each lane selects the results of its branch. So an error in a branch that a
    lane does not take, such as an index out of range, is raised. Operands, and tensors that a branch closes over, have
    a gradient of 0 through the branch that is not taken, also where it divides by 0 or overflows. On the engine
    `native` a branch runs if some lane of a block takes it, and errors of the other lanes are not raised.

    Args:
        predicate: a bool, or a bool tensor of shape ().
        true: pure, from the operands to a pytree of tensors.
        false: pure, with results of the same structure, shapes and dtypes.
        operands: pytrees of tensors.

    Returns:
        What the chosen branch returns.

    Raises:
        TypeError: the branches return different structures, shapes or dtypes, or the predicate is no bool.

    >>> cond(torch.tensor(False), torch.sin, torch.cos, torch.tensor(0.0))
    tensor(1.)
    """
    caller = "cond"
    check_function(caller, "true", true)
    check_function(caller, "false", false)
    leaves = check_tensors(caller, "`operands`", operands)
    if isinstance(predicate, bool):
        return (true if predicate else false)(*operands)
    chooser = check_predicate(caller, "`predicate`", predicate)
    if not is_recording():
        return cond_in_python(chooser, true, false, operands)
    given_operands: PyTree = operands
    structure = optree.tree_structure(given_operands)
    returned: list[Outline] = []

    def branch(name: str, function: Callable[..., PyTree]) -> Callable[..., list[Tensor]]:
        def flat(*values: Tensor) -> list[Tensor]:
            given: Any = optree.tree_unflatten(structure, values)
            result = function(*given)
            if returned:
                check_same(caller, name, returned[0], result, "what `true` returns")
            else:
                returned.append(Outline.of(caller, f"what `{name}` returns", result))
            return optree.tree_leaves(result)

        return flat

    specs = [TensorSpec.of(leaf) for leaf in leaves]
    traced = [closed(caller, branch(name, one), specs) for name, one in (("true", true), ("false", false))]
    (first, second), constants = with_same_inputs(traced, len(leaves))
    results: Any = Cond(caller, first, second)(chooser, *leaves, *constants)
    return optree.tree_unflatten(returned[0].structure, results)
