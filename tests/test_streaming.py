"""Streaming Q(λ): against the paper's algorithm by hand, and Pop-Art's traces against those of unnormalized values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import popart_func as pf
from popart_func import random
from popart_func.experiments.agents import stream_q
from popart_func.experiments.agents.exploration import epsilon_greedy
from popart_func.experiments.agents.networks import init_sparse_mlp
from popart_func.experiments.environments import step_or_reset
from popart_func.experiments.environments.bsuite import Catch
from popart_func.experiments.environments.wrappers import scale_rewards, standardize_observations, standardize_rewards
from popart_func.scales import fixed

KAPPA, TRACE, DISCOUNT, EPSILON, STEPS = 2.0, 0.8, 0.99, 0.3, 40


def module_of(params):
    """The network of modules, float64."""
    layers = []
    for i in range(2):
        linear = nn.Linear(*reversed(params[f"hidden{i}.weight"].shape))
        linear.load_state_dict({name: params[f"hidden{i}.{name}"] for name in ("weight", "bias")})
        layers += [linear, nn.LayerNorm(linear.out_features, elementwise_affine=False), nn.LeakyReLU()]
    head = nn.Linear(*reversed(params["head.weight"].shape))
    head.load_state_dict({name: params[f"head.{name}"] for name in ("weight", "bias")})
    return nn.Sequential(*layers, head).double()


def by_hand(environment, state, popart):
    """The agent's parameters and values after each step, with `backward` and traces of unnormalized values.

    ``Q = σ n + μ`` does not change when the statistics do. So the trace of Q below the head is a sum of gradients, and
    the trace of n is that over σ; the trace of n in the head is a sum of features.
    """
    network, statistics = module_of(state.params), popart.init(state.params)
    traces = [torch.zeros_like(leaf) for leaf in network.parameters()]
    place, seen, key, found = state.environment, state.observation, state.key, []
    for _ in range(STEPS):
        key, for_action, for_step = random.split(key, 3)
        with torch.no_grad():
            of_actions = pf.unnormalize(statistics, network(seen.double()))
        action = epsilon_greedy(for_action, of_actions, EPSILON)
        place, following, transition = step_or_reset(environment, place, action, for_step)
        with torch.no_grad():
            best = pf.unnormalize(statistics, network(transition.observation.double())).max()
        target = transition.reward.double() + DISCOUNT * best * (not transition.terminated)
        head = {name: leaf.detach() for name, leaf in network[-1].named_parameters()}
        head, statistics = popart.update(head, statistics, target[None].float())
        network[-1].load_state_dict(head)
        network.zero_grad()
        output = network(seen.double())[action]
        output.backward()
        scale = statistics.scale.double()
        units = [scale] * (len(traces) - 2) + [1.0, 1.0]  # of Q below the head, of n in it
        for trace, leaf, unit in zip(traces, network.parameters(), units, strict=True):
            trace.mul_(DISCOUNT * TRACE).add_(unit * leaf.grad)
        normalized = [trace / unit for trace, unit in zip(traces, units, strict=True)]
        delta = ((target - statistics.shift) / scale - output).item()
        bound = max(abs(delta), 1.0) * sum(trace.abs().sum().item() for trace in normalized) * KAPPA
        with torch.no_grad():
            for leaf, trace in zip(network.parameters(), normalized, strict=True):
                leaf += delta * trace / max(bound, 1.0)
        if transition.terminated or action != of_actions.argmax():
            traces = [torch.zeros_like(trace) for trace in traces]
        seen = following
        found.append(torch.cat([leaf.detach().ravel() for leaf in network.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("critic", ["plain", "popart"])
def test_each_step_is_that_of_the_paper_by_hand(critic):
    popart = fixed(torch.zeros(1), torch.ones(1)) if critic == "plain" else pf.popart(1, 0.1, bias_correction=True)
    environment = standardize_observations(standardize_rewards(scale_rewards(Catch(), 30.0), DISCOUNT))
    if critic == "popart":
        environment = standardize_observations(scale_rewards(Catch(), 30.0))
    agent = stream_q(environment, popart, (8, 6), kappa=KAPPA, trace=TRACE, discount=DISCOUNT, epsilon=EPSILON)
    state = agent.init(random.key(3))
    expected, found = by_hand(environment, state, popart), []
    for _ in range(STEPS):
        state, _ = agent.step(state)
        names = [f"{layer}.{part}" for layer in ("hidden0", "hidden1", "head") for part in ("weight", "bias")]
        found.append(torch.cat([state.params[name].ravel() for name in names]))
    found = torch.stack(found).double()
    assert (found[-1] - found[0]).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_powers_of_two_change_no_bit_of_what_is_learned_with_popart():
    scales = torch.tensor([2.0**-10, 1.0, 2.0**10])
    popart = pf.popart(1, 0.01, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)

    def made(scale):
        return stream_q(scale_rewards(Catch(), scale), popart, (8,))

    start = torch.vmap(lambda scale: made(scale).init(random.key(1)))(scales)
    last, _ = pf.scan_lanes(
        lambda state, _, h: made(h["scale"]).step(state), start, length=300, hparams={"scale": scales}, engine="native"
    )
    for leaf in last.params.values():
        assert (leaf[0] == leaf[1]).all()
        assert (leaf[2] == leaf[1]).all()


def test_a_unit_of_the_sparse_network_has_a_tenth_of_its_weights():
    params = init_sparse_mlp(random.key(0), [50, 20, 3, 2])
    assert ((params["hidden0.weight"] != 0).sum(1) == 5).all()
    assert ((params["hidden1.weight"] != 0).sum(1) == 2).all()
    assert len(params["hidden0.weight"][0].nonzero().unique()) == 5
    assert (init_sparse_mlp(random.key(0), [1, 20, 2])["hidden0.weight"] != 0).all()
    assert params["hidden0.weight"].abs().max() <= 50**-0.5
