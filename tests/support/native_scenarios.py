"""What a kernel of the native engine must compute, on a CPU and on CUDA devices alike: scenarios, judged by eager.

Each function runs `native.run`, whatever stands behind it, and asserts. The test modules of both targets call them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import op_cases
import op_families
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from popart_func import optim
from popart_func.engines import eager, native
from popart_func.engines.lane_scan import LaneScan, make_lane_scan
from popart_func.learners import art_learner, normalized_sgd_learner, popart_learner, sgd_learner
from popart_func.models import init_lanes, stateless
from popart_func.pop_art import art, init_state, popart, unnormalize

LANES = 19  # two blocks, the last one not full


def difference(first: Any, second: Any) -> float:
    """The largest difference, relative to 1 + |value|."""
    return max(
        float(((a.double() - b.double()).abs() / (1 + b.double().abs())).max())
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True)
    )


def assert_bit_equal(first: Any, second: Any) -> None:
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert ((a == b) | ((a != a) & (b != b))).all()


def pick(tree: Any, lanes: int | list[int], axis: int) -> Any:
    lanes = lanes if isinstance(lanes, list) else [lanes]
    return tree_map(lambda leaf: leaf.index_select(axis, torch.tensor(lanes)), tree)


def part_of(scan: LaneScan, lanes: list[int]) -> LaneScan:
    return dataclasses.replace(
        scan,
        carry=tuple(leaf[lanes] for leaf in scan.carry),
        xs=tuple(leaf[:, lanes] for leaf in scan.xs),
        hparams=tuple(leaf[lanes] for leaf in scan.hparams),
        lanes=len(lanes),
    )


# Learners.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 4)
        self.output_linear = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_linear(torch.tanh(self.hidden(x)))


APPLY = stateless(Network())
OPTIMIZERS: dict[str, Callable[[Any], optim.GradientTransformation]] = {
    "sgd": lambda rate: optim.sgd(rate),
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optim.sgd(rate, momentum=0.5, nesterov=True),
    "adam": lambda rate: optim.adam(rate),
}
LEARNERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda optimizer, beta: sgd_learner(APPLY, optimizer),
    "art": lambda optimizer, beta: art_learner(APPLY, optimizer, popart(1, beta)),
    "popart": lambda optimizer, beta: popart_learner(APPLY, optimizer, popart(1, beta)),
    "normalized_sgd": lambda optimizer, beta: normalized_sgd_learner(APPLY, optimizer, popart(1, beta)),
}
Case = tuple[str, str]
"""A learner and an optimizer."""


def make_step(*cases: Case) -> Callable[..., Any]:
    """One step of several learners, side by side; of a single one without a list around it."""

    def one(case: Case, state: Any, xy: Any, hparams: Any) -> Any:
        learner, optimizer = case
        state, info = LEARNERS[learner](OPTIMIZERS[optimizer](hparams["rate"]), hparams["beta"]).update(state, xy)
        return state, {"error": info.error, "loss": info.loss}

    def step(states: Any, xy: Any, hparams: Any) -> Any:
        if len(cases) == 1:
            return one(cases[0], states, xy, hparams)
        results = [one(case, state, xy, hparams) for case, state in zip(cases, states, strict=True)]
        return [state for state, _ in results], [info for _, info in results]

    return step


def make_scan(
    *cases: Case, dtype: torch.dtype = torch.float32, steps: int = 200, lanes: int = LANES, step: Any = None
) -> LaneScan:
    generator = torch.Generator().manual_seed(5)
    params = {name: leaf.to(dtype) for name, leaf in init_lanes(Network, range(lanes)).items()}
    states = [vmap(LEARNERS[learner](OPTIMIZERS[optimizer](0.1), 0.1).init)(params) for learner, optimizer in cases]
    x = torch.randn(steps, lanes, 5, generator=generator, dtype=dtype)
    y = x.sum(-1, keepdim=True) + 2 + torch.randn(steps, 1, 1, generator=generator, dtype=dtype) / 4
    hparams = {
        "rate": torch.linspace(1e-3, 3e-3, lanes, dtype=dtype),
        "beta": torch.linspace(0.05, 0.3, lanes, dtype=dtype),
    }
    carry = states[0] if len(cases) == 1 else states
    return make_lane_scan("scan_lanes", step or make_step(*cases), carry, (x, y), hparams, shared=False)


@functools.cache
def by_eager(case: Case, dtype: torch.dtype) -> Any:
    """What eager makes of a learner: it takes most of a test's time, and several tests need it."""
    return eager.run(make_scan(case, dtype=dtype, steps=60))


