"""Loops inside a step: the same in Python, in a graph and on the native engine, under every transform."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import optree
import pytest
import torch
from loop_programs import (
    LANES,
    MANY,
    ON_NATIVE,
    PROGRAMS,
    XS,
    H,
    W,
    close,
    grown,
    in_one_step,
    numbers,
    random_program,
    random_programs,
    recurrent,
    replayed,
    rows_of_all_lengths,
    stacks_become_the_carry,
    traced,
    transformed,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import popart_func as pf
from popart_func import sweeps
from popart_func.engines.lane_scan import make_lane_scan
from popart_func.engines.native.engine import planned
from popart_func.engines.native.memory import share_memory
from popart_func.engines.tracing import tracer
from popart_func.sweeps.records import last

SCHEDULES = ("native:lanes", "native:elements")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_graph_computes_what_python_does(name: str):
    function, arguments = PROGRAMS[name]
    close(replayed(traced(function, *arguments), *arguments), function(*arguments))


@pytest.mark.parametrize(
    "names", [ON_NATIVE, *(pytest.param(tuple(PROGRAMS)[n::4], marks=pytest.mark.slow) for n in range(4))]
)
def test_native_computes_what_eager_does(names: tuple[str, ...]):
    step, carry = in_one_step({name: PROGRAMS[name] for name in names})
    _, expected = pf.scan_lanes(step, carry, length=1, engine="eager")
    for engine in SCHEDULES:
        _, got = pf.scan_lanes(step, carry, length=1, engine=engine)
        for name in names:
            close(got[name], expected[name])


def with_tangents(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


ODD = {
    # PyTorch gives the tangent of a 0-d tensor times a Python number in float64.
    "scan": with_tangents(lambda v: pf.scan(lambda g, r: (r + 0.99 * g, ()), v.sum(), v)[0]),
    "fori_loop": with_tangents(lambda v: pf.fori_loop(0, 3, lambda i, s: s * 0.3 + i, v.sum())),
    "while_loop": with_tangents(lambda v: pf.while_loop(lambda s: s > 0.1, lambda s: s * 0.3, v.square().sum())),
    "cond": with_tangents(lambda v: pf.cond(v.sum() > 0, lambda c: c * 0.3, lambda c: c.sin(), v.sum())),
    # Real results without a tangent.
    "a counter": with_tangents(lambda v: pf.scan(lambda c, t: ((c[0] * t, c[1] + 1.0), ()), (v, v[0] * 0), v)[0][0]),
    "a constant y": with_tangents(lambda v: pf.scan(lambda c, t: (c * t, torch.ones(2)), v, v)[0]),
    "a sum": torch.func.hessian(lambda v: pf.scan(lambda s, t: (s + (t * v).square().sum(), ()), 0 * v[0], v)[0]),
    # A result of a choice that nothing reads.
    "a choice": lambda v: pf.cond(v.sum() > 0, lambda z: (z * 3, z + 1), lambda z: (z.exp(), z), v)[0],
}


@pytest.mark.parametrize("schedule", ["lanes", "elements"])
def test_native_computes_odd_derivatives_and_choices(schedule: str) -> None:
    def step(carry: Tensor, _: None) -> tuple[Tensor, dict[str, Any]]:
        return carry, {name: function(carry) for name, function in ODD.items()}

    carry = torch.stack([torch.tensor([0.3, -0.7, 0.9]), torch.tensor([-0.4, -0.2, 0.1])])
    got, expected = (pf.scan_lanes(step, carry, length=1, engine=e)[1] for e in (f"native:{schedule}", "eager"))
    for name in ODD:
        torch.testing.assert_close(got[name].to(carry.dtype), expected[name].to(carry.dtype), msg=name)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_all_lengths(shared: bool):
    carry, rates = (torch.randn(LANES, 5), torch.randn(LANES, 20)), torch.rand(LANES)
    x = torch.randn(2, *(() if shared else (LANES,)), 7, 20)
    results = [
        pf.scan_lanes(rows_of_all_lengths, carry, x, hparams=rates, shared=shared, engine=engine)
        for engine in ("eager", *SCHEDULES)
    ]
    for result in results[1:]:
        close(result, results[0], 1e-5)


def test_a_stack_lies_over_the_carry_only_where_no_round_reads_that():
    carry = tuple(torch.randn(LANES, 5) for _ in range(4))
    results = [
        pf.scan_lanes(stacks_become_the_carry, carry, torch.tensor([1.0, -1.0, 0.5]), engine=engine)
        for engine in ("eager", *SCHEDULES)
    ]
    for result in results[1:]:
        close(result, results[0], 1e-5)


def test_memory_is_shared_within_loops_and_with_what_surrounds_them():
    step, carry = in_one_step({name: PROGRAMS[name] for name in ("nested, grad", "while_loop, jvp")})
    scan = make_lane_scan("scan", step, carry, None, length=1)
    plan = planned(scan, scan.graph())
    shared = share_memory(plan)
    taken = {new: old for new, old in shared.merged.items() if new not in plan.merged}
    assert {*shared.buffers, *taken} == set(plan.buffers)
    inside = {buffer for body in plan.inner() if body is not plan for buffer in body.buffers}
    inside -= {buffer for body in plan.inner() for buffer in body.program.inputs}
    assert {(new in inside, old in inside) for new, old in taken.items()} == set(product([True, False], repeat=2))


@pytest.mark.parametrize("length", [20, 200])
def test_gradients_of_a_gated_network_are_those_of_the_unrolled_one(length: int):
    cell = nn.GRUCell(3, 4, dtype=torch.float64)
    params = {name: value.detach() for name, value in cell.named_parameters()}
    xs, start = numbers(length, 3), numbers(4)

    def looped(params: dict[str, Tensor]) -> Tensor:
        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = functional_call(cell, params, (x, h))
            return h, h.square().sum()

        return pf.scan(step, start, xs)[1].sum()

    def unrolled(params: dict[str, Tensor]) -> Tensor:
        h, total = start, torch.zeros((), dtype=torch.float64)
        for x in xs:
            h = functional_call(cell, params, (x, h))
            total = total + h.square().sum()
        return total

    graph = traced(grad(looped), params)
    assert len(graph.calls) < 30  # whatever the length
    close(replayed(graph, params), grad(unrolled)(params))


def test_a_body_is_traced_once():
    calls = []

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return torch.tanh(h + x), h

    traced(lambda h, xs: grad(lambda h: pf.scan(step, h, xs)[0].sum())(h), H, numbers(1000, 3))
    assert len(calls) == 1


def test_a_closed_over_module_is_differentiated():
    module = nn.Linear(3, 3, dtype=torch.float64)

    def loss(params: dict[str, Tensor], h: Tensor) -> Tensor:
        return pf.scan(lambda h, _: (functional_call(module, params, (h,)).tanh(), ()), h, length=4)[0].sum()

    params = {name: value.detach() for name, value in module.named_parameters()}
    graph = traced(grad(loss), params, H)
    expected = torch.autograd.grad(loss(dict(module.named_parameters()), H), list(module.parameters()))
    close(replayed(graph, params, H), dict(zip(params, expected, strict=True)))


@pytest.mark.parametrize("engine", ["eager", *SCHEDULES])
def test_an_episode_ends_lane_by_lane(engine: str):
    many = numbers(1000, 3)
    limit = torch.linspace(1, 500, 1000, dtype=torch.float64)
    step = lambda c, limit: (grown(c, limit), ())  # noqa: E731
    got, _ = pf.scan_lanes(step, many, limit[None], shared=False, engine=engine)
    alone = [
        pf.scan_lanes(step, many[n : n + 1], limit[None, n : n + 1], shared=False, engine="eager")[0][0]
        for n in range(0, 1000, 37)
    ]
    assert torch.equal(got[::37], torch.stack(alone))


def test_a_lane_that_is_done_raises_no_error():
    """Its index would be out of range in the rounds that other lanes still run."""
    table = torch.arange(8.0)

    def step(c: Any, _: Any) -> Any:
        going = lambda s: s[0] < s[1]  # noqa: E731
        return pf.while_loop(going, lambda s: (s[0] + 1, s[1], s[2] + table[s[0] + 8 - s[1]]), c), ()

    start = torch.zeros(2, dtype=torch.int64), torch.tensor([2, 8]), torch.zeros(2)
    for engine in ("eager", *SCHEDULES):
        assert pf.scan_lanes(step, start, length=1, engine=engine)[0][2].tolist() == [13.0, 28.0]


def test_a_lane_without_rounds_raises_no_error():
    """Not even for what is the same in each round, which `native` computes once."""
    table = torch.arange(8.0).reshape(4, 2)

    def step(limit: Tensor, place: Tensor) -> Any:
        body = lambda s: (s[0] + 1, s[1] + torch.exp(table[place]).sum())  # noqa: E731
        return limit, pf.while_loop(lambda s: s[0] < limit, body, (torch.zeros_like(limit), torch.zeros(())))[1]

    def run(limits: list[int], places: list[int], engine: str) -> Tensor:
        return pf.scan_lanes(step, torch.tensor(limits), torch.tensor([places]), shared=False, engine=engine)[1][0]

    for engine in ("eager", *SCHEDULES):
        assert run([0, 0], [9, 9], engine).tolist() == [0, 0]
        with pytest.raises(IndexError):
            run([0, 2], [1, 9], engine)
    for engine in SCHEDULES:
        close(run([0, 2], [9, 1], engine), torch.tensor([0, 2 * table[1].exp().sum()]), 1e-4)


def test_reverse_mode_of_a_while_loop_says_what_to_use():
    def loss(x: Tensor) -> Tensor:
        return grown(x, torch.tensor(9.0, dtype=torch.float64)).sum()

    for run in (grad(loss), lambda x: traced(grad(loss), x)):
        with pytest.raises(NotImplementedError, match="use scan with a mask"):
            run(H)


def test_a_graph_shows_its_loops():
    graph = traced(
        lambda h, xs: pf.scan(lambda c, x: (pf.cond(c > x, torch.sin, torch.cos, c), c), h, xs), H[0], XS[:, 0]
    )
    assert str(graph).splitlines()[2:] == [
        "  scan: float64[], float64[5] = scan(arg0_1, arg1_1)",
        "    5 rounds; carry: 1, xs: 1:",
        "      arg0_1: float64[]",
        "      arg1_1: float64[]",
        "        gt: bool[] = gt(arg0_1, arg1_1)",
        "        cond: float64[] = cond(gt, arg0_1)",
        "          if:",
        "            arg0_1: float64[]",
        "              sin: float64[] = sin(arg0_1)",
        "            return sin",
        "          else:",
        "            arg0_1: float64[]",
        "              cos: float64[] = cos(arg0_1)",
        "            return cos",
        "        getitem: float64[] = getitem(cond, 0)",
        "      return getitem, arg0_1",
        "  getitem: float64[] = getitem(scan, 0)",
        "  getitem_1: float64[5] = getitem(scan, 1)",
        "return getitem, getitem_1",
        "28 operations: 7 getitem, 5 gt, 5 cond, 5 sin, 5 cos, 1 scan",
    ]


def test_explain_counts_what_a_loop_repeats():
    short, long = (
        pf.engines.explain(lambda c, x: (c + recurrent(W, c, x), ()), MANY, numbers(1, length, 3)) for length in (5, 50)
    )
    assert long.counts.products + long.counts.others > 9 * (short.counts.products + short.counts.others)
    assert "scan 50 rounds" in long.loops


def test_the_forward_loop_of_a_gradient_is_the_loop_itself():
    graph = traced(torch.func.grad_and_value(recurrent), W, H, XS)
    assert graph.operations["scan"] == 2


def test_inductor_unrolls_loops_or_refuses_them_by_name():
    def refused(step: Callable[..., Any], match: str) -> None:
        with pytest.raises(pf.engines.UnsupportedError, match=match):
            pf.scan_lanes(step, MANY, length=1, engine="inductor")

    refused(
        lambda c, _: (pf.while_loop(lambda s: s.sum() < 1, lambda s: s + 1, c), ()), "no `while_loop` inside a step"
    )
    refused(lambda c, _: (pf.fori_loop(0, 3000, lambda i, s: s.sin() + i, c), ()), "more than 2000")


@pytest.mark.slow
def test_inductor_computes_what_eager_does():
    step, carry = in_one_step({name: PROGRAMS[name] for name in ("scan, vmap of grad", "cond, vmap of grad")})
    results = [pf.scan_lanes(step, carry, length=1, engine=engine)[1] for engine in ("inductor", "eager")]
    close(*results)


def test_no_rounds_give_the_carry_and_empty_ys():
    for run in (lambda f: f(H), lambda f: replayed(traced(f, H), H)):
        carry, ys = run(lambda h: pf.scan(lambda c, _: (c + 1, c[:2]), h, length=0))
        assert torch.equal(carry, H)
        assert ys.shape == (0, 2)
    carry, ys = pf.scan(lambda c, x: (c + x, c[:2]), H, XS[:0], engine="native")
    assert torch.equal(carry, H)
    assert ys.shape == (0, 2)


def test_the_outermost_scan_runs_in_reverse():
    for engine in ("eager", "native"):
        carry, ys = pf.scan(lambda c, x: (2 * c + x, c), H, XS, reverse=True, engine=engine)
        expected = vmap(lambda h: pf.scan(lambda c, x: (2 * c + x, c), h, XS, reverse=True))(H[None])
        close((carry, ys), optree.tree_map(lambda leaf: leaf[0], expected))


def test_pytorchs_loops_become_the_same():
    from torch._higher_order_ops.scan import scan as pytorchs_own

    def step(c: Tensor, x: Tensor) -> Any:
        c = torch.cond(c.sum() > 0, lambda c: c.sin(), lambda c: c.cos(), (c,))
        (c,) = torch.while_loop(lambda c: c.sum() < 1, lambda c: (c + 0.3,), (c,))
        total, ys = torch._higher_order_ops.scan(lambda a, b: (a + b, a * b), c[0], c, reverse=True)
        return c + ys + total, total

    close(*(pf.scan_lanes(step, MANY, XS, engine=engine) for engine in ("native", "eager")))
    before = torch.cond
    with pytest.raises(pf.engines.UnsupportedError, match="instead of PyTorch's own loops"):
        pf.scan_lanes(lambda c, x: (pytorchs_own(lambda a, b: (a + b, a * b), c, x)[0], ()), MANY, XS, engine="native")
    assert torch.cond is before


def test_a_step_of_many_operations_names_scan(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracer, "MANY_OPERATIONS", 50)

    def unrolled(h: Tensor) -> Tensor:
        for _ in range(60):
            h = h.sin()
        return h

    with pytest.warns(UserWarning, match="write popart_func.scan"):
        traced(unrolled, H)


@pytest.mark.parametrize("seed", range(1, 4))
def test_random_programs_in_a_graph(seed: int):
    function = transformed(seed, random_program(seed))
    close(replayed(traced(function, H), H), function(H), 1e-8)


def test_random_programs_on_native():
    check_schedules(*in_one_step(random_programs(range(100, 102))))


def check_schedules(step: Callable[..., Any], carry: Any) -> None:
    expected = pf.scan_lanes(step, carry, length=1, engine="eager")[1]
    for engine in SCHEDULES:
        close(pf.scan_lanes(step, carry, length=1, engine=engine)[1], expected, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 700, 5))
def test_many_random_programs_on_native(first: int):
    check_schedules(*in_one_step(random_programs(range(first, first + 5))))


def test_a_sweep_of_steps_with_loops_runs_native():
    def update(state, x):
        state, energies = pf.scan(lambda h, _: ((h @ h.T).tanh(), h.square().sum()), state, length=3)
        return state + x, energies.sum()

    learner = pf.Learner(init=lambda params: params["w"], update=update)
    found = sweeps.run(
        lambda: learner,
        torch.ones(5),
        lambda seed: {"w": torch.eye(40) + seed},
        sweeps.lanes(range(2)),
        record={"energy": last(1, of=lambda state, energy: energy)},
        engine="native",
        quiet=True,
    )
    assert found.attrs["engine"] in SCHEDULES


class Root(torch.autograd.Function):
    """√x; no mode for functions sees the call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return 0.5 * cotangent / ctx.saved_tensors[0]


