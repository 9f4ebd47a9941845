"""The laws of POP and of both together, parity with rlax, and what is refused."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optree
import pytest
import rlax
import torch
from random_heads import FLOAT32, FLOAT64, outputs_of, random_head, random_state
from torch.func import grad, vmap

import popart_func as pf
from popart_func import optim
from popart_func.heads import as_heads, find_layers

# -------------------- POP


@pytest.mark.parametrize(("dtype", "tolerance"), [(FLOAT64, 1e-12), (FLOAT32, 1e-4), (torch.bfloat16, 10.0)])
def test_outputs_are_preserved(dtype, tolerance):
    """Outputs are of the order 1e3: the tolerances are a few roundings of that."""
    head, hidden = random_head(3, dtype), torch.randn(20, 5).to(FLOAT64)
    state = random_state(3, FLOAT64 if dtype == FLOAT64 else FLOAT32)
    wide = {name: value.double() for name, value in head.items()}
    popped, new = pf.popart(3, 0.3).update(head, state, torch.tensor([900.0, -4.0, 50.0], dtype=state.shift.dtype))
    assert {value.dtype for value in popped.values()} == {dtype}
    assert (new.scale / state.scale).amax() > 2
    after = outputs_of({name: value.double() for name, value in popped.items()}, new, hidden)
    torch.testing.assert_close(after, outputs_of(wide, state, hidden), rtol=0, atol=tolerance)


def test_fold_is_what_pop_preserves():
    head, old, new = random_head(3), random_state(3), random_state(3)
    before, after = pf.fold(head, old), pf.fold(pf.pop(head, old, new), new)
    assert pf.tree.max_difference(before, after) < 1e-12
    hidden = torch.randn(5, dtype=FLOAT64)
    folded = hidden @ before["weight"].mT + before["bias"]
    torch.testing.assert_close(folded, outputs_of(head, old, hidden), rtol=1e-13, atol=1e-12)


def test_pop_composes_and_inverts():
    head, a, b, c = random_head(3), random_state(3), random_state(3), random_state(3)
    direct, detour = pf.pop(head, a, c), pf.pop(pf.pop(head, a, b), b, c)
    assert pf.tree.max_difference(direct, detour) < 1e-11
    assert pf.tree.max_difference(pf.pop(pf.pop(head, a, b), b, a), head) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_head_is_popped_in_float32(dtype):
    """One rounding at the end: the ratio itself is not rounded to the head's dtype."""
    head, old, new = random_head(3, dtype), random_state(3, FLOAT32), random_state(3, FLOAT32)
    wide = pf.pop({name: value.float() for name, value in head.items()}, old, new)
    for name, value in pf.pop(head, old, new).items():
        assert torch.equal(value, wide[name].to(dtype))


def test_pop_to_the_same_statistics_is_the_identity_to_the_bit():
    head, state = random_head(3, FLOAT32), random_state(3, FLOAT32)
    assert all(torch.equal(value, head[name]) for name, value in pf.pop(head, state, state).items())


def test_pop_takes_prefixed_names_and_leading_axes():
    params = pf.init_params(lambda: pf.UnifiedModel(16, 10, 2), 0)
    upper = pf.split(params).upper
    old, new = random_state(2, FLOAT32), random_state(2, FLOAT32)
    popped = pf.pop(upper, old, new)
    assert list(popped) == list(upper)
    bare = pf.pop({name.rpartition(".")[2]: value for name, value in upper.items()}, old, new)
    assert torch.equal(popped["output_linear.weight"], bare["weight"])
    ensemble = optree.tree_map(lambda value: torch.stack([value, 2 * value]), upper)
    together = pf.pop(ensemble, old, new)
    assert torch.equal(together["output_linear.bias"][0], popped["output_linear.bias"])


def test_one_statistic_shared_by_all_outputs():
    head, old, new = random_head(4), random_state(1), random_state(1)
    hidden = torch.randn(5, dtype=FLOAT64)
    after = outputs_of(pf.pop(head, old, new), new, hidden)
    torch.testing.assert_close(after, outputs_of(head, old, hidden), rtol=1e-12, atol=1e-11)


def test_a_head_without_bias():
    head, state = {"weight": torch.randn(2, 3)}, random_state(2, FLOAT32)
    wider = state._replace(scale=state.scale * 2)
    torch.testing.assert_close(pf.pop(head, state, wider)["weight"], head["weight"] / 2)
    precise = state._replace(residue=torch.tensor([0.5, -0.25]))
    assert torch.equal(pf.fold(head, precise)["bias"], state.shift + torch.tensor([0.5, -0.25]))
    with pytest.raises(ValueError, match=r"pop: `params` has no bias.*shift that moves\. Give"):
        pf.pop(head, state, state._replace(shift=state.shift + 1))
    with pytest.raises(ValueError, match="inside a transform whether it moves cannot be known"):
        vmap(lambda shift: pf.pop(head, state, state._replace(shift=shift)))(state.shift[None])


