"""Mistakes found in published implementations of Pop-Art: a test for each, numbered as they were found."""

from __future__ import annotations

import io

import optree
import pytest
import torch
from torch.func import vmap

import popart_func as pf
from popart_func.engines import ENGINES, available_engines, scan_lanes

APPLY = pf.stateless(pf.UnifiedModel(4, 8, 2))
PARAMS = pf.init_params(lambda: pf.UnifiedModel(4, 8, 2), 0)
# What engines compute is the same (`test_engines`): the others run with -m slow only.
FASTEST, *OTHERS = [name for name in ENGINES if available_engines()[name] is None]


def learner_with(learning_rate, step_size=0.1, optimizer=None, **options):
    return pf.popart_learner(APPLY, optimizer or pf.sgd(learning_rate), pf.popart(2, step_size, **options))


def test_1_the_popped_head_and_the_statistics_leave_together():
    """A step at learning rate 0 changes no prediction, whatever the target."""
    learner = learner_with(0.0, step_size=0.5)
    state = learner.init(PARAMS)
    x = torch.randn(50, 4)
    before = pf.unnormalize(state.statistics, APPLY(state.params, x))
    for target in (1e4, -3e2, 7e-1):
        state, _ = learner.update(state, (x[0], torch.tensor([target, -target / 7])))
        after = pf.unnormalize(state.statistics, APPLY(state.params, x))
        # Values of order 1 on statistics of order 1e4: 2⁻²⁴ of that, a few times over.
        torch.testing.assert_close(after, before, rtol=0, atol=5e-3)
    assert state.statistics.scale.amax() > 1e3


@pytest.mark.usefixtures("unchecked")
def test_2_the_default_reduction_does_not_depend_on_the_batch_size():
    targets = torch.randn(8, 2) * 3 + 100
    small, large = pf.init_state(2), pf.init_state(2)
    for _ in range(400):
        small = pf.art(small, targets, step_size=3e-3)
        large = pf.art(large, targets.repeat(128, 1), step_size=3e-3)
    # The mean over 1024 instead of 8 rounds elsewhere, 400 times.
    torch.testing.assert_close(small.shift, large.shift, rtol=1e-5, atol=0)
    torch.testing.assert_close(small.scale, large.scale, rtol=1e-5, atol=0)
    assert 40 < float(large.shift[0]) < 101


@pytest.mark.usefixtures("unchecked")
def test_3_the_head_learns():
    learner = learner_with(0.1, step_size=0.05)
    state = learner.init(PARAMS)
    x = torch.randn(16, 4)
    y = torch.stack([1000 + 300 * x[:, 0], -5 + x[:, 1]], dim=-1)
    _, info = pf.scan(lambda state, _: learner.update(state, (x, y)), state, length=600, engine=FASTEST)
    # A frozen head keeps the loss of order 1, that of the normalized targets themselves.
    assert info.loss[-1] < 0.05
    assert info.error[-1, :, 0].mean() < 60


def test_4_a_run_resumed_equals_a_run_uninterrupted():
    learner = learner_with(0.1, optimizer=pf.adam(1e-2))
    batches = [(torch.randn(3, 4), torch.randn(3, 2) * 100) for _ in range(6)]
    state = learner.init(PARAMS)
    for number, batch in enumerate(batches):
        if number == 3:
            file = io.BytesIO()
            torch.save(optree.tree_leaves(state), file)
            file.seek(0)
            resumed = optree.tree_unflatten(optree.tree_structure(state), torch.load(file))
        state, _ = learner.update(state, batch)
    for batch in batches[3:]:
        resumed, _ = learner.update(resumed, batch)
    assert all(map(torch.equal, optree.tree_leaves(state), optree.tree_leaves(resumed)))
    moved = optree.tree_map(lambda leaf: leaf.to("meta"), state)
    assert moved.statistics.scale.device.type == "meta"


@pytest.mark.parametrize("bounds", [(1e-4, 1e6), (50.0, 1e6), (1e-4, 0.1)])
def test_5_normalize_and_unnormalize_are_inverses_while_a_bound_binds(bounds):
    state = pf.art(pf.init_state(2), torch.tensor([7.0, -3.0]), step_size=0.3, scale_lb=bounds[0], scale_ub=bounds[1])
    values = torch.randn(5, 2)
    torch.testing.assert_close(pf.unnormalize(state, pf.normalize(state, values)), values, rtol=1e-5, atol=1e-5)
    assert (state.scale >= bounds[0]).all()
    assert (state.scale <= bounds[1]).all()


