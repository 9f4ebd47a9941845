"""Programs with loops: a table of them under transforms, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import popart_func as pf
from popart_func.engines.tracing.shapes import TensorSpec
from popart_func.engines.tracing.step_graph import StepGraph
from popart_func.engines.tracing.tracer import trace_step


def close(got: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal but for the order of sums, in float64."""
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def traced(function: Callable[..., Any], *arguments: Any) -> StepGraph:
    leaves, structure = optree.tree_flatten(arguments)
    return trace_step(function, structure, [TensorSpec.of(leaf) for leaf in leaves])


def replayed(graph: StepGraph, *arguments: Any) -> Any:
    outputs = graph.module(*optree.tree_leaves(arguments), *graph.constants)
    return optree.tree_unflatten(graph.out_structure, outputs)


def numbers(*shape: int) -> Tensor:
    """The same numbers for the same shape, none of them 0 and no two alike."""
    generator = torch.Generator().manual_seed(len(shape) + 10 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Doubling(torch.autograd.Function):
    """Rounds, with a gradient of 2: the derivative of its forward would be 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return 2 * cotangent


def recurrent(weight: Tensor, h: Tensor, xs: Tensor, **options: Any) -> Tensor:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(weight @ h + x)
        return h, (h * h).sum()

    h, ys = pf.scan(step, h, xs, **options)
    return (ys * torch.arange(len(ys))).sum() + h.sum()


def gradient_inside(params: dict[str, Tensor], h: Tensor, xs: Tensor) -> Tensor:
    """Closed-over parameters go into a gradient within the body, and a value is detached."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = grad(lambda p: (torch.tanh(p["w"] @ h + p["b"]) * x).sum())(params)
        h = torch.tanh(params["w"] @ h + x) + 0.1 * inner["b"]
        return h, (h.detach() * h).sum()

    h, ys = pf.scan(step, h, xs)
    return ys.sum() + h.sum()


def tangent_inside(params: dict[str, Tensor], h: Tensor) -> Tensor:
    """Closed-over parameters go into a forward derivative, a map and a Jacobian within the body."""

    def body(i: Tensor, h: Tensor) -> Tensor:
        _, moved = jvp(lambda w: torch.tanh(w @ h), (params["w"],), (params["w"],))
        rows = vmap(lambda row: (row * h).sum())(params["w"])
        return torch.tanh(moved + rows + jacfwd(torch.sin)(params["b"]).diagonal())

    return pf.fori_loop(0, 3, body, h).sum()


def straight_through(h: Tensor, xs: Tensor) -> Tensor:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(Doubling.apply(h * 3) + x * h)
        return h, Doubling.apply(h)

    h, ys = pf.scan(step, h, xs, reverse=True)
    return ys.sum() + h.sum()


def grown(x: Tensor, limit: Tensor) -> Tensor:
    return pf.while_loop(lambda s: (s * s).sum() < limit, lambda s: s * 1.3 + 0.01, x)


def chosen(x: Tensor, weight: Tensor) -> Tensor:
    return pf.cond(x.sum() > 0, lambda x: torch.sin(weight @ x), lambda x: (x * x) @ weight, x)


def nested(weight: Tensor, x: Tensor, data: Tensor) -> Tensor:
    """Updates, epochs, minibatches; gradients and a choice within."""

    def update(carry: Any, d: Tensor) -> Any:
        def epoch(w: Tensor, e: Tensor) -> Any:
            def minibatch(w: Tensor, m: Tensor) -> Any:
                g = grad(lambda w: ((torch.tanh(w @ d) - m) ** 2).sum())(w)
                w = pf.cond(g.sum() > 0, lambda w, g: w - 0.1 * g, lambda w, g: w - 0.05 * g, w, g)
                return w, (w * m).sum()

            w, losses = pf.scan(minibatch, w, torch.stack([d * e, d + e]))
            return w, losses.sum()

        w, count = carry
        w, losses = pf.scan(epoch, w, torch.arange(1.0, 4.0, dtype=torch.float64))
        return (w, count + 1), losses.sum()

    (w, count), losses = pf.scan(update, (weight, torch.tensor(0)), data)
    return losses.sum() + count * (w @ x).sum()


def powers(x: Tensor) -> Tensor:
    return pf.fori_loop(0, 4, lambda i, c: 0.5 * c * c + i, x).sum()


W, H, XS, MANY = 0.5 * numbers(3, 3), numbers(3), numbers(5, 3), numbers(4, 3)
PARAMS = {"w": W, "b": numbers(3) + 0.1}
LIMIT = torch.tensor(50.0, dtype=torch.float64)

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "scan": (recurrent, (W, H, XS)),
    "scan, grad": (grad(recurrent, argnums=(0, 1, 2)), (W, H, XS)),
    "scan in reverse, grad": (grad(lambda *a: recurrent(*a, reverse=True), argnums=(0, 1, 2)), (W, H, XS)),
    "scan, jvp": (lambda *a: jvp(recurrent, a, a), (W, H, XS)),
    "scan, jacfwd": (jacfwd(recurrent), (W, H, XS)),
    "scan, jacrev": (jacrev(lambda *a: torch.stack([recurrent(*a), a[1].sum()]), argnums=1), (W, H, XS)),
    "scan, hessian": (hessian(recurrent, argnums=1), (W, H, XS)),
    "scan, jacrev twice": (jacrev(jacrev(recurrent, argnums=1), argnums=1), (W, H, XS)),
    "scan, vmap of grad": (vmap(grad(recurrent), (None, 0, None)), (W, MANY, XS)),
    "scan, vmap over other axes": (vmap(grad(recurrent), (2, None, 1)), (numbers(3, 3, 4), H, numbers(5, 4, 3))),
    "scan, grad of vmap": (grad(lambda *a: vmap(recurrent, (None, 0, None))(*a).sum()), (W, MANY, XS)),
    "scan, vmap twice": (vmap(vmap(recurrent, (None, 0, None)), (0, None, None)), (numbers(2, 3, 3), MANY, XS)),
    "closed over": (gradient_inside, (PARAMS, H, XS)),
    "closed over, grad": (grad(gradient_inside), (PARAMS, H, XS)),
    "closed over, vmap of grad": (
        vmap(grad(gradient_inside), ({"w": None, "b": 0}, 0, None)),
        ({"w": W, "b": MANY + 0.1}, MANY, XS),
    ),
    "closed over, hessian": (hessian(lambda h: gradient_inside(PARAMS, h, XS)), (H,)),
    "closed over, other transforms": (tangent_inside, (PARAMS, H)),
    "closed over, vmap of grad of other transforms": (
        vmap(grad(tangent_inside), ({"w": None, "b": 0}, 0)),
        ({"w": W, "b": MANY + 0.1}, MANY),
    ),
    "custom function, grad": (grad(straight_through, argnums=(0, 1)), (H, XS)),
    **{
        f"checkpoint {every}{', reverse' * back}, grad": (
            grad(lambda *a, e=every, b=back: recurrent(*a, checkpoint=e, reverse=b), argnums=(0, 1, 2)),
            (W, H, XS),
        )
        for every, back in ((2, False), (2, True), (5, False))
    },
    "while_loop": (grown, (H, LIMIT)),
    "while_loop, vmap": (vmap(grown, (0, None)), (MANY, LIMIT)),
    "while_loop, vmap twice": (vmap(vmap(grown, (None, 0)), (0, None)), (MANY, LIMIT * numbers(5).abs())),
    "while_loop, jvp": (lambda *a: jvp(grown, a, a), (H, LIMIT)),
    "while_loop, vmap of jacfwd": (vmap(jacfwd(grown), (0, None)), (MANY, LIMIT)),
    "cond": (chosen, (H, W)),
    "cond, vmap": (vmap(chosen, (0, None)), (MANY, W)),
    "cond, vmap of grad": (vmap(grad(lambda *a: chosen(*a).sum(), argnums=(0, 1)), (0, None)), (MANY, W)),
    "cond, grad of vmap": (grad(lambda *a: vmap(chosen, (0, None))(*a).sum(), argnums=(0, 1)), (MANY, W)),
    "cond, hessian": (hessian(lambda x: chosen(x, W).sum()), (H,)),
    "cond, one predicate": (
        lambda p, x: vmap(jacrev(lambda x: pf.cond(p, torch.sin, torch.cos, x)))(x),
        (torch.tensor(True), MANY),
    ),
    "fori_loop, grad": (grad(powers), (H,)),
    "fori_loop to a tensor": (
        lambda n, x: pf.fori_loop(0, n, lambda i, c: c * 1.1 + i, x),
        (torch.tensor(4), H),
    ),
    "nested": (nested, (W, H, XS)),
    "nested, grad": (grad(nested, argnums=(0, 1)), (W, H, XS)),
    "nested, vmap of grad": (vmap(grad(nested), (None, 0, None)), (W, MANY, XS)),
}


