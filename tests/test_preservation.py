"""Networks whose outputs POP does not preserve are refused at their first use, with the reason; all others pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import popart_func as pf
from popart_func import _preservation


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_preservation, "_checked", {})


class Plain(nn.Module):
    def __init__(self, outputs: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.below, self.head = nn.Linear(3, 3), nn.Linear(3, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.below(x)))


class Dueling(Plain):
    def forward(self, x: Tensor) -> Tensor:
        advantages = self.head(x)
        return self.below(x)[..., :1] + advantages - advantages.mean(-1, keepdim=True)


class Behind(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(super().forward(x))


class Clipped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class SumOverAgents(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class SumOfThree(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x) + super().forward(2 * x)


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__(3)
        self.below.weight = self.head.weight


class TiedByHand(Plain):
    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.head.weight.T))


class Bypass(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.below(x)[..., :2]


class Exchanged(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(-1)


REFUSED = {
    Dueling: "they mix the outputs of the head 'head' with one another, as a dueling head does",
    Behind: "they are no linear function of the head 'head', so something is behind it",
    Clipped: "they are no linear function of the head 'head', so something is behind it",
    SumOverAgents: "the head 'head' is used 2 times in them",
    SumOfThree: "the head 'head' is used 3 times in them",
    Tied: r"weights of the head 'head' are used elsewhere in the network, too by \['below.weight'\]",
    TiedByHand: "weights of the head 'head' are used elsewhere in the network, too, as",
    Bypass: "something else than the head 'head' is added to them, a bypass",
}


def learner_of(apply: Any, tasks: int = 1) -> pf.Learner:
    return pf.popart_learner(apply, pf.sgd(0.0), pf.popart(tasks, 0.5), head="head")


def batch_for(make: Any, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, generator=generator)
    return x, 100 * torch.randn(size, make().head.out_features, generator=generator)


def update_once(make: Any, apply: Any, tasks: int = 1, how: str = "eager", batch: Any = None) -> Any:
    batch = batch_for(make) if batch is None else batch
    learner = learner_of(apply, tasks)
    if how == "eager":
        return learner.update(learner.init(pf.init_params(make, 0)), batch)
    state = torch.vmap(learner.init)(pf.init_lanes(make, range(2)))
    if how == "vmap":
        return torch.vmap(learner.update, (0, None))(state, batch)
    series = tuple(part.expand(3, *part.shape) for part in batch)
    return pf.scan_lanes(learner.update, state, series, shared=True, engine=how)


WAYS = ["eager", "vmap", *(name for name, why in pf.engines.available_engines("cpu").items() if why is None)]


@pytest.mark.parametrize("how", dict.fromkeys(WAYS))
@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_outputs_that_pop_would_move_are_refused_with_the_reason(make: Any, how: str) -> None:
    message = f"popart_learner: POP does not preserve the outputs of `apply`: .*{REFUSED[make]}.* or use art_learner"
    for _ in range(2):  # a second call is refused, too
        with pytest.raises(ValueError, match=message):
            update_once(make, pf.stateless(make()), how=how)


def test_outputs_that_are_exchanged_are_refused_where_each_has_its_statistics() -> None:
    update_once(Exchanged, pf.stateless(Exchanged()))
    with pytest.raises(ValueError, match="POP does not preserve the outputs"):
        update_once(Exchanged, pf.stateless(Exchanged()), tasks=2)


def test_small_and_large_networks_are_judged_alike() -> None:
    """With inputs of the sizes 1e-6, 1 and 1e6: the check compares a shift with the size of the outputs."""

    class Scaled(nn.Module):
        def __init__(self, twice: bool, by: float) -> None:
            super().__init__()
            self.head, self.twice, self.by = nn.Linear(3, 2), twice, by

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.by
            return self.head(x) + self.head(-0.5 * x) if self.twice else self.head(x)

    for by in (1e-6, 1.0, 1e6):
        once, twice = partial(Scaled, False, by), partial(Scaled, True, by)
        update_once(once, pf.stateless(once()))
        with pytest.raises(ValueError, match="used 2 times"):
            update_once(twice, pf.stateless(twice()))


class Recurrent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.below(x))))


class NormedInEvaluation(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.eval()


class WithoutBias(Plain):
    def __init__(self) -> None:
        super().__init__(bias=False)


class FromZero(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.below.weight)


class Half(Plain):
    """Computes in bfloat16, which rounds to three digits."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x)).bfloat16()
        return (h @ self.head.weight.bfloat16().T + self.head.bias.bfloat16()).float()


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.below(x)))


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(
    "make", [Plain, Recurrent, Normed, NormedInEvaluation, FromZero, Half, Residual], ids=lambda make: make.__name__
)
def test_networks_that_pop_preserves_pass(make: Any, tasks: int) -> None:
    update_once(make, pf.stateless(make()), tasks)
    if make not in (Normed, Recurrent):  # which draws; for which PyTorch warns that it has no batching rule
        _preservation._checked.clear()
        update_once(make, pf.stateless(make()), tasks, "vmap")


def test_heads_without_bias_pass() -> None:
    """With statistics whose shift stays, as POP asks of such a head."""
    statistics = pf.popart(1, 0.5)

    def scale_only(state: pf.PopArtState, targets: Tensor, indices: Tensor | None = None) -> pf.PopArtState:
        return state._replace(scale=statistics.art(state, targets, indices).scale)

    custom = pf.PopArt(statistics.init, scale_only)
    for make, refused in ((WithoutBias, False), (lambda: Behind(bias=False), True)):
        learner = pf.popart_learner(pf.stateless(make()), pf.sgd(0.0), custom, head="head")
        state = learner.init(pf.init_params(make, 0))
        if refused:
            with pytest.raises(ValueError, match="POP does not preserve"):
                learner.update(state, batch_for(make))
        else:
            learner.update(state, batch_for(make))