def test_update_is_art_and_pop_with_weights_and_groups():
    groups, state, head = torch.tensor([0, 1, 1]), random_state(2), random_head(3)
    popart = pf.popart(2, 0.5, groups=groups)
    y, weights = torch.randn(5, 2, dtype=FLOAT64) * 9, torch.rand(5, 2, dtype=FLOAT64)
    popped, new = popart.update(head, state, y, None, weights)
    expected = pf.art(state, y, weights=weights, step_size=0.5)
    assert all(map(torch.equal, new, expected))
    assert all(torch.equal(popped[name], leaf) for name, leaf in pf.pop(head, state, expected, groups).items())
    one = random_state(1)
    assert torch.equal(
        pf.popart(1, 0.5, groups=0 * groups).update(head, one, y)[1].shift, pf.art(one, y, step_size=0.5).shift
    )


def test_a_network_s_head_has_a_default_name():
    network = pf.init_params(lambda: pf.UnifiedModel(16, 10, 1), 0)
    popart, y = pf.popart(1, 0.5), torch.tensor([9.0])
    moved, _, new = popart.update_network(network, (), popart.init(), y)
    assert torch.equal(
        moved["output_linear.bias"], pf.pop(pf.split(network).upper, popart.init(), new)["output_linear.bias"]
    )


def test_statistics_are_where_the_parameters_are():
    """On the meta device, the only other one that every machine has."""
    assert {field.device.type for field in pf.init_state(2, device="meta")} == {"meta"}
    params = {f"{name}.weight": torch.ones(2, 3, device="meta") for name in "abc"}
    assert {field.device.type for field in pf.popart(1, 0.1).init(params)} == {"meta"}
    for transformation in (pf.sgd(0.1), optim.scale_by_adam()):
        assert transformation.init(params).count.device.type == "meta"
    layers = find_layers("pop", params, as_heads("pop", ["a", "b", "c"]), 6)
    assert [layer.indices.device.type for layer in layers] == ["meta"] * 3


def test_heads_one_after_the_other_take_the_next_statistics():
    params = {f"{name}.weight": torch.ones(2, 3) for name in "abc"}
    heads = as_heads("pop", ["c", "a", "b"])
    assert [layer.indices.tolist() for layer in find_layers("pop", params, heads, 6)] == [[0, 1], [2, 3], [4, 5]]
    groups = torch.tensor([0, 1, 1, 0, 2, 2])
    assert [layer.indices.tolist() for layer in find_layers("pop", params, heads, 3, groups)] == [
        [0, 1],
        [1, 0],
        [2, 2],
    ]


def test_pop_can_be_differentiated():
    old, new = random_state(1), random_state(1)

    def output(weight):
        return pf.pop({"weight": weight, "bias": torch.zeros(1, dtype=FLOAT64)}, old, new)["weight"].sum()

    gradient = grad(output)(torch.ones(1, 2, dtype=FLOAT64))
    torch.testing.assert_close(gradient, (old.scale / new.scale).expand(1, 2))


# -------------------- normalize, unnormalize


def test_round_trip_with_indices_and_shapes():
    state = random_state(3)
    values = torch.randn(4, 2, dtype=FLOAT64)
    indices = torch.randint(0, 3, (4, 2))
    by_index = pf.normalize(state, values, indices)
    for place in np.ndindex(4, 2):
        task = int(indices[place])
        mean = state.shift[task] + state.residue[task]
        assert float(by_index[place]) == pytest.approx(float((values[place] - mean) / state.scale[task]), rel=1e-12)
    torch.testing.assert_close(pf.unnormalize(state, by_index, indices), values, rtol=1e-12, atol=1e-12)
    rows = torch.randn(2, 5, 3, dtype=FLOAT64)
    torch.testing.assert_close(pf.unnormalize(state, pf.normalize(state, rows)), rows, rtol=1e-12, atol=1e-12)
    one = random_state(1)
    for shape in ((), (1,), (7,), (7, 1)):
        assert pf.normalize(one, torch.zeros(shape)).shape == shape


def test_low_precision_values_are_normalized_in_the_statistics_dtype():
    state = pf.init_state(1)._replace(shift=torch.tensor([1000.0]))
    assert pf.normalize(state, torch.tensor(1002.0, dtype=torch.bfloat16)).dtype == FLOAT32
    assert pf.unnormalize(state, torch.tensor(3)).item() == 1003


# -------------------- parity


