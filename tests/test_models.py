from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
import torch
from torch import nn
from torch.nn import init

import popart_func as pf
from popart_func.engines import UnsupportedError
from popart_func.interop.jax import to_jax, to_jax_function


def make_unified():
    return pf.UnifiedModel(16, 10, 1)


class Critic(nn.Module):
    """A network with a nested head, and a sibling whose name begins like the head's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.critic = nn.ModuleDict({"head": nn.Linear(4, 2), "header": nn.Linear(4, 4)})

    def forward(self, x):
        return self.critic["head"](torch.tanh(self.critic["header"](torch.tanh(self.body(x)))))


@pytest.mark.parametrize("seed_", [0, 426, -1, 2**63 - 1])
def test_init_params_is_bit_equal_to_torch(seed_):
    params = pf.init_params(make_unified, seed_)
    torch.manual_seed(seed_)
    expected = dict(make_unified().named_parameters())
    assert list(params) == list(expected)
    assert all(torch.equal(params[name], expected[name]) for name in params)
    assert not any(value.requires_grad for value in params.values())


def test_init_params_leaves_the_global_random_state():
    before = torch.get_rng_state()
    pf.init_params(make_unified, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_unified_model_is_lower_then_upper():
    def make_both():
        return nn.ModuleList([pf.LowerLayers(16, 10), pf.UpperLayer(10, 2)])

    both = pf.init_params(make_both, 5)
    unified = pf.init_params(lambda: pf.UnifiedModel(16, 10, 2), 5)
    assert {name.partition(".")[2]: value for name, value in both.items()}.keys() == unified.keys()
    assert all(torch.equal(value, unified[name.partition(".")[2]]) for name, value in both.items())
    x = torch.rand(7, 16)
    lower, upper = pf.split(unified)
    hidden = pf.stateless(pf.LowerLayers(16, 10))(lower, x)
    split_output = pf.stateless(pf.UpperLayer(10, 2))(upper, hidden)
    assert torch.equal(split_output, pf.stateless(pf.UnifiedModel(16, 10, 2))(unified, x))


def test_upper_layer_starts_as_a_sum_and_advances_the_random_stream():
    torch.manual_seed(0)
    layer = pf.UpperLayer(10, 1)
    after = torch.get_rng_state()
    assert torch.equal(layer.output_linear.weight, torch.ones(1, 10))
    assert torch.equal(layer.output_linear.bias, torch.zeros(1))
    torch.manual_seed(0)
    nn.Linear(10, 1)
    assert torch.equal(after, torch.get_rng_state())


def test_init_lanes_stacks_single_seeds_in_any_company():
    lanes = pf.init_lanes(make_unified, [4, 9, 2])
    other = pf.init_lanes(make_unified, [9])
    for name, value in lanes.items():
        assert torch.equal(value[1], other[name][0])
        assert torch.equal(value[1], pf.init_params(make_unified, 9)[name])


def filled(fill):
    """A linear layer whose weights an initializer fills."""

    def make():
        module = nn.Linear(150, 100)
        fill(module.weight)
        return module

    return make


INITIALIZERS = {
    "uniform": init.uniform_,
    "normal": init.normal_,
    "xavier uniform": init.xavier_uniform_,
    "xavier normal": init.xavier_normal_,
    "kaiming uniform": init.kaiming_uniform_,
    "kaiming normal": init.kaiming_normal_,
    "orthogonal": init.orthogonal_,
    "sparse": lambda weight: init.sparse_(weight, 0.3),
}

MODULES = {
    "network": make_unified,
    "convolution": lambda: nn.Conv2d(2, 3, 3),
    "transposed": lambda: nn.ConvTranspose1d(2, 3, 2),
    "norms": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)),
    "embedding": lambda: nn.Embedding(5, 3, padding_idx=0),
    "lstm": lambda: nn.LSTM(3, 4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "head": lambda: pf.nn.PopArtHead(3, 2),
    "own draws": lambda: nn.ParameterDict({"a": torch.randn(3), "b": torch.rand(2, 2)}),
}

KEYS = pf.random.split(pf.random.key(1), 2)


@pytest.mark.parametrize("make", [*MODULES.values(), *map(filled, INITIALIZERS.values())])
def test_lanes_begin_as_their_keys_give_alone(make):
    """Names, shapes and dtypes are those under a seed; the global random state stays as it was."""
    before = torch.get_rng_state()
    lanes, seeded = pf.init_lanes(make, KEYS), pf.init_params(make, 0)
    assert list(lanes) == list(seeded)
    for name, value in lanes.items():
        assert torch.equal(value[1], pf.init_params(make, KEYS[1])[name])
        assert (value.shape[1:], value.dtype) == (seeded[name].shape, seeded[name].dtype)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fill", INITIALIZERS.values())
def test_initializers_draw_from_keys_what_they_draw_from_seeds(fill):
    """15,000 numbers: the deviation, and the share of numbers within one."""
    under_key, under_seed = (pf.init_params(filled(fill), seed)["weight"] for seed in (KEYS[0], 0))
    assert under_key.std().item() == pytest.approx(under_seed.std().item(), rel=0.03)
    within = [(weight.abs() < weight.std()).double().mean().item() for weight in (under_key, under_seed)]
    assert within[0] == pytest.approx(within[1], abs=0.02)
    assert not torch.equal(under_key, under_seed)


def test_a_step_draws_first_parameters():
    keys = pf.random.split(pf.random.key(2), 3)
    expected = pf.init_lanes(make_unified, keys)
    step = lambda carry, key: (carry, pf.init_params(make_unified, key))  # noqa: E731
    for engine in ("eager", "native"):
        _, params = pf.scan_lanes(step, torch.zeros(3), keys[None], shared=False, engine=engine)
        assert all(torch.equal(params[name][0], expected[name]) for name in expected)


def positive_(weight):
    """Reads values."""
    init.normal_(weight)
    return weight if weight.mean() > 0 else init.ones_(weight)


def test_a_module_that_vmap_cannot_build_is_refused():
    with pytest.raises(
        RuntimeError, match=r"init_lanes: torch.vmap can't build this module for all keys at once: .* Pass integers"
    ):
        pf.init_lanes(filled(positive_), KEYS)
    assert pf.init_params(filled(init.trunc_normal_), KEYS[0])["weight"].std().item() == pytest.approx(0.88, rel=0.02)


@pytest.mark.parametrize(
    ("make", "head"), [(make_unified, "output_linear"), (Critic, "critic.head"), (Critic, "critic")]
)
def test_unify_inverts_split(make, head):
    params = pf.init_params(make, 0)
    lower, upper = pf.split(params, head=head)
    assert upper
    assert all(name.startswith(head + ".") for name in upper)
    again = pf.unify(pf.SplitParams(lower, upper))
    assert again.keys() == params.keys()
    assert all(again[name] is params[name] for name in params)
    assert pf.split(again, head=head) == (lower, upper)


def test_split_does_not_take_a_sibling_with_a_longer_name():
    _, upper = pf.split(pf.init_params(Critic, 0), head="critic.head")
    assert sorted(upper) == ["critic.head.bias", "critic.head.weight"]


def test_stateless_is_pure():
    module = make_unified()
    own = {name: value.clone() for name, value in module.named_parameters()}
    params = pf.init_params(make_unified, 1)
    before = {name: value.clone() for name, value in params.items()}
    pf.stateless(module)(params, torch.ones(16))
    assert all(torch.equal(value, own[name]) for name, value in module.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in params.items())


class Moving(nn.Module):
    """Replaces a buffer instead of changing it in place, and has one that a state_dict does not hold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.randn(2))
        self.register_buffer("factor", torch.randn(()), persistent=False)

    def forward(self, x, *, add=0.0):
        self.last = self.last + x
        return self.factor * self.last + add