def rooted(root: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """√(w + x) where x > 0, else 2 w: at w = 0 the slope of the root is infinite where x is 0."""
    return lambda w, x: pf.cond(x > 0, lambda: root(w + x), lambda: 2 * w)


ROOTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operand": lambda w, x: pf.cond(x > 0, lambda w: torch.sqrt(w + x), lambda w: 2 * w, w),
    "closed over": rooted(torch.sqrt),
    "custom function": rooted(Root.apply),
    "transform": rooted(lambda y: torch.func.jvp(lambda z: 2 / 3 * z**1.5, (y,), (torch.ones_like(y),))[1]),
    "pullback": rooted(lambda y: torch.func.vjp(lambda z: 2 / 3 * z**1.5, y)[1](torch.ones_like(y))[0]),
    "pullback of a closure": lambda w, x: pf.cond(
        x > 0, lambda: torch.func.vjp(lambda z: z * torch.sqrt(w + x), x)[1](torch.ones_like(x))[0], lambda: 2 * w
    ),
    "cotangent": lambda w, x: pf.cond(
        x > 0, lambda: torch.func.vjp(lambda z: z.sqrt(), w + x)[1](2 * (w + x))[0], lambda: 2 * w
    ),
    "second derivative": rooted(lambda y: 4 / 15 * torch.func.hessian(lambda z: z**2.5)(y)),
    "in a choice": lambda w, x: pf.cond(
        x > -1, lambda: pf.cond(x > 0, lambda: torch.sqrt(w + x), lambda: 2 * w), lambda: w
    ),
    "in a scan": lambda w, x: pf.scan(
        lambda c, _: (c + pf.cond(x > 0, lambda: torch.sqrt(w + x), lambda: 2 * w), ()), 0 * w, length=1
    )[0],
}