def test_rlax_parity():
    """rlax's rule is the sum: tasks twice and absent, bounds that bind. Small offsets: rlax cancels."""
    generator = np.random.default_rng(0)
    tasks, step_size, lower, upper = 4, 0.05, 0.5, 2.0
    _, rlax_update = rlax.popart(tasks, step_size, lower, upper)
    init, update = pf.popart(tasks, step_size, lower, upper, reduction="sum")
    head, state = random_head(tasks, FLOAT32), init()
    rlax_head = {"w": jnp.array(head["weight"].T.numpy()), "b": jnp.array(head["bias"].numpy())}
    rlax_state = rlax.PopArtState(jnp.zeros(tasks), jnp.ones(tasks), jnp.ones(tasks))
    clamped = set()
    for _ in range(60):
        indices = generator.integers(0, tasks - 1, 5)
        targets = (generator.standard_normal(5) * [0.1, 1, 3, 0.2, 1] * (indices + 0.1)).astype(np.float32)
        head, state = update(head, state, torch.tensor(targets), torch.tensor(indices))
        rlax_head, rlax_state = rlax_update(rlax_head, rlax_state, jnp.array(targets), jnp.array(indices))
        clamped |= {float(scale) for scale in state.scale if float(scale) in (lower, upper)}
        # rlax's own ν − μ² rounds at 1e-7 of ν, which is a few times σ² here.
        np.testing.assert_allclose(state.shift, rlax_state.shift, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.scale, rlax_state.scale, rtol=3e-6)
        np.testing.assert_allclose(head["weight"].T, rlax_head["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(head["bias"], rlax_head["b"], rtol=1e-5, atol=2e-6)
    assert clamped == {lower, upper}
    np.testing.assert_allclose(
        pf.normalize(state, torch.tensor(targets), torch.tensor(indices)),
        rlax.normalize(rlax_state, jnp.array(targets), jnp.array(indices)),
        rtol=1e-5,
        atol=1e-5,
    )


# -------------------- transforms


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequential"])
def test_everything_is_a_lane(reduction):
    """vmap over head, state, targets, indices and every hyper-parameter gives what single calls give."""
    lanes, tasks = 5, 3
    heads = pf.tree.stack([random_head(tasks) for _ in range(lanes)])
    states = pf.tree.stack([random_state(tasks) for _ in range(lanes)])
    targets, indices = torch.randn(lanes, 4, dtype=FLOAT64) * 10, torch.randint(0, tasks, (lanes, 4))
    step_size = torch.linspace(0.01, 0.2, lanes, dtype=FLOAT64)
    lower, upper = torch.linspace(0.1, 3, lanes, dtype=FLOAT64), torch.linspace(3, 5, lanes, dtype=FLOAT64)

    def update(head, state, targets, indices, step_size, lower, upper, bias_correction):
        chosen = pf.popart(tasks, step_size, lower, upper, reduction=reduction, bias_correction=bias_correction)
        return chosen.update(head, state, targets, indices)

    for bias_correction in (False, True):
        arguments = (heads, states, targets, indices, step_size, lower, upper)
        together = vmap(lambda *lane: update(*lane, bias_correction))(*arguments)  # noqa: B023
        for lane, got in enumerate(pf.tree.unstack(together)):
            single = optree.tree_map(lambda leaf: leaf[lane], arguments)  # noqa: B023
            numbers = (float(value) for value in single[4:])
            alone = update(*single[:4], *numbers, bias_correction)
            # float64 numbers of order 1e2, a few roundings apart.
            assert pf.tree.max_difference(got, alone) < 1e-11


def test_inputs_are_left_alone():
    head, state = random_head(2), random_state(2)
    targets, indices = torch.ones(3, dtype=FLOAT64), torch.tensor([0, 1, 1])
    arguments = (head, state, targets, indices)
    before = optree.tree_map(torch.clone, arguments)
    for bias_correction in (False, True):
        pf.popart(2, 0.1, bias_correction=bias_correction).update(*arguments)
    pf.fold(head, state)
    pf.normalize(state, targets, indices)
    pf.unnormalize(state, targets, indices)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(arguments)))


# -------------------- errors