def learners_agree_with_eager(cases: Iterable[Case], dtype: torch.dtype, tolerance: float) -> None:
    """Several learners in one kernel, each against eager alone; a failure names each that is wrong."""
    cases = list(cases)
    carry, ys = native.run(make_scan(*cases, dtype=dtype, steps=60))
    got = [(carry, ys)] if len(cases) == 1 else list(zip(carry, ys, strict=True))
    wrong = {}
    for case, result in zip(cases, got, strict=True):
        expected = by_eager(case, dtype)
        assert torch.isfinite(expected[1]["error"]).all(), case
        if not difference(result, expected) < tolerance:
            wrong[case] = difference(result, expected)
    assert not wrong


def learners_agree_in_float32() -> None:
    # Sums of 5 products and vector functions of 4 ulp differ by about 1e-6 a step; training contracts it.
    learners_agree_with_eager([("popart", "adam"), ("normalized_sgd", "sgd")], torch.float32, 2e-4)


def several_tasks(reduction: Any) -> LaneScan:
    """Pop-Art on batches of several tasks."""
    tasks, batch, steps = 3, 4, 30
    generator = torch.Generator().manual_seed(7)

    def step(carry: Any, xyi: Any, beta: Any) -> Any:
        statistics, head = carry
        x, y, indices = xyi
        update = popart(tasks, beta, reduction=reduction, bias_correction=True).update
        head, statistics = update(head, statistics, y, indices)
        outputs = torch.softmax(x @ head["weight"].T + head["bias"], -1)
        return (statistics, head), unnormalize(statistics, outputs.gather(-1, indices[:, None])[:, 0], indices)

    head = {"weight": torch.randn(LANES, tasks, 5, generator=generator), "bias": torch.zeros(LANES, tasks)}
    carry = vmap(lambda head: (init_state(tasks, dtype=torch.float64), head))(tree_map(torch.Tensor.double, head))
    x = torch.randn(steps, LANES, batch, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(steps, LANES, batch, generator=generator, dtype=torch.float64) * 9 + 100
    indices = torch.randint(0, tasks, (steps, LANES, batch), generator=generator)
    betas = torch.linspace(0.01, 0.2, LANES, dtype=torch.float64)
    return make_lane_scan("scan_lanes", step, carry, (x, y, indices), betas, shared=False)


def batches_of_several_tasks_agree(reduction: Any) -> None:
    assert difference(native.run(several_tasks(reduction)), several_tasks_by_eager(reduction)) < 1e-12


@functools.cache
def several_tasks_by_eager(reduction: Any) -> Any:
    return eager.run(several_tasks(reduction))


def learner_with_environment() -> LaneScan:
    """Q-learning with a replay memory on a walk: integers, comparisons, indices, writes in place, random bits."""
    cells, memory = 6, 8

    def step(carry: Any, _: Any, rate: Any) -> Any:
        q, place, seed, replay, count = carry
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        explore = ((seed >> 16) & 3) != 0
        action = torch.where(explore, (seed >> 20) & 1, q[place].argmax())
        after = (place + 2 * action - 1).clamp(0, cells - 1)
        done = after == cells - 1
        replay = replay.clone()
        replay[count % memory] = torch.stack([place, action, after, done.long()])
        old, did, new, end = replay[(seed >> 8) % torch.minimum(count + 1, torch.tensor(memory))].unbind()
        target = end + torch.where(end == 1, 0.0, 0.9 * q[new].max())
        q = q.index_put((old, did), q[old, did] + rate * (target - q[old, did]))
        return (q, torch.where(done, 0, after), seed, replay, count + 1), (action, done, F.one_hot(after, cells))

    carry = (
        torch.zeros(LANES, cells, 2, dtype=torch.float64),
        torch.zeros(LANES, dtype=torch.int64),
        torch.arange(LANES),
        torch.zeros(LANES, memory, 4, dtype=torch.int64),
        torch.zeros(LANES, dtype=torch.int64),
    )
    rates = torch.linspace(0.1, 0.5, LANES, dtype=torch.float64)
    return make_lane_scan("scan_lanes", step, carry, None, rates, length=300)


@functools.cache
def learner_with_environment_by_eager() -> Any:
    return eager.run(learner_with_environment())


def a_learner_with_its_environment_inside_agrees() -> None:
    got, expected = native.run(learner_with_environment()), learner_with_environment_by_eager()
    assert torch.equal(got[1][0], expected[1][0])
    assert expected[1][1].sum() > 10
    assert difference(got, expected) < 1e-12


def the_statistics_are_kept_where_float32_is_short() -> None:
    """Targets c ± 1: re-associated sums would lose the residue."""
    lanes, steps = 12, 20_000
    centres = torch.tensor([1e2, 1e3, 1e4, 1e5, 1e6, 1e7], dtype=torch.float64).repeat(2)
    betas = torch.tensor([1e-2, 1e-4], dtype=torch.float32).repeat_interleave(6)
    signs = torch.randint(0, 2, (steps, lanes), generator=torch.Generator().manual_seed(3)) * 2 - 1
    targets = (centres + signs).float()  # exact

    def step(state: Any, y: Any, beta: Any) -> Any:
        return art(state, y[None], step_size=beta), y

    def run(dtype: torch.dtype) -> Any:
        start = init_state(1, dtype=dtype)._replace(shift=torch.zeros(1, dtype=dtype))
        state = vmap(lambda centre: start._replace(shift=start.shift + centre))(centres.to(dtype))
        scan = make_lane_scan("scan_lanes", step, state, targets.to(dtype), betas.to(dtype), shared=False)
        return native.run(scan)[0]

    narrow, wide = run(torch.float32), run(torch.float64)
    assert ((narrow.scale - wide.scale).abs() / wide.scale).max() < 1e-4
    mean = (narrow.shift.double() - wide.shift) + (narrow.residue.double() - wide.residue)
    assert (mean.abs() / wide.scale).max() < 1e-5


def lanes_are_bit_equal_for_any_number_of_lanes_and_threads() -> None:
    scan = make_scan(("popart", "adam"), lanes=50)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native.run(scan))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_bit_equal(other, results[0])
    for lane in (0, 17, 49):  # alone, it stands first in a block of its own
        alone = native.run(part_of(scan, [lane]))
        assert_bit_equal(alone, (pick(results[0][0], lane, 0), pick(results[0][1], lane, 1)))


