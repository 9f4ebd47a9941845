"""`PopArtHead`: equal to the pure functions to the bit, and right in a training loop of modules."""

from __future__ import annotations

import copy
import inspect
import io

import cleanrl_ppo
import ddp_head
import new_process
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import popart_func as pf
from popart_func import optim, scales
from popart_func.nn import PopArtHead

GROUPS = torch.tensor([0, 0, 1])
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "ASGD": (torch.optim.ASGD, {"t0": 1}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_the_pure_functions_to_the_bit(name):
    """Three updates with weights and groups, the optimizer's state included."""
    head = PopArtHead(4, 3, 0.3, num_tasks=2, groups=GROUPS)
    cls, options = OPTIMIZERS[name]
    optimizer = cls(head.parameters(), 0.01, **options)
    popart = pf.popart(2, 0.3, groups=GROUPS)
    for _ in range(3):
        y, weights = torch.randn(8, 2) * 100 + 40, (torch.rand(8, 2) < 0.7).float()
        params = {key: leaf.detach().clone() for key, leaf in head.named_parameters()}
        held = copy.deepcopy(optim.torch_optimizers.state_of(optimizer, dict(head.named_parameters())))
        expected = popart.update_network(
            params, held, pf.PopArtState(*map(torch.clone, head.statistics)), y, weights=weights, head=pf.Head("")
        )
        head.update(torch.where(weights > 0, y, torch.nan), weights=weights, optimizer=optimizer)
        assert all(torch.equal(leaf, expected[0][key]) for key, leaf in head.named_parameters())
        now = optim.torch_optimizers.state_of(optimizer, dict(head.named_parameters()))
        assert pf.tree.max_difference(now.entries, expected[1].entries) == 0
        assert all(map(torch.equal, head.statistics, expected[2]))
        optimizer.zero_grad()
        (head(torch.randn(8, 4)) - head.normalize(y[:, :1].expand(8, 3))).square().mean().backward()
        optimizer.step()


def test_updates_move_no_prediction_whatever_the_targets():
    head, h = PopArtHead(4, 3, 0.5, num_tasks=2, groups=GROUPS, dtype=torch.float64), torch.randn(9, 4).double()
    before = head.unnormalize(head(h))
    for size in (1.0, 1e4, 1e-2):
        head.update(torch.randn(5, 2) * size)
        torch.testing.assert_close(head.unnormalize(head(h)), before, rtol=1e-9, atol=1e-9)
    by_index = head.normalize(torch.ones(2), torch.tensor([0, 1]))
    assert torch.equal(by_index, head.normalize(torch.ones(1, 2))[0])


def test_it_is_saved_moved_cast_and_copied():
    head = PopArtHead(4, 2, 0.5, bias_correction=True)
    head.update(torch.randn(6, 2) * 30 + 1e5)
    assert set(head.state_dict()) == {"weight", "bias", "shift", "scale", "variance", "count", "residue"}
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other = PopArtHead(4, 2, 0.5, bias_correction=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, head.statistics, other.statistics))
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for twin in (copy.deepcopy(head), torch.load(file, weights_only=False)):
        y = torch.randn(3, 2)
        twin.update(y)
        other.load_state_dict(head.state_dict())
        other.update(y)
        assert all(map(torch.equal, twin.statistics, other.statistics))
    narrow = copy.deepcopy(head).bfloat16()
    assert narrow.weight.dtype == torch.bfloat16
    assert all(map(torch.equal, narrow.statistics, head.statistics))
    assert narrow.unnormalize(narrow(torch.ones(1, 4).bfloat16())).dtype == torch.float32
    wide = copy.deepcopy(head).double()
    assert wide.shift.dtype == torch.float64
    assert wide.count.dtype == torch.int32
    assert head.to("meta").shift.device.type == "meta"


@pytest.mark.parametrize("popart", [None, scales.percentiles(2, 0.1)])
def test_reset_parameters_resets_the_statistics(popart):
    """Also those of a head that was made without memory, and of one that has been cast."""
    fresh = PopArtHead(4, 2, popart=popart)
    used = copy.deepcopy(fresh)
    used.update(torch.randn(6, 2) * 30 + 1e5)
    empty = PopArtHead(4, 2, popart=popart, device="meta").to_empty(device="cpu")
    for field in empty.statistics:
        field.fill_(7)  # stands for whatever the memory holds
    for head in (used, empty, copy.deepcopy(used).double()):
        weight = head.weight.detach().clone()
        head.reset_parameters()
        assert not torch.equal(head.weight, weight)
        found = [field.to(start.dtype) for field, start in zip(head.statistics, fresh.statistics, strict=True)]
        assert all(map(torch.equal, found, fresh.statistics))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [None, lambda: scales.percentiles(1, 0.1)])
