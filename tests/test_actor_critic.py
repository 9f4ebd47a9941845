"""PPO and V-trace: targets and advantages against rlax, values of a known policy, the same returns at every scale."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import torch

import popart_func as pf
from popart_func import optim, random
from popart_func.experiments import names
from popart_func.experiments.agents import make_critic, ppo, v_trace
from popart_func.experiments.agents.networks import apply_mlp
from popart_func.experiments.agents.returns import generalized_advantages
from popart_func.experiments.agents.returns import v_trace as v_trace_estimates
from popart_func.experiments.environments.bsuite import Catch, CatchState
from popart_func.experiments.environments.wrappers import scale_rewards
from popart_func.experiments.reward_scales import report
from popart_func.experiments.reward_scales.roster import ALGORITHMS

TIME, TRACE = 12, 0.9
ENDS = torch.tensor([4, 9])


def rollout():
    generator = torch.Generator().manual_seed(0)
    reward, value, following, ratio = torch.randn(4, TIME, generator=generator)
    discount, goes_on = torch.full((TIME,), 0.97), torch.ones(TIME)
    following[:-1] = value[1:]
    return reward, discount, goes_on, value, following, ratio.exp()


def test_estimates_are_those_of_rlax():
    """Without ends, of which rlax knows none but a discount of 0."""
    reward, discount, goes_on, value, following, ratio = rollout()
    arrays = [jnp.asarray(leaf.numpy()) for leaf in (reward, discount, value, following, ratio)]
    r, d, v, v_next, rho = arrays
    ours = generalized_advantages(reward, discount, goes_on, value, following, TRACE)
    theirs = rlax.truncated_generalized_advantage_estimation(r, d, TRACE, jnp.concatenate([v, v_next[-1:]]))
    np.testing.assert_allclose(ours.advantages, theirs, atol=1e-5)
    np.testing.assert_allclose(ours.targets, theirs + v, atol=1e-5)

    ours = v_trace_estimates(reward, discount, goes_on, value, following, ratio, TRACE)
    found = rlax.vtrace_td_error_and_advantage(v, v_next, r, d, rho, TRACE)
    np.testing.assert_allclose(ours.targets, found.errors + v, atol=1e-5)
    np.testing.assert_allclose(ours.advantages, found.pg_advantage, atol=1e-5)


@pytest.mark.parametrize("terminated", [True, False])
def test_nothing_passes_the_end_of_an_episode(terminated):
    """Each episode has the estimates that it has alone; a truncated one is bootstrapped."""
    reward, discount, goes_on, value, following, ratio = rollout()
    goes_on[ENDS] = 0
    discount[ENDS] *= not terminated
    following[ENDS] = 7.0
    for parts in ((value, following), (value, following, ratio)):
        estimate = generalized_advantages if len(parts) == 2 else v_trace_estimates
        whole = estimate(reward, discount, goes_on, *parts, TRACE)
        for begin, end in ((0, 5), (5, 10), (10, TIME)):
            alone = estimate(*(leaf[begin:end] for leaf in (reward, discount, goes_on, *parts)), TRACE)
            torch.testing.assert_close(tuple(leaf[begin:end] for leaf in whole), tuple(alone))


def make_agent(algorithm, critic_name, scale, actor_rate, **settings):
    critic = make_critic(
        critic_name, apply_mlp, pf.adam(0.003), pf.popart(1, 0.01, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)
    )
    make = {"ppo": ppo, "vtrace": v_trace}[algorithm]
    return make(scale_rewards(Catch(), scale), critic, optim.adam(actor_rate), (50,), length=16, **settings), critic


def values_of_random_play(discount=0.99):
    """Every state's observation and its value if all actions are equally likely, from the last row up."""
    env, following, boards, values = Catch(), torch.zeros(5, 5), [], []
    for row in range(8, -1, -1):
        of_row = torch.zeros(5, 5)
        for ball in range(5):
            for paddle in range(5):
                state = CatchState(*(torch.tensor(place, dtype=torch.int32) for place in (ball, row, paddle)))
                for action in range(3):
                    step = env.step(state, torch.tensor(action), random.key(0))
                    after = torch.where(step.terminated, 0.0, discount * following[ball, step.state.paddle_x.item()])
                    of_row[ball, paddle] += (step.reward + after) / 3
                if abs(paddle - 2) <= row:  # else no game gets there
                    boards.append(env.observe(state))
                    values.append(of_row[ball, paddle])
        following = of_row
    return torch.stack(boards), torch.stack(values)