# One kernel for some of them: each costs half a second to compile.
ON_NATIVE = (
    *("scan in reverse, grad", "closed over, vmap of grad", "checkpoint 2, reverse, grad"),
    *("while_loop, vmap of jacfwd", "cond, vmap of grad", "cond, one predicate", "nested, grad"),
)

LANES = 3


def lanes_of(arguments: Any) -> Any:
    """The arguments in lanes that differ."""
    return optree.tree_map(
        lambda leaf: torch.stack([leaf * (1 + 0.1 * n) if leaf.is_floating_point() else leaf for n in range(LANES)]),
        arguments,
    )


def in_one_step(programs: dict[str, tuple[Callable[..., Any], Any]]) -> tuple[Callable[..., Any], Any]:
    """A step that runs programs side by side, and its carry: one kernel for all of them."""
    carry = {name: lanes_of(arguments) for name, (_, arguments) in programs.items()}
    return lambda c, _: (c, {name: function(*c[name]) for name, (function, _) in programs.items()}), carry


def rows_of_all_lengths(carry: Any, x: Any, hparams: Any) -> Any:
    """Loops over rows that fill no register and more than one, of the carry, of an x, of constants and of parameters.

    Rows that a body writes lie between others, which must stay as they are; those of an input have no room behind. What
    a body computes once, or needs at the end of a round, must not lie where its products put what they need between.
    """
    short, long = carry
    rows, square = torch.arange(35.0).reshape(7, 5), torch.cos(torch.arange(400.0)).reshape(20, 20) / 5

    def step(c: Any, row: Any) -> Any:
        short, long = c
        from_x, constant = row
        fixed = square @ carry[1]  # the same in each round
        new = torch.tanh(short + from_x[:5] * hparams) + constant
        long = square @ (square @ torch.tanh(long + fixed))
        long = pf.cond(
            new.sum() > 0, lambda a, b: (a * 0.5 + b, square @ (square @ b)), lambda a, b: (b - a, b), long, from_x
        )
        long, other = long
        before = square[:5, :5] @ (square[:5, :5] @ short)
        return (new, long), (new * 2, long * 3, other.reshape(4, 5).flip(0), before, new.sum() > 0)

    (short, long), forward = pf.scan(step, (short, long), (x, rows))
    (short, long), backward = pf.scan(step, (short, long), (x, forward[0]), reverse=True)
    long, short = pf.while_loop(
        lambda a: a[0].square().sum() < 900,
        lambda a: (a[0] * 1.5 + 1, square[:5, :5] @ (square[:5, :5] @ a[1])),
        (long, short),
    )
    return (short, long), (forward, backward)