def test_6_predictions_and_targets_use_the_new_statistics():
    learner = learner_with(0.01, step_size=0.5)
    state = learner.init(PARAMS)
    x, y = torch.randn(4), torch.tensor([40.0, -9.0])
    head, statistics = pf.popart(2, 0.5).update(pf.split(PARAMS).upper, state.statistics, y)
    after, info = learner.update(state, (x, y))
    assert all(map(torch.equal, after.statistics, statistics))
    popped = pf.unify(pf.SplitParams(pf.split(PARAMS).lower, head))
    torch.testing.assert_close(info.normalized_prediction, APPLY(popped, x))
    assert torch.equal(info.normalized_target, pf.normalize(statistics, y))
    assert torch.equal(info.prediction, pf.unnormalize(statistics, info.normalized_prediction))


OFFSETS = [10.0**power for power in range(8)]
STEP_SIZES = [1e-2, 3e-4, 1e-4]


@pytest.mark.parametrize("engine", [FASTEST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.usefixtures("unchecked")
def test_7_float32_statistics_across_orders_of_magnitude(engine):
    """Targets c ± 1, c to 1e7, β from 1e-2 to 1e-4: the scale within 1e-4 of float64's, the mean within 1e-5 σ."""
    steps = 6_000 if engine == "eager" else 40_000
    offsets = torch.tensor(OFFSETS).repeat_interleave(len(STEP_SIZES))
    step_sizes = torch.tensor(STEP_SIZES).repeat(len(OFFSETS))
    signs = torch.where(torch.rand(steps) < 0.5, -1.0, 1.0)

    def step(state, sign, hparams):
        return pf.art(state, hparams["offset"] + sign, step_size=hparams["step_size"]), ()

    def final(dtype):
        # From a mean near the targets, as after a warm-up: a start at 0 leaves a scale of order c for 1/β steps.
        start = vmap(lambda offset: pf.init_state(1, dtype=dtype)._replace(shift=offset[None]))(offsets.to(dtype))
        hparams = {"offset": offsets.to(dtype), "step_size": step_sizes.to(dtype)}
        state, _ = scan_lanes(step, start, signs.to(dtype), hparams=hparams, engine=engine)
        return optree.tree_map(lambda leaf: leaf[:, 0], state)

    narrow, wide = final(torch.float32), final(torch.float64)
    scale_error = (narrow.scale.double() / wide.scale - 1).abs()
    mean_error = (narrow.shift.double() - wide.shift + narrow.residue.double() - wide.residue).abs() / wide.scale
    assert (scale_error < 1e-4).all(), scale_error
    assert (mean_error < 1e-5).all(), mean_error
    assert (wide.scale < 2).all()


@pytest.mark.usefixtures("unchecked")
def test_7_from_a_cold_start_too():
    """From shift 0, where the first scales are of order c."""
    steps, offset = 3000, 1e6
    signs = torch.where(torch.rand(steps) < 0.5, -1.0, 1.0).tolist()
    states = [pf.init_state(1, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for sign in signs:
        states = [pf.art(s, torch.tensor([offset + sign], dtype=s.shift.dtype), step_size=1e-2) for s in states]
    narrow, wide = states
    assert float(narrow.scale) == pytest.approx(float(wide.scale), rel=1e-4)
    mean = float(narrow.shift.double() + narrow.residue.double() - wide.shift - wide.residue)
    assert abs(mean) < 1e-5 * float(wide.scale)


@pytest.mark.usefixtures("unchecked")
def test_7_constant_targets_and_one_huge_target():
    state = pf.init_state(1)
    for _ in range(300):
        state = pf.art(state, torch.tensor([12345.678]), step_size=0.1)
        assert (state.variance >= 0).all()
    assert float(state.scale) < 1e-2
    for huge in (1e30, -3e38):
        shocked = pf.art(state, torch.tensor([huge]), step_size=0.1)
        assert all(torch.isfinite(field).all() for field in shocked)
        assert shocked.scale == 1e6
        for _ in range(2500):
            shocked = pf.art(shocked, torch.tensor([5.0]), step_size=0.1)
        assert float(shocked.shift) == pytest.approx(5.0, rel=1e-5)
        assert float(shocked.scale) < 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("unchecked")
def test_7_low_precision_heads(dtype):
    """1000 ± 1 can't be told apart in bfloat16: the statistics are kept in float32 all the same."""
    head = {"weight": torch.ones(1, 3, dtype=dtype), "bias": torch.zeros(1, dtype=dtype)}
    init, update = pf.popart(1, 0.05)
    state = init(head)
    for number in range(400):
        head, state = update(head, state, torch.tensor([1000.0 + (-1) ** number]))
    assert float(state.scale) == pytest.approx(1.0, rel=0.05)
    assert head["weight"].dtype == dtype
    assert torch.isfinite(head["weight"]).all()


def test_8_bias_corrected_steps_start_at_one():
    """A running mean with β = 1/2: weights 1/3 and 2/3 after two targets; in general β / (1 − (1−β)^t) from t = 1."""
    for step_size in (0.5, 0.1):
        state = pf.init_state(1, dtype=torch.float64)
        for time, target in enumerate((8.0, -1.0, 30.0), start=1):
            before = float(state.shift + state.residue)
            state = pf.art(state, torch.tensor([target]), step_size=step_size, bias_correction=True)
            step = (float(state.shift + state.residue) - before) / (target - before)
            assert step == pytest.approx(step_size / (1 - (1 - step_size) ** time), rel=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_9_a_rare_task_counts_its_own_updates():
    state = pf.init_state(2)
    for _ in range(500):
        state = pf.art(state, torch.tensor([3.0]), torch.tensor([0]), step_size=0.01, bias_correction=True)
    state = pf.art(state, torch.tensor([-70.0]), torch.tensor([1]), step_size=0.01, bias_correction=True)
    assert state.shift[1] == -70.0
    assert state.count.tolist() == [500, 1]
    assert all(torch.isfinite(field).all() for field in state)


@pytest.mark.usefixtures("unchecked")
def test_10_small_targets_are_not_floored():
    state = pf.init_state(1)
    for number in range(4000):
        state = pf.art(state, torch.tensor([0.01 * (-1) ** number]), step_size=0.01)
    assert float(state.scale) == pytest.approx(0.01, rel=0.02)


def test_11_predictions_are_unnormalized_exactly_once():
    learner = learner_with(0.02, step_size=0.2)
    state = learner.init(PARAMS)
    for _ in range(5):
        x, y = torch.randn(3, 4), torch.randn(3, 2) * 40 + 500
        lower, upper = pf.split(state.params)
        popped, statistics = pf.popart(2, 0.2).update(upper, state.statistics, y)
        hidden = pf.stateless(pf.LowerLayers(4, 8))(lower, x)
        folded = pf.fold(popped, statistics)
        expected = hidden @ folded["output_linear.weight"].mT + folded["output_linear.bias"]
        state, info = learner.update(state, (x, y))
        torch.testing.assert_close(info.prediction, expected, rtol=1e-5, atol=1e-2)
        torch.testing.assert_close(info.error, (expected - y).abs(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.slow) if name == "inductor" else name for name in (FASTEST, *OTHERS)],
)
@pytest.mark.usefixtures("unchecked")
def test_12_a_lane_that_goes_to_nan_leaves_its_neighbours_bit_equal(engine):
    lanes, steps = 6, 20
    xs = (torch.randn(steps, lanes, 4), torch.randn(steps, lanes, 2))
    broken = (xs[0], xs[1].clone())
    broken[1][5, 2, 0] = torch.nan
    broken[1][7, 4, 1] = torch.inf
    start = vmap(learner_with(0.01).init)(optree.tree_map(lambda leaf: torch.stack([leaf] * lanes), PARAMS))

    def step(state, batch):
        state, info = learner_with(0.01).update(state, batch)
        return state, info.error

    clean_state, clean = scan_lanes(step, start, xs, engine=engine)
    state, errors = scan_lanes(step, start, broken, engine=engine)
    neighbours = [0, 1, 3, 5]
    for before, after in zip(optree.tree_leaves(clean_state), optree.tree_leaves(state), strict=True):
        assert torch.equal(before[neighbours], after[neighbours])
    assert torch.equal(clean[:, neighbours], errors[:, neighbours])
    assert torch.isnan(errors[-1, 2]).any()
    assert torch.isfinite(clean).all()


# What no peer has: each row of the comparison is a test.

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def still(learner, params, batch, apply, groups=None):
    """The largest change of an unnormalized output by an update at learning rate 0, relative to the targets."""
    state, x = learner.init(params), batch[0]
    before = pf.unnormalize(state.statistics, apply(state.params, x), groups)
    state, _ = learner.update(state, batch)
    change = pf.unnormalize(state.statistics, apply(state.params, x), groups) - before
    return float(change.detach().abs().max()), state


def double(make):
    return {name: leaf.double() for name, leaf in pf.init_params(make, 0).items()}


def test_masks_in_value_statistics():
    """Mava's padding: what a mask leaves out is not there, whatever it holds."""
    targets = torch.tensor([[10.0, 12, 14], [11, torch.nan, torch.inf]])
    alive = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert pf.art(pf.init_state(1), targets, weights=alive, step_size=1.0).shift == 11.75
    learner, x = learner_with(0.1), torch.randn(3, 4)
    y, mask = torch.randn(3, 2) * 50, torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    got, _ = learner.update(learner.init(PARAMS), (x, torch.where(mask > 0, y, torch.nan), None, mask))
    expected, _ = learner.update(learner.init(PARAMS), (x, y, None, mask))
    assert pf.tree.max_difference(got, expected) == 0


@pytest.mark.parametrize("outputs", ["actions", "quantiles"])
def test_outputs_that_share_a_statistic(outputs):
    """``[tasks x actions]`` and ``[tasks x quantiles]``: exact under POP in float64."""

    def make():
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))

    apply, popart = pf.stateless(make()), pf.popart(2, 0.3, groups=GROUPS)
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double() * torch.tensor([1e4, 1e-2]) + 50
    loss = pf.losses.quantile(torch.tensor([0.1, 0.5, 0.9]).double().repeat(2)) if outputs == "quantiles" else None
    learner = pf.popart_learner(apply, pf.sgd(0.0), popart, head="2", loss=loss)
    change, state = still(learner, double(make), (x, y), apply, GROUPS)
    assert change < 1e-12 * 1e4
    assert state.statistics.scale[0] > 100 * state.statistics.scale[1]


def test_several_heads():
    """An extrinsic and an intrinsic value, each with its statistic, in one network."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extrinsic, self.intrinsic = (torch.nn.Linear(4, size) for size in (4, 1, 1))

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return torch.cat([self.extrinsic(h), self.intrinsic(h)], -1)

    apply = pf.stateless(Two())
    learner = pf.popart_learner(apply, pf.adam(0.0), pf.popart(2, 0.3), head=["extrinsic", "intrinsic"])
    y = torch.randn(7, 2).double() * torch.tensor([1e4, 1e-2])
    change, state = still(learner, double(Two), (torch.randn(7, 4).double(), y), apply)
    assert change < 1e-11
    assert state.statistics.scale[0] > 1e3 * state.statistics.scale[1]


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RMSprop", "Adagrad", "Adamax", "Muon"])
def test_any_optimizer_with_its_moments(name):
    """Where the scale alone moves, by a power of two, the gradient steps before and after are the same, to rounding.

    Sums of gradients and of their squares are then in the new units: the update in the targets' units stays.
    """
    options = {"SGD": {"momentum": 0.9}, "Muon": {"weight_decay": 0.0}}.get(name, {})
    optimizer = pf.optim.from_torch(getattr(torch.optim, name), lr=0.1, **options)
    params = {"head.weight": torch.randn(2, 3).double()}
    grads = {"head.weight": torch.randn(2, 3).double()}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    ratio = torch.tensor([4.0, 4.0]).double()
    popped = pf.rescale_moments(state, {"head.weight": ratio[:, None]})
    before, _ = optimizer.update(grads, state, params)
    after, _ = optimizer.update({"head.weight": grads["head.weight"] * 4}, popped, params)
    power = 1 if name == "SGD" else 0  # which other optimizers' steps do not depend on the gradients' size
    torch.testing.assert_close(after["head.weight"], before["head.weight"] * 4**power, rtol=1e-4, atol=0)  # the ε


def test_a_module_that_equals_the_pure_functions():
    head = pf.nn.PopArtHead(3, 2, 0.3)
    params, state = {name: leaf.detach().clone() for name, leaf in head.named_parameters()}, pf.init_state(2)
    y = torch.randn(5, 2) * 1e3
    expected, state = pf.popart(2, 0.3).update(params, state, y)
    head.update(y)
    assert all(torch.equal(leaf, expected[name]) for name, leaf in head.named_parameters())
    assert all(map(torch.equal, head.statistics, state))


def test_torchrl_names_its_extra():
    """`test_torchrl` has its losses; without TorchRL the import says what to install, and nothing else imports it."""
    import importlib.util

    if importlib.util.find_spec("torchrl") is None:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'popart-func\[torchrl\]'"):
            import popart_func.interop.torchrl  # noqa: F401