def test_a_loop_of_modules_learns_at_any_scale(make):
    """A critic in five lines: with targets of 1e4 it is as good as with targets of 1."""
    x = torch.randn(64, 3)
    errors = []
    for size in (1.0, 1e4):
        torch.manual_seed(0)
        head = PopArtHead(16, 1, 0.1) if make is None else PopArtHead(16, 1, popart=make())
        body = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 3e-2)
        y = size * (x.sum(-1, keepdim=True).sin() + 5)
        for _ in range(60):
            head.update(y, optimizer=optimizer)
            loss = (head(body(x)) - head.normalize(y)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors.append(float((head.unnormalize(head(body(x))) - y).abs().mean().detach()) / size)
    assert errors[0] < 0.4  # the mean alone is off by 0.6
    assert errors[1] < 1.5 * errors[0] + 0.02


@pytest.mark.usefixtures("unchecked")
def test_an_optimizer_of_ones_own_is_refused():
    class Mine(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for param in group["params"]:
                    self.state[param]["mystery"] = param.detach().clone()

    head = PopArtHead(2, 1)
    optimizer = Mine(head.parameters(), 0.1)
    optimizer.step()
    with pytest.raises(
        TypeError, match=r"PopArtHead.update: `optimizer` must be one of torch.optim, got Mine, .*'mystery'"
    ):
        head.update(torch.ones(3, 1), optimizer=optimizer)
    head.update(torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"`optimizer` must be an optimizer of torch\.optim, got str"):
        head.update(torch.ones(3, 1), optimizer="adam")
    with pytest.raises(ValueError, match="`optimizer` must train this layer, got one without its weight and bias"):
        copy.deepcopy(head).update(torch.ones(3, 1), optimizer=torch.optim.SGD(head.parameters(), 0.1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("weight", nn.utils.parametrizations.weight_norm),
        ("weight", nn.utils.parametrizations.spectral_norm),
        ("weight", nn.utils.weight_norm),
        ("weight", nn.utils.spectral_norm),
        ("weight", lambda head: prune.l1_unstructured(head, "weight", 1)),
        ("bias", lambda head: nn.utils.parametrize.register_parametrization(head, "bias", nn.Tanh())),
        ("bias", lambda head: head.register_parameter("bias", None) or head),
    ],
)
def test_a_weight_or_bias_that_is_no_parameter_is_refused(name, wrap):
    """A change of it in place would be lost."""
    head = wrap(PopArtHead(4, 1, 0.5))
    with pytest.raises(TypeError, match=f"PopArtHead.update: `{name}` must be the layer's own parameter, .*remove_"):
        head.update(torch.full((8, 1), 1000.0))
    assert head.shift == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"popart": True, "process_group": object()}, TypeError, r"\['process_group'\] belong to the default stat"),
        ({"popart": True, "step_size": 0.1}, TypeError, r"\['step_size'\] belong to the default statistics"),
        ({"popart": True, "groups": GROUPS}, TypeError, r"\['groups'\] belong to .* can't be given with `popart`"),
        ({"popart": True, "num_tasks": 2}, ValueError, "`num_tasks` must be .* of `popart`, 3, got 2"),
        ({"gather": list, "process_group": object()}, TypeError, "`gather` can't be given with `process_group`"),
        ({"bias": False}, TypeError, r"must be among \['bias_corr.*'scale_ub'\], got \['bias'\]. .* always has a bias"),
        ({"num_outputs": 2}, TypeError, r"must be among .*, got \['num_outputs'\]"),
    ],
)
def test_options_that_would_be_dropped_or_are_unknown_are_refused(options, error, message):
    if "popart" in options:
        options = {**options, "popart": scales.percentiles(3, 0.1)}
    with pytest.raises(error, match=f"^PopArtHead: .*{message}"):
        PopArtHead(4, 3, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("collect", [lambda g: [g], lambda g: (g,), lambda g: {"last": g}, lambda g: {"all": [1, [g]]}])
@pytest.mark.parametrize("place", ["head", "body", "no parameter"])
def test_an_optimizer_with_collections_of_tensors_is_refused(collect, place):
    """Wherever its state keeps them. Numbers and empty collections move nothing."""
    head, body = PopArtHead(2, 1), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], 0.1)
    key = {"head": head.weight, "body": body.weight, "no parameter": "all"}[place]
    optimizer.state[key] = {"hist": [], "calls": 3, "names": ("a",)}
    head.update(torch.ones(3, 1), optimizer=optimizer)
    optimizer.state[key]["hist"] = collect(torch.ones(1, 2))
    before = copy.deepcopy(head.state_dict())
    expected = r"PopArtHead.update: `optimizer` must keep one tensor .* got SGD, whose entries \['(hist|all)'\]"
    with pytest.raises(TypeError, match=expected):
        head.update(torch.full((3, 1), 100.0), optimizer=optimizer)
    assert all(map(torch.equal, head.state_dict().values(), before.values()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("first", ["body", "head"])
def test_lbfgs_is_refused_wherever_it_keeps_its_state(first):
    body, head = nn.Linear(3, 4), PopArtHead(4, 1)
    parameters = {"body": [*body.parameters(), *head.parameters()], "head": [*head.parameters(), *body.parameters()]}
    optimizer = torch.optim.LBFGS(parameters[first], 0.1, max_iter=1)

    def loss():
        optimizer.zero_grad()
        error = head(body(torch.ones(2, 3))).square().mean()
        error.backward()
        return error

    optimizer.step(loss)
    with pytest.raises(TypeError, match=r"PopArtHead.update: `optimizer` must be one of .* LBFGS, whose entries .*'d'"):
        head.update(torch.ones(3, 1), optimizer=optimizer)


@pytest.mark.usefixtures("unchecked")
def test_a_cleanrl_style_ppo_in_five_changed_lines_learns_large_rewards():
    """CartPole with rewards of 1000: without Pop-Art the critic's gradients leave nothing of the policy's."""
    source = inspect.getsource(cleanrl_ppo)
    assert source.count("  # Pop-Art\n") == 5
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network waits for its threads
    try:
        assert cleanrl_ppo.train(1e3, popart=True, updates=20)[-1] > 100
        assert cleanrl_ppo.train(1e3, popart=False, updates=20)[-1] < 50
    finally:
        torch.set_num_threads(threads)


def test_distributed_data_parallel_is_one_process_with_all_targets(tmp_path):
    new_process.context()
    torch.multiprocessing.start_processes(
        ddp_head.run, args=(str(tmp_path),), nprocs=ddp_head.RANKS, start_method="forkserver"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ddp_head.RANKS))
    assert all(torch.equal(leaf, second[name]) for name, leaf in first.items())
    alone = ddp_head.make(None)
    ddp_head.train(alone, alone[-1], *ddp_head.data())
    for name, leaf in alone.state_dict().items():
        torch.testing.assert_close(first[name], leaf, rtol=1e-4, atol=1e-5)
    assert first["2.scale"] > 1e3


COMPILED = """
import sys, time, torch
import popart_func as pf

head, other, h = pf.nn.PopArtHead(4, 2, 0.5), pf.nn.PopArtHead(4, 2, 0.5), torch.randn(6, 4)
other.load_state_dict(head.state_dict())
y = 1e3 * torch.randn(6, 2)


def step(head, h, y):
    head.update(y)
    return head.unnormalize(head(h)), head.normalize(y)


found = torch.compile(step, fullgraph=True, backend=sys.argv[1])(head, h, y)
torch.testing.assert_close(found, step(other, h, y), rtol=1e-4, atol=1e-3)  # values of 1e3
assert all(map(torch.allclose, head.statistics[:4], other.statistics[:4]))
torch.testing.assert_close(head.weight, other.weight)

make = lambda: pf.UnifiedModel(16, 10, 1)
learner = pf.popart_learner(pf.stateless(make()), pf.adam(1e-3), pf.popart(1, 0.01))
state, batch = learner.init(pf.init_params(make, 0)), (torch.randn(32, 16), 100 * torch.randn(32, 1))
expected = learner.update(state, batch)
started = time.time()
compiled = torch.compile(learner.update, fullgraph=True, backend=sys.argv[1])
found = compiled(state, batch)
took = time.time() - started
assert pf.tree.max_difference(found, expected) < 1e-3
assert pf.tree.max_difference(compiled(found[0], batch), learner.update(expected[0], batch)) < 1e-3
print(took)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_head_and_a_learner_are_compiled_without_a_break(backend):
    """In a program of its own, where annotations are not enforced."""
    program = new_process.run(COMPILED, arguments=[backend], timeout=300)
    assert program.returncode == 0, program.stderr
    assert float(program.stdout) < 20