def test_buffers_are_given_by_the_seed_and_returned():
    params = pf.init_params(Moving, seed=3)
    torch.manual_seed(3)
    module = Moving()
    assert torch.equal(params["last"], module.last)
    torch.manual_seed(4)
    apply = pf.stateless(Moving())
    assert apply.trainable == apply.frozen == frozenset()
    output, buffers = apply.with_buffers(params, torch.ones(2), add=1.0)
    torch.testing.assert_close(output, module(torch.ones(2), add=1.0))
    assert pf.tree.max_difference(buffers, dict(module.named_buffers())) == 0
    assert torch.equal(params["last"], pf.init_params(Moving, seed=3)["last"])
    lanes = pf.init_lanes(Moving, range(3))
    outputs = torch.vmap(apply)(lanes, torch.ones(3, 2))
    torch.testing.assert_close(outputs[1], apply(pf.init_params(Moving, 1), torch.ones(2)))


def make_tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    return module


def test_a_state_dict_has_every_name_of_a_tied_parameter():
    module, params = make_tied(), pf.init_params(make_tied, 0)
    assert "1.weight" not in params
    apply, x = pf.stateless(module), torch.ones(2)
    state_dict = {**params, "1.weight": params["0.weight"].clone()}
    assert torch.equal(apply(state_dict, x), apply(params, x))
    with pytest.raises(ValueError, match=r"'1\.weight' and '0\.weight' of `params` are one tensor in Sequential"):
        apply({**params, "1.weight": params["0.weight"] + 1}, x)