def a_lane_that_diverges_leaves_its_neighbours_alone() -> None:
    scan = make_scan(("popart", "adam"), lanes=20)
    calm_carry, calm_ys = native.run(scan)
    for bad in (float("nan"), float("inf"), -1e38):
        y = scan.xs[1].clone()
        y[3, 5] = bad
        carry, ys = native.run(dataclasses.replace(scan, xs=(scan.xs[0], y)))
        others = [lane for lane in range(20) if lane != 5]
        assert_bit_equal(
            (pick(carry, others, 0), pick(ys, others, 1)), (pick(calm_carry, others, 0), pick(calm_ys, others, 1))
        )
        assert not torch.equal(ys["error"][3:, 5], calm_ys["error"][3:, 5])


# Inputs and outputs.


def shared_inputs_are_read_where_they_lie() -> None:
    """Inputs that all lanes share are neither copied nor spread; an expanded lane axis isn't either."""

    def step(carry: Any, x: Any) -> Any:
        shared, expanded, strided = x
        return carry + shared.sum() * expanded[0] - strided, carry.sum()

    time = torch.arange(6.0)
    expanded = time[:, None, None].expand(6, 21, 2)
    strided = torch.randn(21, 12)[:, ::2].T  # per lane, time last in memory
    xs = (torch.randn(6, 3), expanded, strided)
    scan = make_lane_scan("scan_lanes", step, torch.zeros(21, 2), xs, shared=(True, False, False))
    assert difference(native.run(scan), eager.run(scan)) < 1e-5


def carries_of_all_dtypes_swap_and_stay() -> None:
    def step(carry: Any, x: Any) -> Any:
        a, b, count, flag, same, ring = carry
        ring = torch.cat([ring[1:], a[None]])
        return (b, a + x, count + 1, ~flag, same, ring.scatter(0, count[None] % 4, b[None])), (a, flag, same, ring)

    carry = (
        torch.randn(18),
        torch.randn(18),
        torch.zeros(18, dtype=torch.int64),
        torch.arange(18) % 2 == 0,
        torch.randn(18, 3, dtype=torch.float64),
        torch.randn(18, 4),
    )
    scan = make_lane_scan("scan_lanes", step, carry, torch.randn(7), shared=True)
    assert_bit_equal(native.run(scan), eager.run(scan))


def a_carry_that_is_read_backwards_while_it_is_written_agrees() -> None:
    """In place, ``c.flip(0) + x`` would read elements that have been overwritten already."""

    def step(carry: Any, x: Any) -> Any:
        flipped, plain, rolled = carry
        return (flipped.flip(0) + x, plain * 2 + x, rolled.roll(1) - x), flipped.sum()

    carry = tuple(torch.randn(LANES, 7, dtype=torch.float64) for _ in range(3))
    scan = make_lane_scan("scan_lanes", step, carry, torch.randn(5, dtype=torch.float64), shared=True)
    assert difference(native.run(scan), eager.run(scan)) < 1e-12