@pytest.mark.parametrize("algorithm", ["vtrace", pytest.param("ppo", marks=pytest.mark.slow)])
def test_values_of_a_policy_that_stays_random(algorithm):
    """A policy with learning rate 0 plays at random, whose values are known; at rewards of 0.001 and of 1000."""
    boards, expected = values_of_random_play()
    scales = torch.tensor([1e-3, 1e3]).repeat_interleave(4)

    def made(scale):
        return make_agent(algorithm, "popart", scale, actor_rate=0.0)

    def step(state, _, hparams):
        return made(hparams["scale"])[0].step(state)

    start = torch.vmap(lambda key, scale: made(scale)[0].init(key))(random.split(random.key(0), 8), scales)
    last, _ = pf.scan_lanes(step, start, length=1500, hparams={"scale": scales}, engine="native")
    learned = torch.vmap(
        lambda state, scale: made(scale)[1].values(state.critic, state.critic.params, boards)[:, 0] / scale
    )(last, scales)
    errors = (learned.unflatten(0, (2, 4)).mean(1) - expected).abs()
    assert errors.median() < 0.1
    assert errors.quantile(0.9) < 0.3


@pytest.mark.parametrize("algorithm", ["vtrace", pytest.param("ppo", marks=pytest.mark.slow)])
def test_powers_of_two_change_no_bit_of_what_is_learned_with_popart(algorithm):
    scales = torch.tensor([2.0**-10, 1.0, 2.0**10])

    def play(critic_name):
        def made(scale):
            return make_agent(algorithm, critic_name, scale, actor_rate=0.003)[0]

        start = torch.vmap(lambda scale: made(scale).init(random.key(1)))(scales)
        step = lambda state, _, hparams: made(hparams["scale"]).step(state)  # noqa: E731
        last, experience = pf.scan_lanes(step, start, length=12, hparams={"scale": scales}, engine="native")
        return last.actor["head.weight"], experience.reward

    actor, rewards = play("popart")
    assert (actor[0] == actor[1]).all()
    assert (actor[2] == actor[1]).all()
    assert (rewards[:, 0] == rewards[:, 2]).all()
    actor, _ = play("plain")
    assert not torch.equal(actor[0], actor[2])


def test_every_agent_has_settings_and_a_line():
    assert ALGORITHMS.keys() == {name.split("-")[0] for name in names.AGENT_NAMES}
    agent = {"by_scale": {"0.001": 0.1, "1": 0.2}, "intervals": {"0.001": (0, 1), "1": (0, 1)}}
    picture = io.BytesIO()
    report.draw_scores(
        {"experiments": {"catch_scale": {"seeds": 2, "agents": dict.fromkeys(names.AGENT_NAMES[::3], agent)}}}, picture
    )
    assert picture.tell() > 10_000
    assert len({report.label_of(name) for name in names.AGENT_NAMES}) == len(names.AGENT_NAMES)
    assert len({str(report.style_of(name)) for name in names.AGENT_NAMES}) == len(names.AGENT_NAMES)


def test_bad_input():
    with pytest.raises(ValueError, match="ppo: `length` must be a multiple of `minibatches`, got 16 and 3"):
        make_agent("ppo", "plain", 1.0, 0.1, minibatches=3)
