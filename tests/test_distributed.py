"""Statistics of several processes equal those of one process on the joined batch, with the same bits on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import new_process
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import popart_func as pf
from popart_func import distributed

CASES = ranks.cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, list[Tensor]]]]:
    """The results of each rank, in worlds of two and of three gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    new_process.context()  # one process imports the library, and the three are copies of it
    torch.multiprocessing.start_processes(ranks.run, args=(str(folder),), nprocs=3, start_method="forkserver")
    return {size: [torch.load(folder / f"{size}.{rank}.pt") for rank in range(size)] for size in (2, 3)}


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_equal(actual: list[Tensor], expected: pf.PopArtState) -> None:
    """Equal dtypes, and values up to the rounding of a sum of 12 and of its square, 8 bits, in units of the scale."""
    actual = pf.PopArtState(*actual)
    allowed = 256 * torch.finfo(expected.shift.dtype).eps
    assert [field.dtype for field in actual] == [field.dtype for field in expected]
    assert torch.equal(actual.count, expected.count)
    torch.testing.assert_close(actual.scale, expected.scale, rtol=allowed, atol=0, equal_nan=True)
    torch.testing.assert_close(actual.variance, expected.variance, rtol=2 * allowed, atol=0, equal_nan=True)
    distance = (actual.shift.double() - expected.shift) + (actual.residue.double() - expected.residue)
    nothing = torch.where(expected.shift.isnan(), torch.nan, 0.0).double()
    torch.testing.assert_close(distance / expected.scale, nothing, rtol=0, atol=allowed, equal_nan=True)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_statistics_are_those_of_one_process_on_the_joined_batch(found, name: str, size: int) -> None:
    case = CASES[name]
    expected = pf.art(case.state, case.targets, case.indices, case.weights, **case.options)
    for of_rank in found[size]:
        assert_equal(of_rank[name], expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [*CASES, "lanes", "popart"])
def test_every_rank_has_the_same_bits(found, name: str, size: int) -> None:
    first, *others = ([field.numpy().tobytes() for field in of_rank[name]] for of_rank in found[size])
    assert len(others) == size - 1
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", [2, 3])
def test_a_task_without_targets_keeps_its_bits(found, size: int) -> None:
    for before, after in zip(CASES["task indices"].state, found[size][0]["task indices"], strict=True):
        assert torch.equal(before[3], after[3])
        assert not torch.equal(before[:3], after[:3])
    assert all(map(torch.equal, CASES["no targets at all"].state, found[size][0]["no targets at all"]))


@pytest.mark.parametrize("size", [2, 3])
def test_in_sequence_they_are_those_of_one_process_to_the_bit(found, size: int) -> None:
    for name in ("sequential", "sequential without indices"):
        case = CASES[name]
        expected = pf.art(case.state, case.targets, case.indices, case.weights, **case.options)
        assert all(map(torch.equal, found[size][1][name], expected))


@pytest.mark.parametrize("size", [2, 3])
def test_a_diverged_target_breaks_its_task_alone(found, size: int) -> None:
    shift = found[size][0]["a target that is not a number"][0]
    assert shift.isnan().tolist() == [False, True]


@pytest.mark.parametrize("size", [2, 3])
def test_lanes_share_a_collective(found, size: int) -> None:
    expected = ranks.lanes(pf.art, ranks.lane_targets())
    for lane in range(4):
        assert_equal([field[lane] for field in found[size][0]["lanes"]], pf.PopArtState(*(f[lane] for f in expected)))