def test_a_branch_gives_no_gradient_to_lanes_that_do_not_take_it():
    """Nor to what it closes over. In three lanes, of which each has three parts that choose."""
    x = torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64)
    slopes = torch.where(x > 0, 0.25, 2.0).double()
    zero = torch.zeros((), dtype=torch.float64)
    for name, function in ROOTS.items():
        close(vmap(grad(function), (None, 0))(zero, x), slopes)
        close(vmap(jacrev(jacrev(function)), (None, 0))(zero, x), torch.where(x > 0, -1 / 32, 0.0).double())
        leaf = zero.clone().requires_grad_()
        vmap(lambda x, w=leaf, f=function: f(w, x))(x).sum().backward()
        assert leaf.grad == slopes.sum(), name

    def total(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: vmap(lambda x: function(w, x))(x).sum()

    def within_a_scan(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: pf.scan(lambda c, _: (c + total(function)(w), ()), 0 * w, length=2)[0]

    def step(w: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = {}
        for name, function in ROOTS.items():
            found[name] = torch.stack(
                [grad(function)(w, x), grad(total(function))(w), grad(within_a_scan(function))(w)]
            )
        return w, found

    expected = torch.stack([slopes, slopes.sum().expand(3), 2 * slopes.sum().expand(3)], -1)
    for engine in ("eager", *SCHEDULES):
        _, found = pf.scan_lanes(step, zero.expand(3), x[None], shared=False, engine=engine)
        for gradients in found.values():
            close(gradients, expected[None])


def test_a_branch_that_is_taken_keeps_its_own_nan() -> None:
    def branches(c: Tensor, x: Tensor) -> Tensor:
        return pf.cond(x > 0, lambda: torch.sqrt(0 * c).sum(), lambda: c.square().sum())

    c, x = torch.full((2, 3), 2.0), torch.tensor([-1.0, 1.0])
    expected = torch.tensor([[4.0, 4.0, 4.0], [torch.nan] * 3])
    torch.testing.assert_close(vmap(grad(branches))(c, x), expected, equal_nan=True)
    step = lambda c, x: (grad(branches)(c, x), ())  # noqa: E731
    for engine in ("eager", *SCHEDULES):
        gradient, _ = pf.scan_lanes(step, c, x[None], engine=engine)
        torch.testing.assert_close(gradient, expected, equal_nan=True)