STATE = pf.init_state(3)
HEAD = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
T3 = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pf.art(STATE, T3, step_size=0.0), ValueError, "art: `step_size` must be > 0 and <= 1, got 0.0"),
        (lambda: pf.art(STATE, T3, step_size=1.5), ValueError, "art: `step_size` must be > 0 and <= 1, got 1.5"),
        (lambda: pf.art(STATE, T3, step_size=math.nan), ValueError, "`step_size` must be .* got nan"),
        (
            lambda: pf.art(STATE, T3, step_size="0.1"),
            TypeError,
            "`step_size` must be a number or a 0-d tensor, got str",
        ),
        (lambda: pf.art(STATE, T3, step_size=T3), ValueError, r"0-d tensor, got a tensor of shape \(3,\).*torch.vmap"),
        (lambda: pf.popart(3, 2), ValueError, "popart: `step_size` must be > 0 and <= 1, got 2"),
        (lambda: pf.popart(0, 0.1), ValueError, "popart: `num_outputs` must be at least 1, got 0"),
        (lambda: pf.popart(1.5, 0.1), TypeError, "popart: `num_outputs` must be an integer, got float"),
        (
            lambda: pf.pop({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, pf.init_state(1), STATE),
            ValueError,
            r"pop: `old` and `new` must have the same tasks, got shapes \(1,\) and \(3,\)",
        ),
        (lambda: pf.popart(3, 0.1, scale_lb=0.0), ValueError, "popart: `scale_lb` must be > 0, got 0.0"),
        (lambda: pf.popart(3, 0.1, 2.0, 1.0), ValueError, "popart: `scale_ub` must be >= 2.0, got 1.0"),
        (
            lambda: pf.popart(3, 0.1, reduction="max"),
            ValueError,
            r"`reduction` must be one of \['mean', 'sum', 'sequential'\], got 'max'",
        ),
        (lambda: pf.art(STATE, [1.0], step_size=0.1), TypeError, "art: `targets` must be a tensor, got list"),
        (
            lambda: pf.art(STATE, T3 > 0, step_size=0.1),
            TypeError,
            "art: `targets` must be real numbers, got dtype torch.bool",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(4), step_size=0.1),
            ValueError,
            r"the last axis of `targets` must be the 3 tasks, got shape \(4,\). Pass `indices`",
        ),
        (lambda: pf.art(STATE, torch.tensor(1.0), step_size=0.1), ValueError, r"must be the 3 tasks, got shape \(\)"),
        (lambda: pf.art(STATE, T3, [0, 1, 2], step_size=0.1), TypeError, "art: `indices` must be a tensor, got list"),
        (
            lambda: pf.art(STATE, T3, T3, step_size=0.1),
            TypeError,
            "`indices` must be integers, got dtype torch.float32",
        ),
        (
            lambda: pf.art(STATE, T3, torch.tensor([0, 1]), step_size=0.1),
            ValueError,
            r"art: `indices` must have the shape of `targets`, \(3,\), or broadcast to it, got \(2,\)",
        ),
        (
            lambda: pf.art(STATE, T3, torch.tensor([0, 1, 3]), step_size=0.1),
            ValueError,
            r"art: `indices` must lie in \[0, 3\), got values from 0 to 3",
        ),
        (
            lambda: pf.normalize(STATE, T3, torch.tensor([0, -1, 2])),
            ValueError,
            r"normalize: `indices` must lie in \[0, 3\), got values from -1 to 2",
        ),
        (
            lambda: pf.unnormalize(STATE, torch.zeros(2)),
            ValueError,
            "unnormalize: the last axis of `values` must be the 3",
        ),
        (
            lambda: pf.art(pf.tree.stack([STATE, STATE]), T3, step_size=0.1),
            ValueError,
            r"fields of `state` must have shape \[tasks\], got \(2, 3\). For many lanes, use torch.vmap",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(20, 3), step_size=0.1, reduction="sum"),
            ValueError,
            "a task's 20 targets at step size 0.1 make one step of 2, which must not exceed 1",
        ),
        (
            lambda: pf.art(STATE, torch.zeros(4), torch.tensor([1, 1, 0, 1]), step_size=0.5, reduction="sum"),
            ValueError,
            "a task's 3 targets at step size 0.5",
        ),
        (lambda: pf.pop({}, STATE, STATE), ValueError, r"pop: `params` must hold one linear layer.* got \[\]"),
        (lambda: pf.pop({"bias": T3}, STATE, STATE), ValueError, r"one linear layer.* got \['bias'\]"),
        (lambda: pf.pop({"w": HEAD["weight"]}, STATE, STATE), ValueError, r"one linear layer.* got \['w'\]"),
        (lambda: pf.pop({**HEAD, "a.weight": T3}, STATE, STATE), ValueError, "`split` cuts a network's parameters"),
        (
            lambda: pf.pop({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, STATE, STATE),
            ValueError,
            r"'weight' must have shape \[..., outputs, inputs\] with outputs = 3 tasks, got \(2, 3\)",
        ),
        (
            lambda: pf.fold({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, STATE),
            ValueError,
            r"fold: 'bias' must have shape \(3,\) to go with 'weight', got \(2,\)",
        ),
        (lambda: pf.init_state(0), ValueError, "init_state: `num_tasks` must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_indices_out_of_range_are_loud_under_vmap_too():
    for index in (3, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"out of|index"):
            vmap(lambda i: pf.art(STATE, torch.zeros(1), i, step_size=0.1))(torch.tensor([[index]]))