@pytest.mark.parametrize("size", [2, 3])
def test_popart_keeps_the_outputs(found, size: int) -> None:
    weight, bias, *statistics = found[size][0]["popart"]
    state, hidden = pf.PopArtState(*statistics), torch.tensor([3.0, 0.7])
    assert float(state.shift) == pytest.approx(100, rel=1e-6)
    expected = hidden @ ranks.head()["weight"].T + ranks.head()["bias"]
    # The unnormalized 0.35 is a small difference of numbers around 100.
    torch.testing.assert_close(pf.unnormalize(state, hidden @ weight.T + bias), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_is_checked_jointly_and_refused_by_every_rank(found, size: int) -> None:
    for of_rank in found[size]:
        assert of_rank["too many for a sum"].startswith(
            f"ValueError: art: with `reduction` 'sum' a task's {2 * size} targets at step size 0.4 make"
        )


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_is_its_members_affair(found, size: int) -> None:
    first, *others = found[size]
    assert all(map(torch.equal, first["alone"], pf.art(pf.init_state(1), torch.ones(2), step_size=0.5)))
    assert {of_rank["a group"] for of_rank in others} == {
        "TypeError: distributed: `group` must be a ProcessGroup that this process is in, or None, got one without "
        "this process."
    }


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_a_world_of_one_process_has_its_bits(name: str) -> None:
    case = CASES[name]
    expected = pf.art(case.state, case.targets, case.indices, case.weights, **case.options)
    actual = distributed.art(case.state, case.targets, case.indices, case.weights, **case.options)
    for field, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(field, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("alone")
def test_in_transforms_it_is_as_without() -> None:
    state, targets = pf.init_state(2), torch.randn(5, 2)
    step = {"step_size": 0.1}
    gradient = torch.func.grad(lambda y: (distributed.art(state, y, **step).shift + y.sum()).sum())(targets)
    assert (gradient == 2).all()
    _, tangent = torch.func.jvp(lambda y: distributed.art(state, y, **step).shift, (targets,), (targets,))
    assert (tangent == 0).all()
    many = torch.randn(2, 3, 5, 2)
    nested = torch.vmap(torch.vmap(lambda y: distributed.art(state, y, **step)))(many)
    for field, other in zip(nested, torch.vmap(torch.vmap(lambda y: pf.art(state, y, **step)))(many), strict=True):
        torch.testing.assert_close(field, other)


@pytest.mark.usefixtures("alone")
def test_a_learner_takes_it() -> None:
    apply = pf.stateless(torch.nn.Linear(3, 1))
    params = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    batch = torch.randn(4, 3), torch.randn(4, 1) + 10

    def info(popart: pf.PopArt) -> pf.Info:
        network = {f"head.{name}": value for name, value in params.items()}
        learner = pf.popart_learner(
            lambda p, x: apply({name.removeprefix("head."): value for name, value in p.items()}, x),
            pf.sgd(0.1),
            popart,
            head="head",
        )
        return learner.update(learner.init(network), batch)[1]

    for field, other in zip(info(distributed.popart(1, 0.1)), info(pf.popart(1, 0.1)), strict=True):
        torch.testing.assert_close(field, other, rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_options_of_popart_reach_it() -> None:
    options = {"step_size": 0.1, "scale_lb": 3.0, "scale_ub": 5.0, "reduction": "sum", "bias_correction": True}
    state, targets = pf.init_state(1), torch.randn(4, 1) + 7
    for field, other in zip(
        distributed.popart(1, **options).art(state, targets), pf.art(state, targets, **options), strict=True
    ):
        torch.testing.assert_close(field, other, rtol=0, atol=0)


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"distributed: torch\.distributed is not initialized\. Call torch\.dis"):
        distributed.art(pf.init_state(1), torch.ones(1), step_size=0.1)


@pytest.mark.usefixtures("alone", "unchecked")
def test_says_what_is_wrong_as_one_process_does() -> None:
    state = pf.init_state(2)
    with pytest.raises(TypeError, match=r"`group` must be a ProcessGroup that this process is in, or None, got str\."):
        distributed.art(state, torch.ones(2), step_size=0.1, group="world")
    with pytest.raises(ValueError, match=r"art: the last axis of `targets` must be the 2 tasks"):
        distributed.art(state, torch.ones(3), step_size=0.1)
    with pytest.raises(ValueError, match=r"art: `step_size` must be > 0 and <= 1, got 2\."):
        distributed.art(state, torch.ones(2), step_size=2)
    with pytest.raises(TypeError, match=r"`group` must be a ProcessGroup that this process is in, or None, got str\."):
        distributed.popart(2, 0.1, group="world").art(state, torch.ones(2))
    with pytest.raises(ValueError, match=r"popart: `num_outputs` must be at least 1, got 0\."):
        distributed.popart(0, step_size=0.1)