def stacks_become_the_carry(carry: Any, x: Any) -> Any:
    """The new carry is what loops give, in the order in which they read the old one, in reverse, and changed over."""
    ahead, back, one, other = carry
    _, ahead_after = pf.scan(lambda h, z: (h, ahead[-1] - z), x, ahead)
    _, back_after = pf.scan(lambda h, z: (h, back.flip(0)[0] + z * x), x, back, reverse=True)
    one, other = pf.cond(x > 0, lambda a, b: (b * 0.5, a + x), lambda a, b: (a, b), one, other)
    return (ahead_after, back_after, one, other), ()


class Program(NamedTuple):
    """A random program, from a vector of three numbers to one, and whether it has a gradient."""

    run: Callable[[Tensor], Tensor]
    has_gradient: bool


def random_program(seed: int, depth: int = 3) -> Program:
    """A random nest of loops, choices and operations."""
    return _block(random.Random(seed), depth)


def _block(draw: random.Random, depth: int) -> Program:
    parts = [_part(draw, depth) for _ in range(draw.randint(1, 3))]

    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part.run(x)
        return x

    return Program(run, all(part.has_gradient for part in parts))


def _part(draw: random.Random, depth: int) -> Program:
    a, b = draw.uniform(-1.5, 1.5), draw.uniform(-1, 1)
    kinds = ["affine", "sine", "roll"] + ["scan", "scan", "cond", "while", "fori", "mapped"] * (depth > 0)
    kind = draw.choice(kinds)
    if kind == "affine":
        return Program(lambda x: torch.tanh(a * x + b), True)
    if kind == "sine":
        return Program(lambda x: torch.sin(x + b) + 0.1 * x.sum(), True)
    if kind == "roll":
        return Program(lambda x: torch.cat([x[1:], x[:1] * a]), True)
    inner = _block(draw, depth - 1)
    if kind == "scan":
        length, options = draw.randint(1, 4), {"reverse": draw.random() < 0.5, "checkpoint": draw.choice([None, 2])}

        def scanned(x: Tensor) -> Tensor:
            def step(carry: Any, z: Tensor) -> Any:
                c, n = carry
                c = inner.run(c + z * x.sum())
                return (c, n + 1), torch.tanh(c * b)

            (c, n), ys = pf.scan(step, (x, torch.tensor(0)), torch.linspace(a, 1, length, dtype=x.dtype), **options)
            return torch.tanh(c + ys.sum(0) * n)

        return Program(scanned, inner.has_gradient)
    if kind == "cond":
        other = _block(draw, depth - 1)
        return Program(
            lambda x: pf.cond(x.sum() > b, inner.run, lambda x: other.run(x * a), x),
            inner.has_gradient and other.has_gradient,
        )
    if kind == "while":
        limit = draw.randint(1, 4)

        def looped(x: Tensor) -> Tensor:
            start = (x, torch.tensor(0))
            going = lambda s: (s[1] < limit) & (s[0].sum() < 2.5)  # noqa: E731
            return pf.while_loop(going, lambda s: (inner.run(s[0]) + 0.3, s[1] + 1), start)[0]

        return Program(looped, False)
    if kind == "fori":
        rounds = draw.randint(1, 3)
        return Program(lambda x: pf.fori_loop(0, rounds, lambda i, c: inner.run(c + b * i), x), inner.has_gradient)
    return Program(lambda x: vmap(inner.run)(torch.stack([x, x * a])).sum(0).tanh(), inner.has_gradient)


def transformed(seed: int, program: Program) -> Callable[[Tensor], Any]:
    """A random program under a transform that it has."""
    total = lambda x: program.run(x).sum()  # noqa: E731
    batch = lambda f: lambda x: vmap(f)(torch.stack([x, 0.5 - x, 2 * x]))  # noqa: E731
    forward = [program.run, batch(program.run), lambda x: jvp(program.run, (x,), (x,)), batch(jacfwd(total))]
    reverse = [grad(total), batch(grad(total)), jacrev(program.run), hessian(total)]
    return random.Random(seed).choice(forward + reverse * program.has_gradient)


def random_programs(seeds: range) -> dict[str, tuple[Callable[..., Any], Any]]:
    return {str(seed): (transformed(seed, random_program(seed)), (H,)) for seed in seeds}
