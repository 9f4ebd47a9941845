"""Every optimizer of `torch.optim` as a pure transformation. One table drives every test: a new optimizer is a row."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

import popart_func as pf
from popart_func import optim

pytestmark = pytest.mark.usefixtures("unchecked")

TABLE = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.NAdam, {"weight_decay": 0.1}),
    (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.RAdam, {}),
    (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.5, 0.9)}),
    (torch.optim.Adamax, {"weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True, "eps": 1e-3}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {"t0": 20, "lambd": 0.1, "weight_decay": 0.01}),
    (torch.optim.Adafactor, {"weight_decay": 0.1}),
    (torch.optim.Muon, {"weight_decay": 0.1}),
    (torch.optim.Muon, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
]
ROWS = pytest.mark.parametrize(("cls", "options"), TABLE, ids=[f"{cls.__name__}-{','.join(o)}" for cls, o in TABLE])
POSITION = torch.tensor([[3.0, -2.0, 0.5], [1.0, 4.0, -7.0]])


def params_of(cls, dtype):
    weight = {"w": torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.7, -0.4]], dtype=dtype)}
    return weight if cls is torch.optim.Muon else {**weight, "b": torch.tensor([0.5, -2.0], dtype=dtype)}


def gradient(params, target):
    """Of half the squared distance of w from a target, and of ln cosh b."""
    grads = {"w": params["w"] - target.to(params["w"].dtype)}
    return {**grads, "b": params["b"].tanh()} if "b" in params else grads


def run(transformation, params, steps=100):
    state = transformation.init(params)
    for step in range(steps):
        updates, state = transformation.update(gradient(params, POSITION * (step % 7)), state, params)
        params = pf.apply_updates(params, updates)
    return params, state


def run_torch(cls, options, params, steps=100):
    given = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = cls(list(given.values()), **options)
    for step in range(steps):
        for name, leaf in gradient(given, POSITION * (step % 7)).items():
            given[name].grad = leaf.detach()
        optimizer.step()
    return given, {name: optimizer.state[leaf] for name, leaf in given.items()}


@ROWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_step_to_rounding_over_100_steps(cls, options, dtype):
    params = params_of(cls, dtype)
    got, state = run(optim.from_torch(cls, lr=0.03, **options), params)
    expected, entries = run_torch(cls, {"lr": 0.03, **options}, params)
    # Muon computes in bfloat16; the others round 100 times.
    precision = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    precision = 2e-2 if cls is torch.optim.Muon else precision
    if cls in (torch.optim.NAdam, torch.optim.ASGD):
        precision = max(precision, 2e-5)  # torch.optim keeps a factor in float32
    for name in params:
        torch.testing.assert_close(got[name], expected[name].detach(), rtol=precision, atol=precision)
        assert not torch.allclose(got[name], params[name])
    assert int(state.count) == 100
    for entry, leaves in state.entries.items():
        for name, leaf in leaves.items():
            if entry != "center":
                size = float(entries[name][entry].abs().max())
                torch.testing.assert_close(
                    leaf, entries[name][entry].to(dtype), rtol=precision, atol=10 * precision * max(size, 1)
                )


@ROWS
def test_every_lane_has_its_own_rate(cls, options):
    params, rates = params_of(cls, torch.float64), torch.tensor([0.01, 0.03, 0.1], dtype=torch.float64)
    lanes = vmap(lambda rate: run(optim.from_torch(cls, lr=rate, **options), params, steps=8)[0])(rates)
    for lane, rate in enumerate(rates.tolist()):
        alone, _ = run(optim.from_torch(cls, lr=rate, **options), params, steps=8)
        precision = 5e-2 if cls is torch.optim.Muon else 1e-9
        for name in params:
            torch.testing.assert_close(lanes[name][lane], alone[name], rtol=precision, atol=precision)


@ROWS
def test_rescaled_moments_are_those_of_rescaled_gradients(cls, options):
    """As if all earlier gradients had been larger by the factor of their row: what POP needs."""
    options = {name: value for name, value in options.items() if name not in ("weight_decay", "lambd", "eps")}
    if "initial_accumulator_value" in options:
        options["initial_accumulator_value"] = 0.0
    if cls.__name__ not in ("Adafactor", "SGD", "Rprop", "ASGD", "Muon"):  # which have no such eps
        options["eps"] = 1e-30
    if cls is not torch.optim.Rprop:
        options["weight_decay"] = 0.0
    transformation = optim.from_torch(cls, lr=0.03, **options)
    params = params_of(cls, torch.float64)
    rows = torch.tensor([0.25, 0.25 if cls is torch.optim.Adafactor else 8.0], dtype=torch.float64)
    factors = {name: factor for name, factor in (("w", rows[:, None]), ("b", rows)) if name in params}
    state, larger = transformation.init(params), transformation.init(params)
    for step in range(5):
        grads = gradient(params, POSITION * (step + 1))
        _, state = transformation.update(grads, state, params)
        _, larger = transformation.update({name: factors[name] * leaf for name, leaf in grads.items()}, larger, params)
    rescaled = optim.rescale_moments(state, factors)
    for entry in rescaled.entries.keys() - {"ax", "center"}:
        for name, leaf in rescaled.entries[entry].items():
            torch.testing.assert_close(leaf, larger.entries[entry][name], rtol=1e-9, atol=1e-12, msg=entry)


def test_columns_scale_with_the_rows_of_adafactor():
    """Squared gradients of rank one, which Adafactor's model holds exactly, with a factor for each row."""
    transformation, factors = optim.from_torch(torch.optim.Adafactor), torch.tensor([[0.25], [8.0]])
    params = {"w": torch.ones(2, 3)}
    grads = {"w": torch.tensor([[1.0], [3.0]]) * torch.tensor([[2.0, 0.5, 4.0]])}
    _, state = transformation.update(grads, transformation.init(params), params)
    _, expected = transformation.update({"w": factors * grads["w"]}, transformation.init(params), params)
    rescaled = optim.rescale_moments(state, {"w": factors})
    assert pf.tree.max_difference(rescaled, expected) < 1e-4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.from_torch(torch.optim.LBFGS), TypeError, "`cls` must be one of torch.optim's .* got LBFGS"),
        (lambda: optim.from_torch(torch.optim.Adam, fused=True), TypeError, "left to the engine here: leave them out"),
        (lambda: optim.from_torch(torch.optim.Adam, rho=1), TypeError, r"Adam has no options \['rho'\]"),
        (lambda: optim.from_torch(torch.optim.Adam, eps=-1.0), ValueError, "Adam: Invalid epsilon value"),
        (
            lambda: optim.from_torch(torch.optim.Muon).init({"b": torch.ones(2)}),
            ValueError,
            r"Muon is for matrices, got a parameter of shape \(2,\)",
        ),
        (lambda: optim.from_torch(torch.optim.Adam).update({}, None), ValueError, "`params` must be given to update"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^from_torch: .*{message}"):
        call()


def test_nesterov_takes_a_momentum_that_is_a_tensor():
    params = {"w": torch.tensor([1.0])}
    found = []
    for momentum in (0.5, torch.tensor(0.5)):
        optimizer = optim.from_torch(torch.optim.SGD, lr=0.1, momentum=momentum, nesterov=True)
        _, state = optimizer.update(params, optimizer.init(params), params)
        found.append(optimizer.update(params, state, params)[0]["w"])
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="from_torch: SGD: Nesterov momentum requires a momentum"):
        optim.from_torch(torch.optim.SGD, momentum=torch.tensor(0.5), dampening=0.1, nesterov=True)
