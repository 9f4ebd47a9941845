"""The ranks of the tests of `popart_func.distributed`: their cases, their batches, and the program that each runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import popart_func as pf
from popart_func import distributed


class Case(NamedTuple):
    """A batch of at most 12, the shares of the first ranks (the last rank gets the rest), and the options of `art`."""

    state: pf.PopArtState
    targets: Tensor
    indices: Tensor | None
    shares: tuple[int, ...]
    options: dict[str, Any]
    weights: Tensor | None = None


def cases() -> dict[str, Case]:
    """The cases by name, the same in every process."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 3.0) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=dtype) * 5 + mean

    def start(tasks: int, dtype: torch.dtype = torch.float32, shift: float = 2.0) -> pf.PopArtState:
        variance = torch.rand(tasks, generator=random, dtype=dtype) + 3
        residue = torch.rand(tasks, generator=random, dtype=dtype) * 1e-7
        count = torch.arange(tasks, dtype=torch.int32)
        return pf.PopArtState(torch.full((tasks,), shift, dtype=dtype), variance.sqrt(), variance, count, residue)

    # In shares of (5, 3, 4): rank 0 has no task 2, rank 1 only task 2; nobody has task 3.
    indices = torch.tensor([0, 1, 0, 0, 1, 2, 2, 2, 0, 2, 1, 1])
    far = draw(12)
    far[0] = 1e30  # Its square is beyond float32; the other ranks have none of its task.
    broken = draw(12, 2)
    broken[3, 1] = torch.nan
    weights = torch.rand(12, 2, generator=random) * (torch.rand(12, 2, generator=random) < 0.7)
    weights[3, 1] = 0.0
    mean = {"step_size": 0.2}
    return {
        "one task": Case(start(1), draw(12), None, (5, 3), mean),
        "tasks on an axis": Case(start(3), draw(12, 3), None, (5, 3), mean),
        "task indices": Case(start(4), draw(12), indices, (5, 3), mean),
        "float64": Case(start(4, torch.float64), draw(12, dtype=torch.float64), indices, (5, 3), mean),
        "a rank without targets": Case(start(2), draw(12, 2), None, (0, 7), mean),
        "a rank without targets and indices": Case(start(4), draw(12), indices, (0, 7), mean),
        "no targets at all": Case(start(2), draw(0, 2), None, (0, 0), mean),
        "far from zero": Case(start(1, shift=1e7), draw(12, mean=1e7), None, (5, 3), mean),
        "bias correction": Case(start(4), draw(12), indices, (5, 3), {**mean, "bias_correction": True}),
        "sum": Case(start(4), draw(12), indices, (5, 3), {**mean, "reduction": "sum"}),
        "sequential": Case(start(4), draw(12), indices, (5, 3), {**mean, "reduction": "sequential"}),
        "sequential without indices": Case(start(2), draw(12, 2), None, (0, 7), {**mean, "reduction": "sequential"}),
        "a square beyond the dtype": Case(start(2), far, (torch.arange(12) > 0).long(), (1, 7), mean),
        "a far first batch": Case(
            pf.init_state(1), 1e7 + draw(12).round(), None, (5, 3), {"step_size": 0.01, "bias_correction": True}
        ),
        "a target that is not a number": Case(start(2), broken, None, (5, 3), mean),
        "weights": Case(start(2), broken, None, (5, 3), {**mean, "bias_correction": True}, weights),
        "weights of indices": Case(start(4), draw(12), indices, (5, 3), {**mean, "reduction": "sum"}, weights[:, 1]),
        "a mask in sequence": Case(start(2), broken, None, (0, 7), {**mean, "reduction": "sequential"}, weights > 0),
    }


def part(case: Case, rank: int, ranks: int) -> list[Tensor | None]:
    """A rank's targets, indices and weights."""
    edges = [0, *torch.tensor(case.shares[: ranks - 1]).cumsum(0).tolist(), case.targets.shape[0]]
    mine = slice(edges[rank], edges[rank + 1])
    return [None if whole is None else whole[mine] for whole in (case.targets, case.indices, case.weights)]


def lanes(art: Callable[..., pf.PopArtState], targets: Tensor) -> pf.PopArtState:
    """`art` in four lanes of a vmap, each with its own step size."""
    states = torch.vmap(lambda _: pf.init_state(2))(torch.zeros(4))
    step_sizes = torch.tensor([0.1, 0.2, 0.3, 1.0])
    return torch.vmap(lambda state, step_size, y: art(state, y, step_size=step_size))(states, step_sizes, targets)


def lane_targets() -> Tensor:
    """Targets for `lanes`: twelve samples of two tasks."""
    return torch.randn(4, 12, 2, generator=torch.Generator().manual_seed(1)) + 10


def head() -> dict[str, Tensor]:
    """A head of one output."""
    return {"weight": torch.tensor([[0.5, -2.0]]), "bias": torch.tensor([0.25])}


def message(call: Callable[[], object]) -> str:
    """The type and the message of the error that a call raises."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def results(rank: int, ranks: int) -> dict[str, Any]:
    """All results of one rank, as lists of tensors and strings."""
    found: dict[str, Any] = {}
    for name, case in cases().items():
        found[name] = list(distributed.art(case.state, *part(case, rank, ranks), **case.options))
    mine = slice(0, 5) if rank == 0 else slice(5, 12) if ranks == 2 else slice(5, 8) if rank == 1 else slice(8, 12)
    found["lanes"] = list(lanes(distributed.art, lane_targets()[:, mine]))

    init, update = distributed.popart(1, step_size=0.1)
    popped, statistics = update(head(), init(), torch.full((1 + rank,), 1000.0))
    found["popart"] = [*popped.values(), *statistics]

    one, too_many = pf.init_state(1), torch.ones(2)
    found["too many for a sum"] = message(lambda: distributed.art(one, too_many, step_size=0.4, reduction="sum"))
    first = dist.new_group([0])
    found["a group"] = message(
        lambda: found.update(alone=list(distributed.art(one, too_many, step_size=0.5, group=first)))
    )
    return found


def run(rank: int, folder: str) -> None:
    """The program of one of three processes: first in a world of three, then of two."""
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank < ranks:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
            torch.save(results(rank, ranks), Path(folder) / f"{ranks}.{rank}.pt")
            dist.destroy_process_group()