def test_one_example_indices_and_trees_pass() -> None:
    apply = pf.stateless(Plain())
    x, y = batch_for(Plain)
    update_once(Plain, apply, batch=(x[0], y[0]))
    _preservation._checked.clear()
    update_once(Plain, apply, 2, batch=(x, y[:, 0], torch.tensor([0, 1, 1, 0])))

    class Words(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 3)

        def forward(self, x: Any) -> Tensor:
            return self.head(torch.where(x["mask"][..., None], self.words(x["word"]), 0.0))

    words = {"word": torch.tensor([4, 0, 3, 1]), "mask": torch.tensor([True, False, True, True])}
    for how in ("eager", "vmap"):
        _preservation._checked.clear()
        update_once(Words, pf.stateless(Words()), how=how, batch=(words, y))


def test_the_cost_is_two_forward_passes_once() -> None:
    calls: list[int] = []

    def apply(params: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return x @ params["head.weight"].T + params["head.bias"]

    learner = learner_of(apply)
    state = learner.init(pf.init_params(Plain, 0))
    for expected in (1 + 2, 4, 5):
        state, _ = learner.update(state, batch_for(Plain))
        assert len(calls) == expected
    learner_of(apply).update(state, batch_for(Plain, size=7))  # another learner, another batch
    assert len(calls) == 6


def test_a_learner_that_is_made_in_each_step_is_checked_once() -> None:
    checks: list[int] = []

    def step(state: Any, batch: Any, scale: float) -> Any:
        def apply(params: Any, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() is False:
                checks.append(1)
            return scale * x @ params["head.weight"].T + params["head.bias"]

        return learner_of(apply).update(state, batch)

    state = learner_of(lambda params, x: x).init(pf.init_params(Plain, 0))
    for scale, expected in ((1.0, 2), (1.0, 2), (2.0, 4), (1.0, 4)):
        step(state, batch_for(Plain), scale)
        assert len(checks) == expected


def test_functions_that_close_over_different_networks_are_told_apart() -> None:
    def of(module: nn.Module) -> Any:
        apply = pf.stateless(module)
        return lambda params, x: apply(params, x)

    update_once(Plain, of(Plain()))
    with pytest.raises(ValueError, match="POP does not preserve"):
        update_once(Behind, of(Behind()))


def test_a_function_that_closes_over_itself() -> None:
    def apply(params: Any, x: Tensor, again: bool = True) -> Tensor:
        return apply(params, x, False) if again else x @ params["head.weight"].T + params["head.bias"]

    update_once(Plain, apply)
    assert len(_preservation._checked) == 1


def test_heads_are_checked_for_each_order_of_their_statistics() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(x), self.second(x)], -1)

    apply, params = pf.stateless(Two()), pf.init_params(Two, 0)

    def update(first: int, second: int) -> None:
        heads = [pf.Head(n, indices=torch.tensor([i])) for n, i in (("first", first), ("second", second))]
        learner = pf.popart_learner(apply, pf.sgd(0.0), pf.popart(2, 0.5), head=heads)
        learner.update(learner.init(params), (torch.ones(3), torch.tensor([100.0, -5.0])))

    update(0, 1)
    with pytest.raises(ValueError, match="popart_learner: "):
        update(1, 0)


def test_statistics_that_stand_still_are_not_checked() -> None:
    custom = pf.PopArt(pf.popart(1, 0.5).init, lambda state, targets, indices=None: state)
    learner = pf.popart_learner(pf.stateless(Behind()), pf.sgd(0.0), custom, head="head")
    learner.update(learner.init(pf.init_params(Behind, 0)), batch_for(Behind))


def test_random_numbers_and_inputs_stay_as_they_were() -> None:
    def apply(params: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            torch.rand(5)
            x.zero_()
        return x @ params["head.weight"].T + params["head.bias"]

    x, y = batch_for(Plain)
    given = x.clone()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    update_once(Plain, apply, batch=(x, y))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(x, given)


@pytest.mark.parametrize("how", ["eager", "vmap"])
def test_a_network_that_can_not_be_checked_says_so_once(how: str) -> None:
    def apply(params: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("no such values")
        return x @ params["head.weight"].T + params["head.bias"]

    with pytest.warns(UserWarning, match="could not be checked on random inputs: RuntimeError: no such values"):
        update_once(Plain, apply, how=how)
    update_once(Plain, apply, how=how)


def test_in_the_functions_of_torch_func_and_in_jax() -> None:
    apply = pf.stateless(Behind())
    learner = learner_of(apply)
    state = learner.init(pf.init_params(Behind, 0))

    def loss(y: Tensor) -> Tensor:
        return learner.update(state, (batch_for(Behind)[0], y))[1].loss

    for transform in (torch.func.grad, lambda f: lambda y: torch.func.jvp(f, (y,), (y,))):
        with pytest.raises(ValueError, match="they are no linear function of the head"):
            transform(loss)(batch_for(Behind)[1])
    jax = pytest.importorskip("jax")
    from popart_func.interop.jax import to_jax, to_jax_function

    with pytest.raises(ValueError, match="they are no linear function of the head"):
        jax.jit(to_jax_function(learner.update))(to_jax(state), to_jax(batch_for(Behind)))