def inputs_are_not_changed() -> None:
    scan = make_scan(("popart", "momentum"), dtype=torch.float64, steps=3)
    before = [leaf.clone() for leaf in (*scan.carry, *scan.xs, *scan.hparams)]
    native.run(scan)
    assert_bit_equal([*scan.carry, *scan.xs, *scan.hparams], before)


# Ops.

STEPS = 8
SUMS = (
    *("sum", "mean", "mm", "addcmul", "gelu", "logsumexp", "log_softmax", "cumsum", "std", "var", "norm", "mixed"),
    *("fmod", "remainder"),
)
"""Cases whose results are as exact as the largest term of a sum."""


def ops_agree(
    function: Callable[..., dict[str, Tensor]],
    arguments: dict[str, Tensor],
    rtol: float,
    shared: Any = False,
    atol: float = 0,
) -> None:
    """Runs many cases in one kernel, on other arguments in each lane and step; a failure names each case at fault.

    ``atol``: the absolute tolerance of cases that are not in `SUMS`, if results may cancel to almost 0 in them.
    """

    def step(carry: Tensor, xs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return carry + 1, function(**xs)

    scan = make_lane_scan("scan", step, torch.zeros(LANES), arguments, shared=shared)
    got = native.run(scan)[1]
    expected = eager.run(scan)[1]
    wrong = []
    for name in expected:
        a, b = got[name], expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        # Below the smallest normal number only absolute exactness can be had.
        tiny = atol or torch.finfo(a.dtype).tiny * rtol if a.is_floating_point() else 0
        close = torch.isclose(a, b, rtol=rtol, atol=16 * rtol if name.startswith(SUMS) else tiny, equal_nan=True)
        if not close.all():
            where = tuple((~close).nonzero()[0].tolist())
            wrong.append(f"{name}: {a[where]} != {b[where]} at {where}, {int((~close).sum())} in all")
    assert not wrong, "\n".join(wrong)


FLOATING_POINT = [(torch.float32, (3, 4)), (torch.float64, (5, 1))]
"""The dtypes and shapes of `floating_point_ops_agree`."""


def floating_point_ops_agree(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (op_cases.special(generator, dtype, STEPS, LANES, *shape) for _ in range(2))
    functions = op_cases.all_floating_point()
    tame = {name: function for name, function in functions.items() if name.rstrip("_") in op_cases.TAME}

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        u, v = (torch.where((z.abs() > 1e-3) & (z.abs() < 1e3), z, 0.7) for z in (x, y))
        return {name: f(u, v) if name in tame else f(x, y) for name, f in functions.items()}

    ops_agree(step, {"x": x, "y": y}, rtol=3e-6 if dtype == torch.float32 else 3e-14)


def integer_ops_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(-20, 20, (STEPS, LANES, 3, 4), generator=generator).to(dtype) for _ in range(2))
    ops_agree(lambda x, y: {name: f(x, y) for name, f in op_cases.INTEGER.items()}, {"x": x, "y": y}, rtol=3e-6)


def movement_agrees() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(STEPS, LANES, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    i, j, k = (torch.randint(0, 3, (STEPS, LANES, *shape), generator=generator) for shape in ((5,), (3, 4), ()))
    ops_agree(op_cases.movement, {"x": x, "y": y, "i": i, "j": j, "k": k}, rtol=1e-12)


def movement_of_what_all_lanes_share_agrees() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(STEPS, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    i, j, k = (torch.randint(0, 3, (STEPS, *shape), generator=generator) for shape in ((5,), (3, 4), ()))
    ops_agree(op_cases.movement, {"x": x, "y": y, "i": i, "j": j, "k": k}, rtol=1e-12, shared=True)


def families_agree(names: Iterable[str], dtype: torch.dtype) -> None:
    """Composed ops and special functions, with gradients: the families that are named in one kernel."""
    generator = torch.Generator().manual_seed(6)
    arguments = {
        name: torch.randn(1, LANES, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in op_families.SHAPES.items()
    }
    names = list(names)

    def step(**given: Tensor) -> dict[str, Tensor]:
        families = {name: op_families.FAMILIES[name](**given) for name in names}
        return {f"{name}: {case}": value for name, cases in families.items() for case, value in cases.items()}

    rtol, atol = (2e-4, 2e-5) if dtype == torch.float32 else (1e-9, 1e-14)
    ops_agree(step, arguments, rtol=rtol, atol=atol)