def test_frozen_parameters_are_named():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    apply = pf.stateless(module)
    assert (apply.frozen, apply.trainable) == ({"0.weight", "0.bias"}, {"1.weight", "1.bias"})


def test_stateless_leaves_buffers_alone():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = module[1].running_mean.clone()
    params = {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
    pf.stateless(module)(params, torch.randn(5, 2) + 9)
    assert torch.equal(module[1].running_mean, before)
    assert module[1].num_batches_tracked == 0
    shifted = {**params, "1.running_mean": torch.full((3,), 2.0)}
    module.eval()
    assert not torch.equal(
        pf.stateless(module)(shifted, torch.ones(1, 2)), pf.stateless(module)(params, torch.ones(1, 2))
    )


def test_errors():
    params = pf.init_params(make_unified, 0)
    with pytest.raises(
        ValueError, match=r"split: `head` must name a layer of `params`, one of \['hidden1'.*got 'head'"
    ):
        pf.split(params, head="head")
    lower, upper = pf.split(params)
    with pytest.raises(ValueError, match=r"unify: .* different names, got \['output_linear.bias'"):
        pf.unify(pf.SplitParams({**lower, **upper}, upper))
    with pytest.raises(
        ValueError, match=r"stateless: .* UnifiedModel.* missing \['output_linear.bias'.* unexpected \[\]"
    ):
        pf.stateless(make_unified())(lower, torch.ones(16))
    with pytest.raises(ValueError, match=r"unexpected \['w'\]"):
        pf.stateless(make_unified())({**params, "w": torch.ones(1)}, torch.ones(16))
    with pytest.raises(TypeError, match="seed"):
        pf.init_params(make_unified, "0")
    for keys in (torch.tensor(0), torch.zeros(3, 2), torch.zeros(3, 3, dtype=torch.int32)):
        with pytest.raises(TypeError, match=r"init_lanes: `seeds` must be integers, or int32 keys \[lanes, 2\]"):
            pf.init_lanes(make_unified, keys)
    for none in ([], torch.zeros(0, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="init_lanes: `seeds` must hold at least one"):
            pf.init_lanes(make_unified, none)


def test_a_lazy_module_is_refused_by_name():
    with pytest.raises(ValueError, match=r"init_params: .*\['weight', 'bias'\] wait for a first input"):
        pf.init_params(lambda: torch.nn.LazyLinear(3), 0)
    with pytest.raises(ValueError, match=r"stateless: .* call the module once"):
        pf.stateless(torch.nn.LazyLinear(3))


def test_lanes_write_to_buffers_that_they_share():
    """One set of running statistics goes into all lanes, and each lane returns its own."""
    make = lambda: torch.nn.BatchNorm1d(2)  # noqa: E731
    apply, params, x = pf.stateless(make()), pf.init_params(make, 0), torch.randn(3, 5, 2)
    outputs, buffers = torch.vmap(lambda x: apply.with_buffers(params, x))(x)
    alone = [apply.with_buffers(params, one) for one in x]
    torch.testing.assert_close(outputs, torch.stack([one for one, _ in alone]))
    torch.testing.assert_close(buffers["running_var"], torch.stack([after["running_var"] for _, after in alone]))


def test_threads_that_share_a_module_keep_their_parameters():
    class Slow(nn.Linear):
        def forward(self, x):
            for _ in range(200):
                x = super().forward(x)
            return x

    module = Slow(1, 1, bias=False)
    apply, own = pf.stateless(module), module.weight

    def call(weight):
        return [apply({"weight": torch.full((1, 1), weight)}, torch.ones(1)).item() for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(call, (1.0, 0.0))) == [[1.0] * 30, [0.0] * 30]
    assert module.weight is own


def test_a_buffer_that_a_module_registers_in_a_call_stays_its_own():
    class Table(nn.Linear):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.arange(2.0))
            return super().forward(x) + self.table

    apply, params = pf.stateless(Table(1, 2)), pf.init_params(lambda: nn.Linear(1, 2), 0)
    assert torch.equal(apply(params, torch.ones(1)), apply(params, torch.ones(1)))


class Growing(nn.Linear):
    """Registers a buffer in its first call, or gives one a value, and changes it in each."""

    def __init__(self, how):
        super().__init__(1, 1)
        self.how = how
        if how == "none at first":
            self.register_buffer("total", None)

    def forward(self, x):
        if getattr(self, "total", None) is None:
            self.register_buffer("total", torch.zeros(1))
        if self.how == "in place":
            self.total.add_(1)
        else:
            self.total = self.total + 1
        return super().forward(x) + self.total


@pytest.mark.parametrize("how", ["replaced", "in place", "none at first"])
def test_state_that_a_module_makes_in_a_call_is_refused(how):
    params = pf.init_params(lambda: nn.Linear(1, 1), 0)
    apply = pf.stateless(Growing(how))
    apply(params, torch.ones(1))
    with pytest.raises(ValueError, match="stateless: the buffer 'total' that Growing has registered in a call changes"):
        apply(params, torch.ones(1))
    module = Growing(how)
    with pytest.raises(UnsupportedError, match="'total' that Growing has registered in a call would be new in each"):
        to_jax_function(pf.stateless(module))(to_jax(params), jax.numpy.ones(1))
    assert all(type(one) is torch.Tensor for one in module.buffers())  # none of the trace is left

    def make():
        module = Growing(how)
        module(torch.ones(1))
        return module

    _, buffers = pf.stateless(make()).with_buffers(pf.init_params(make, 0), torch.ones(1))
    assert buffers["total"] == 2


def test_a_number_that_a_module_counts_is_told_of_in_a_trace():
    class Counts(nn.Linear):
        calls = 0

        def __init__(self):
            super().__init__(1, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    apply, params = pf.stateless(Counts()), pf.init_params(Counts, 0)
    apply(params, torch.ones(1))
    with pytest.warns(UserWarning, match="Counts changes its attribute 'calls' from 1 to 2 while it is traced"):
        to_jax_function(apply)(to_jax(params), jax.numpy.ones(1))


def test_hooks_of_parameters_are_refused():
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].weight.register_hook(lambda grad: 0 * grad)
    with pytest.raises(ValueError, match=r"stateless: no parameter may have a hook, .* of \['0.weight'\]"):
        pf.stateless(module)


@pytest.mark.filterwarnings("ignore:.*weight normalization:FutureWarning")
@pytest.mark.parametrize("normalized", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_in_lanes(normalized):
    """Its vectors are those of a module that is called as often; they are written with ``out=``."""
    make = lambda: normalized(nn.Linear(3, 2))  # noqa: E731
    apply, x = pf.stateless(make()), torch.randn(3)

    def step(params, _):
        output, buffers = apply.with_buffers(params, x)
        return {**params, **buffers}, output

    lanes, outputs = pf.scan_lanes(step, pf.init_lanes(make, range(2)), length=3, engine="eager")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = make()
    for output in outputs[:, 1]:
        torch.testing.assert_close(output, module(x).detach())
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(lanes[name][1], buffer)
