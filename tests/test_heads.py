"""Heads wherever they are, with outputs that share statistics: POP is exact for each, moments and targets included.

`HEADS` is a table of networks. Tests with `ROWS` run over all of them.
"""

from __future__ import annotations

import pytest
import torch
from head_table import GROUPS, HEADS, apply_of, linear, params_of, unnormalized
from random_heads import FLOAT64, random_state
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

import popart_func as pf
from popart_func import optim
from popart_func.heads import Head
from popart_func.learners import losses

ROWS = pytest.mark.parametrize("row", HEADS.values(), ids=HEADS.keys())


@ROWS
def test_a_whole_network_moves_at_once(row):
    """Statistics, heads, a target network and moments; predictions stay to 1e-12 of their size, in float64."""
    popart, x = pf.popart(row.tasks, 0.5, groups=row.groups), torch.randn(5, 3, dtype=FLOAT64)
    params, target, state = params_of(row), params_of(row), random_state(row.tasks)
    opt_state = pf.adam(0.1).init(params)
    opt_state[0].mu.update({name: torch.randn_like(leaf) for name, leaf in params.items()})
    opt_state[0].nu.update({name: torch.rand_like(leaf) for name, leaf in params.items()})
    y = torch.randn(9, row.tasks, dtype=FLOAT64) * 1e3 - 500
    (popped, popped_target), moments, new = popart.update_network((params, target), opt_state, state, y, head=row.head)
    assert not torch.allclose(new.scale, state.scale, rtol=0.5)
    for before, after in ((params, popped), (target, popped_target)):
        torch.testing.assert_close(
            unnormalized(row, after, x, new), unnormalized(row, before, x, state), rtol=1e-12, atol=1e-10
        )
    assert torch.equal(popped["body.weight"], params["body.weight"])

    # The gradient of half the sum of squared normalized errors, which POP makes σ/σ' times as large.
    def gradient(network, statistics):
        indices = None if row.tasks == 1 else row.groups

        def total(p):
            outputs = apply_of(row)(p, x)
            goal = pf.normalize(statistics, torch.full_like(outputs, 3.0), indices)
            return 0.5 * (outputs - goal).square().sum()

        return torch.func.grad(total)(network)

    old_grads, new_grads = gradient(params, state), gradient(popped, new)
    factors = {name: leaf / opt_state[0].mu[name] for name, leaf in moments[0].mu.items()}
    for name in row.shapes.keys() - {"gate"}:
        torch.testing.assert_close(factors[name] * old_grads[name], new_grads[name], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(moments[0].nu[name] / opt_state[0].nu[name], factors[name].square())
    assert torch.equal(moments[0].mu["body.weight"], opt_state[0].mu["body.weight"])


@ROWS
def test_learners_train_it_and_move_no_prediction_at_rate_0(row):
    """By batches of targets at every output; also with every lane at its own step size."""
    apply, params, x = apply_of(row), params_of(row), torch.randn(7, 3, dtype=FLOAT64)
    y = apply(params_of(row), x) * 100 + 300

    def learned(step_size, rate=0.0, steps=1):
        popart = pf.popart(row.tasks, step_size, groups=row.groups)
        learner = pf.popart_learner(apply, pf.sgd(rate), popart, head=row.head)
        state = learner.init(params)
        for _ in range(steps):
            state, info = learner.update(state, (x, y))
        return state, info

    state, _ = learned(0.5)
    torch.testing.assert_close(
        unnormalized(row, state.params, x, state.statistics),
        unnormalized(row, params, x, pf.init_state(row.tasks, dtype=FLOAT64)),
        rtol=1e-12,
        atol=1e-10,
    )
    first, last = learned(0.3, 0.02)[1], learned(0.3, 0.02, 60)[1]
    assert last.error.mean() < 0.7 * first.error.mean()
    lanes = vmap(lambda step_size: learned(step_size, 0.02)[0])(torch.tensor([0.1, 0.5], dtype=FLOAT64))
    alone = learned(0.5, 0.02)[0]
    for name, leaf in alone.params.items():
        torch.testing.assert_close(lanes.params[name][1], leaf, rtol=1e-10, atol=1e-10)


def test_pop_fold_and_normalize_take_the_statistic_of_each_output():
    old, new, h = random_state(2), random_state(2), torch.randn(8, 5, dtype=FLOAT64)
    head = {"weight": torch.randn(6, 5, dtype=FLOAT64), "bias": torch.randn(6, dtype=FLOAT64)}
    popped = pf.pop(head, old, new, GROUPS)

    def outputs(head, state):
        return pf.unnormalize(state, h @ head["weight"].mT + head["bias"], GROUPS)

    torch.testing.assert_close(outputs(popped, new), outputs(head, old), rtol=1e-12, atol=1e-12)
    folded = pf.fold(head, old, GROUPS)
    torch.testing.assert_close(h @ folded["weight"].mT + folded["bias"], outputs(head, old), rtol=1e-12, atol=1e-12)
    turned = pf.pop({"weight": head["weight"].mT, "bias": head["bias"]}, old, new, GROUPS, axis=-1)
    assert torch.equal(turned["weight"], popped["weight"].mT)
    values = torch.randn(4, 6, dtype=FLOAT64)
    by_hand = torch.cat([pf.normalize(old, values[:, i : i + 1], torch.full((1,), i // 3)) for i in range(6)], -1)
    assert torch.equal(pf.normalize(old, values, GROUPS), by_hand)


def test_the_statistic_of_each_output_of_an_ensemble_whose_inputs_come_first():
    """Leading axes of the bias lie on the other side of the weight's inputs."""
    params = {"weight": torch.randn(3, 4, 2, dtype=FLOAT64), "bias": torch.randn(3, 2, dtype=FLOAT64)}
    old, new, hidden = random_state(2), random_state(2), torch.randn(4, dtype=FLOAT64)
    indices = torch.tensor([[0, 1], [1, 0], [1, 1]])

    def outputs(head):
        return torch.einsum("mio,i->mo", head["weight"], hidden) + head["bias"]

    popped = pf.pop(params, old, new, indices, axis=-1)
    before = pf.unnormalize(old, outputs(params), indices)
    torch.testing.assert_close(pf.unnormalize(new, outputs(popped), indices), before, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(outputs(pf.fold(params, old, indices, axis=-1)), before, rtol=1e-12, atol=1e-11)


def test_the_axis_of_outputs_counts_from_either_end():
    old, new = random_state(2), random_state(2)
    rows = {"weight": torch.randn(2, 4, dtype=FLOAT64), "bias": torch.randn(2, dtype=FLOAT64)}
    columns = {"weight": rows["weight"].mT, "bias": rows["bias"]}
    expected = pf.pop(rows, old, new)
    for axis in (0, -2):
        assert pf.tree.max_difference(pf.pop(rows, old, new, axis=axis), expected) == 0
    for axis in (1, -1):
        assert torch.equal(pf.pop(columns, old, new, axis=axis)["weight"].mT, expected["weight"])
    for axis in (2, -3):
        with pytest.raises(ValueError, match=r"^pop: 'weight' must have shape .* or a Head must name the axis"):
            pf.pop(rows, old, new, axis=axis)
    with pytest.raises(ValueError, match=r"^pop: 'weight' must have shape .* or a Head must name the axis"):
        pf.pop({"weight": rows["weight"], "bias": rows["weight"]}, old, new)


def test_a_bias_must_fit_an_axis_that_is_named():
    weight, old = torch.randn(2, 4, dtype=FLOAT64), random_state(2)
    for shape in ((), (4,)):
        with pytest.raises(ValueError, match=r"^pop: 'bias' must have shape \(2,\) to go with 'weight', got"):
            pf.pop({"weight": weight, "bias": torch.zeros(shape, dtype=FLOAT64)}, old, old, axis=0)
    row = {"weight": weight.mT, "bias": torch.zeros(1, 2, dtype=FLOAT64)}
    popped = pf.pop(row, old, old, torch.tensor([[1, 0]]), axis=-1)
    assert [leaf.shape for leaf in popped.values()] == [(4, 2), (1, 2)]


def test_a_head_without_bias_whose_outputs_share_statistics():
    old, indices = random_state(2), torch.tensor([0, 1, 1, 0])
    new = old._replace(scale=old.scale * torch.tensor([2.0, 4.0]))
    params = {"top.weight": torch.randn(4, 3, dtype=FLOAT64)}
    factors = torch.tensor([[2.0], [4.0], [4.0], [2.0]], dtype=FLOAT64)
    torch.testing.assert_close(pf.pop(params, old, new, indices)["top.weight"], params["top.weight"] / factors)
    for axis, weight in ((-2, torch.randn(5, 2, 3)), (-1, torch.randn(5, 3, 2))):
        folded = pf.fold({"top.weight": weight.double()}, old, axis=axis)
        assert list(folded) == ["top.weight", "top.bias"]
        shape = (5, 2) if axis == -2 else (2,)
        assert torch.equal(folded["top.bias"], (old.shift + old.residue).expand(shape))


def test_one_action_per_example_moves_the_statistic_of_its_task():
    """Q-learning on [tasks x actions]: indices name outputs, and their task's statistic moves."""
    row = HEADS["tasks x actions"]
    learner = pf.popart_learner(apply_of(row), pf.sgd(0.0), pf.popart(2, 1.0, groups=GROUPS), head="head")
    state = learner.init(params_of(row))
    y, action = torch.tensor([10.0, 12.0, -5.0], dtype=FLOAT64), torch.tensor([0, 2, 4])
    state, info = learner.update(state, (torch.randn(3, 3, dtype=FLOAT64), y, action))
    assert state.statistics.shift.tolist() == [11.0, -5.0]
    torch.testing.assert_close(info.normalized_target[:2], torch.tensor([-1.0, 1.0], dtype=FLOAT64))


@pytest.mark.parametrize("name", ["art", "popart", "normalized_sgd"])
def test_every_learner_takes_targets_of_tasks_and_of_outputs(name):
    """The targets of a task are those of all its outputs; weights go with them."""
    row = HEADS["tasks x actions"]
    options = {} if name == "art" else {"head": "head"}
    for groups, tasks in ((GROUPS, 2), (0 * GROUPS, 1)):
        popart = pf.popart(tasks, 0.5, groups=groups)
        learner = getattr(pf, f"{name}_learner")(apply_of(row), pf.sgd(0.0), popart, **options)
        first = learner.init(params_of(row))
        x, y = torch.randn(5, 3, dtype=FLOAT64), torch.randn(5, tasks, dtype=FLOAT64) * 30
        weights = torch.tensor([[2.0], [0.0], [1.0], [0.5], [1.0]], dtype=FLOAT64) * torch.rand(tasks, dtype=FLOAT64)
        for rows in (slice(None), 2):
            own, share = y[rows], weights[rows]
            for at_outputs in (False, True):
                batch = (
                    (x[rows], own[..., groups], None, share[..., groups]) if at_outputs else (x[rows], own, None, share)
                )
                state, info = learner.update(first, batch)
                expected = pf.art(first.statistics, own, weights=share, step_size=0.5)
                assert pf.tree.max_difference(state.statistics, expected) < 1e-9
                targets = pf.normalize(expected, own)[..., groups].where(share[..., groups] > 0, 0)
                torch.testing.assert_close(info.normalized_target, targets)
                losses = 0.5 * (info.normalized_prediction - targets).square() * share[..., groups]
                total = share[..., groups].amax(-1).sum()
                torch.testing.assert_close(info.loss, losses.sum() / total)


@pytest.mark.usefixtures("unchecked")
def test_a_quantile_critic_learns_quantiles_and_is_popped_exactly():
    """Two tasks of three quantiles: targets uniform on [0, 1000] and [-10, 0] have the quantiles 0.25, 0.5, 0.75."""
    quantiles, groups = torch.tensor([0.25, 0.5, 0.75]).repeat(2), GROUPS
    learner = pf.popart_learner(
        lambda p, x: linear(p, "head", x),
        pf.sgd(0.1),
        pf.popart(2, 0.01, groups=groups),
        head="head",
        loss=losses.quantile(quantiles),
    )
    state = learner.init({"head.weight": torch.zeros(6, 1), "head.bias": torch.zeros(6)})
    spread = torch.rand(400, 64, 2) * torch.tensor([1000.0, 10.0]) - torch.tensor([0.0, 10.0])
    for y in spread:
        state, info = learner.update(state, (torch.zeros(64, 1), y))
    got = pf.unnormalize(state.statistics, state.params["head.bias"], groups)
    torch.testing.assert_close(got, torch.tensor([250.0, 500, 750, -7.5, -5, -2.5]), rtol=0.1, atol=0.5)
    assert info.loss.ndim == 0
    assert info.normalized_target.shape == (64, 6)


@pytest.mark.usefixtures("unchecked")
def test_statistics_that_stand_still_for_some_epochs():
    """One update_network per rollout, then gradient steps on a loss of one's own: three lines."""
    row, popart, optimizer = HEADS["linear"], pf.popart(2, 0.5), pf.adam(0.05)
    params, x = params_of(row), torch.randn(32, 3, dtype=FLOAT64)
    y = torch.stack([1e4 * x[:, 0], x[:, 1] - 7], -1)
    opt_state, state = optimizer.init(params), popart.init(params)

    def error(params, goal):
        return (apply_of(row)(params, x) - goal).abs().mean()

    first = (unnormalized(row, params, x, state) - y).abs().mean(0)
    for _ in range(20):
        params, opt_state, state = popart.update_network(params, opt_state, state, y, head="head")
        for _ in range(8):
            grads = torch.func.grad(lambda p, goal: (apply_of(row)(p, x) - goal).abs().mean())(
                params, pf.normalize(state, y)
            )
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = pf.apply_updates(params, updates)
    assert (unnormalized(row, params, x, state) - y).abs().mean(0).div(first).max() < 0.3


def test_all_moments_of_one_statistic_move_and_those_of_a_part_do_too():
    """The head's by the ratio of the scales, those below by its square; a state may lack some parameters."""
    row, popart = HEADS["one statistic"], pf.popart(1, 0.5)
    params, y = params_of(row), torch.randn(9, 1, dtype=FLOAT64) * 300
    body = {"body.weight": params["body.weight"]}
    opt_state = optim.MomentumState(params), optim.MomentumState(body)
    _, moved, new = popart.update_network(params, opt_state, pf.init_state(1), y, head="head", rescale_moments="all")
    ratio = 1 / new.scale
    for name, leaf in moved[0].trace.items():
        torch.testing.assert_close(leaf, params[name] * (ratio if name.startswith("head.") else ratio**2))
    assert torch.equal(moved[1].trace["body.weight"], moved[0].trace["body.weight"])
    _, moved, _ = popart.update_network(params, opt_state[1], pf.init_state(1), y, head="head")
    assert torch.equal(moved.trace["body.weight"], params["body.weight"])


def test_weight_decay_pulls_the_folded_head_toward_zero():
    """Not toward the mean of the targets, as plain decay does: decayed alone, the folded head shrinks by 1 - rate."""
    row, popart = HEADS["tasks x actions"], pf.popart(2, 0.5, groups=GROUPS)
    makers = {
        "adamw": lambda: pf.chain(optim.add_decayed_weights(0.1), optim.scale_by_learning_rate(1.0)),
        "torch": lambda: optim.from_torch(torch.optim.SGD, lr=1.0, weight_decay=0.1),
    }
    for name, make in makers.items():
        optimizer = make()
        params, state = params_of(row), pf.init_state(2, dtype=FLOAT64)
        opt_state = optimizer.init(params)
        for _ in range(5):
            y = torch.randn(9, 2, dtype=FLOAT64) * 300 + 1000
            params, opt_state, state = popart.update_network(params, opt_state, state, y, head="head")
            head = {key: leaf for key, leaf in params.items() if key.startswith("head.")}
            before = pf.fold(head, state, GROUPS)
            zeros = {key: torch.zeros_like(leaf) for key, leaf in params.items()}
            updates, opt_state = optimizer.update(zeros, opt_state, params)
            params = pf.apply_updates(params, updates)
            after = pf.fold({key: params[key] for key in head}, state, GROUPS)
            for key in head:
                torch.testing.assert_close(after[key], 0.9 * before[key], rtol=1e-9, atol=1e-9, msg=name)


def test_averages_of_parameters_are_popped():
    """ASGD's, which make the same predictions before and after."""
    row, optimizer = HEADS["linear"], optim.from_torch(torch.optim.ASGD, lr=0.1, t0=0)
    params, state, x = params_of(row), random_state(2), torch.randn(5, 3, dtype=FLOAT64)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    before = unnormalized(row, opt_state.entries["ax"], x, state)
    y = torch.randn(9, 2, dtype=FLOAT64) * 1e3
    _, opt_state, new = pf.popart(2, 0.5).update_network(params, opt_state, state, y, head="head")
    torch.testing.assert_close(unnormalized(row, opt_state.entries["ax"], x, new), before, rtol=1e-12, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_heads(self):
        row, state = HEADS["two heads"], pf.init_state(2)
        params = params_of(row)
        for head, message in (
            ("nothing", r"`head` must name a layer of `params`, one of \[.*'extrinsic'.*\], got 'nothing'"),
            (["extrinsic"], "'extrinsic.weight' must have shape .* with outputs = 2 tasks"),
            (Head("extrinsic", indices=torch.tensor([0, 1])), "must be integers that broadcast to its outputs"),
            (Head("extrinsic", indices=torch.tensor([5])), r"`indices` must lie in \[0, 2\), got values from 5"),
        ):
            with pytest.raises(ValueError, match=f"update_network: .*{message}"):
                pf.popart(2, 0.1).update_network(params, (), state, torch.ones(2), head=head)
        unbiased = {name: leaf for name, leaf in params_of(HEADS["linear"]).items() if name != "head.bias"}
        with pytest.raises(ValueError, match=r"^update_network: `params` has no bias"):
            pf.popart(2, 0.1).update_network(unbiased, (), state, torch.ones(2), head="head")
        with pytest.raises(TypeError, match=r"^update_network: `head` must be the name of a layer"):
            pf.popart(2, 0.1).update_network(params, (), state, torch.ones(2), head=[])
        for wrong, got in ((torch.nn.Linear(2, 1), "Linear"), ([], "list"), ([torch.ones(2)], "list")):
            with pytest.raises(TypeError, match=f"update_network: `params` must be the flat parameters .*got {got}"):
                pf.popart(2, 0.1).update_network(wrong, (), state, torch.ones(2), head="extrinsic")
        with pytest.raises(ValueError, match=r"update_network: `rescale_moments` must be .*, got 'heads'"):
            pf.popart(2, 0.1).update_network(params, (), state, torch.ones(2), head=row.head, rescale_moments="heads")

    @pytest.mark.parametrize("make", [optim.trace(0.9).init, pf.adam(0.1).init, optim.DecayState])
    def test_the_optimizer_state_of_another_network(self, make):
        """Nothing of it would follow; a state of some parameters of the network is one of a frozen head."""
        params, state = params_of(HEADS["linear"]), pf.init_state(2)
        of_another = make({f"other.{name}": leaf for name, leaf in params.items()})
        with pytest.raises(ValueError, match=r"^rescale_moments: `state` must be that of an optimizer of the network"):
            pf.popart(2, 0.1).update_network(params, of_another, state, torch.ones(2), head="head")
        params["body"] = torch.ones(2)
        for opt_state in (make({"body": torch.ones(2)}), ()):
            pf.popart(2, 0.1).update_network(params, opt_state, state, torch.ones(2), head="head")

    @pytest.mark.parametrize("targets", [torch.ones(5, 2), torch.ones(3), torch.ones(6, 5)])
    def test_one_statistic_does_not_make_targets_of_other_axes(self, targets):
        """Of six outputs: an axis that is none of tasks or outputs must not be taken for the one task."""
        row = HEADS["tasks x actions"]
        learner = pf.popart_learner(apply_of(row), pf.sgd(0.0), pf.popart(1, 0.1, groups=0 * GROUPS), head="head")
        x = torch.ones(*targets.shape[:-1], 3, dtype=FLOAT64)
        with pytest.raises(ValueError, match=r"popart_learner: the targets must have the shape of the outputs"):
            learner.update(learner.init(params_of(row)), (x, targets))

    def test_groups(self):
        for groups in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
            with pytest.raises(ValueError, match=r"popart: `groups` must be a tensor of integers, \[outputs\], got"):
                pf.popart(2, 0.1, groups=groups)
        with pytest.raises(ValueError, match=r"popart: `groups` must lie in \[0, 2\), got values from 0 to 2"):
            pf.popart(2, 0.1, groups=torch.tensor([0, 2]))

    def test_an_optimizer_whose_state_is_not_known(self):
        row, unknown = (
            HEADS["linear"],
            pf.GradientTransformation(
                lambda params: {"norm": torch.zeros(())}, lambda grads, state, params=None: (grads, state)
            ),
        )
        learner = pf.popart_learner(apply_of(row), unknown, pf.popart(2, 0.1), head="head")
        state = learner.init(params_of(row))
        with pytest.raises(TypeError, match=r"may be a moment.* register_state.* rescale_moments=False"):
            learner.update(state, (torch.ones(3, dtype=FLOAT64), torch.ones(2, dtype=FLOAT64)))
        learner = pf.popart_learner(apply_of(row), unknown, pf.popart(2, 0.1), head="head", rescale_moments=False)
        learner.update(state, (torch.ones(3, dtype=FLOAT64), torch.ones(2, dtype=FLOAT64)))


def test_a_trace_with_symbolic_shapes_finds_the_head():
    popart = pf.popart(1, 0.1)

    def weight_after(weight, targets):
        return popart.update({"weight": weight, "bias": weight[:, 0]}, popart.init(), targets)[0]["weight"]

    inputs = torch.ones(1, 3), torch.arange(5.0)[:, None]
    torch.testing.assert_close(make_fx(weight_after, tracing_mode="symbolic")(*inputs)(*inputs), weight_after(*inputs))
