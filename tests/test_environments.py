"""Environments: step by step those of bsuite and gymnasium, over lanes, on native and in JAX."""

from __future__ import annotations

import gymnasium
import jax
import numpy as np
import pytest
import torch
from bsuite.environments import bandit as bsuite_bandit
from bsuite.environments import cartpole as bsuite_cartpole
from bsuite.environments import catch as bsuite_catch
from bsuite.environments import mountain_car as bsuite_mountain_car

import popart_func as pf
from popart_func import random
from popart_func.experiments.environments import bsuite, classic_control, step_or_reset, wrappers
from popart_func.experiments.environments.wrappers import scale_rewards
from popart_func.interop.jax import to_jax, to_jax_function

F64 = torch.float64


def f64(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def i32(*values):
    return [torch.tensor(value, dtype=torch.int32) for value in values]


def catch_state(env):
    return bsuite.CatchState(*i32(env._ball_x, env._ball_y, env._paddle_x))


def cart_pole_state(env):
    return bsuite.CartPoleState(*f64(*env._state))


def mountain_car_state(env):
    return bsuite.MountainCarState(*f64(env._position, env._velocity), *i32(env._timestep))


def swinging(state):
    """Pushes in the direction of the speed, which gets the car out of the valley."""
    return int(state.velocity > 0) * 2


@pytest.mark.parametrize(
    ("theirs", "ours", "state_of", "good"),
    [
        (bsuite_catch.Catch(seed=1), bsuite.Catch(dtype=F64), catch_state, None),
        (bsuite_cartpole.Cartpole(seed=1), bsuite.CartPole(dtype=F64), cart_pole_state, None),
        (bsuite_cartpole.Cartpole(max_time=0.2), bsuite.CartPole(max_time=0.2, dtype=F64), cart_pole_state, None),
        (bsuite_mountain_car.MountainCar(seed=1), bsuite.MountainCar(dtype=F64), mountain_car_state, None),
        (bsuite_mountain_car.MountainCar(seed=1), bsuite.MountainCar(dtype=F64), mountain_car_state, swinging),
    ],
    ids=["catch", "cartpole", "cartpole out of time", "mountain_car", "mountain_car solved"],
)
@pytest.mark.parametrize("steps", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bsuite(theirs, ours, state_of, good, steps):
    """States, observations, rewards and ends of each step, to rounding; each episode from bsuite's first state."""
    generator, key = np.random.default_rng(0), random.key(0)
    ours_all, theirs_all, ends, state = [], [], 0, None
    for _ in range(steps):
        if state is None:
            theirs.reset()
            state = state_of(theirs)
        action = good(state) if good else int(generator.integers(3))
        step = theirs.step(action)
        transition = ours.step(state, torch.tensor(action), key)
        state = transition.state
        ours_all.append((*state, *transition.observation.float(), transition.reward, transition.terminated))
        theirs_all.append((*state_of(theirs), *step.observation.ravel(), step.reward, step.last()))
        assert not transition.truncated
        if step.last():
            state, ends = None, ends + 1
    np.testing.assert_allclose(np.array(ours_all, float), np.array(theirs_all, float), rtol=1e-6, atol=1e-7)
    assert ends >= steps // 1000


def test_bandit():
    theirs = bsuite_bandit.SimpleBandit(mapping_seed=3)
    ours = bsuite.Bandit(torch.from_numpy(theirs._rewards))
    _, seen = ours.reset(random.key(0))
    for action in range(11):
        torch.testing.assert_close(seen.numpy(), theirs.reset().observation[0], check_dtype=False)
        step, transition = theirs.step(action), ours.step((), torch.tensor(action), random.key(0))
        assert transition.reward == step.reward
        assert transition.terminated
    shuffled = torch.vmap(lambda key: bsuite.Bandit.shuffled(key).rewards)(random.split(random.key(1), 100))
    assert torch.equal(shuffled.sort(-1).values, (torch.arange(11) / 10).expand(100, 11))
    assert len(shuffled.unique(dim=0)) == 100


@pytest.mark.parametrize("steps", [3000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_gymnasium_cart_pole(steps):
    """``CartPole-v1``, with its time limit: a good controller holds the pole to the 500th step."""
    theirs, ours = gymnasium.make("CartPole-v1"), classic_control.CartPoleV1(dtype=torch.float64)
    generator, key, state = np.random.default_rng(0), random.key(0), None
    theirs.reset(seed=0)
    ours_all, theirs_all = [], []
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(steps):
        if state is None:
            theirs.reset()
            start = f64(*theirs.unwrapped.state)
            state = classic_control.CartPoleV1State(*start, torch.tensor(0, dtype=torch.int32))
        good = int(state.theta + 0.3 * state.theta_dot + 0.02 * state.x + 0.05 * state.x_dot > 0)
        action = good if ends["truncated"] < 2 else int(generator.integers(2))
        seen, reward, terminated, truncated, _ = theirs.step(action)
        transition = ours.step(state, torch.tensor(action), key)
        state = transition.state
        ours_all.append((*state[:4], *transition.observation, transition.reward, *transition[4:]))
        theirs_all.append((*theirs.unwrapped.state, *seen, reward, terminated, truncated))
        if terminated or truncated:
            ends["terminated" if terminated else "truncated"] += 1
            state = None
    np.testing.assert_allclose(np.array(ours_all, float), np.array(theirs_all, float), rtol=1e-6, atol=1e-7)
    assert ends["truncated"] == 2
    assert ends["terminated"] > 50


ALL = {
    "bandit": bsuite.Bandit(torch.arange(11) / 10),
    "catch": bsuite.Catch(),
    "cartpole": bsuite.CartPole(max_time=0.3),
    "mountain_car": bsuite.MountainCar(max_steps=40),
    "CartPole-v1": classic_control.CartPoleV1(),
}


def rollout_step(env, scale=2.0):
    def step(carry, action):
        state, key = carry
        key, now = random.split(key)
        state, observation, transition = step_or_reset(scale_rewards(env, scale), state, action % env.num_actions, now)
        return (state, key), (observation, transition)

    return step


def test_on_engines_and_in_jax():
    """All environments as one step: native equals eager, and so does a lane alone in JAX."""
    lanes, steps = 6, 45
    keys = random.split(random.key(5), lanes)
    actions = torch.randint(0, 11, (steps, lanes), generator=torch.Generator().manual_seed(0))
    steps_of = {name: rollout_step(env) for name, env in ALL.items()}

    def step(carry, action):
        new = {name: steps_of[name](carry[name], action) for name in ALL}
        return {name: new[name][0] for name in ALL}, {name: new[name][1] for name in ALL}

    def start(key):
        return {name: (env.reset(key)[0], key) for name, env in ALL.items()}

    first = torch.vmap(start)(keys)
    _, eager = pf.scan_lanes(step, first, actions, engine="eager")
    _, native = pf.scan_lanes(step, first, actions, engine="native")
    torch.testing.assert_close(native, eager, rtol=1e-4, atol=1e-4)
    for name, (_, transition) in eager.items():
        assert (transition.terminated | transition.truncated).any(), name

    one = to_jax_function(step)
    _, in_jax = jax.jit(lambda carry, xs: jax.lax.scan(one, carry, xs))(
        to_jax(start(keys[2])), to_jax(actions[:, 2].int())
    )
    for name, (observation, transition) in eager.items():
        np.testing.assert_allclose(in_jax[name][0], observation[:, 2], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(in_jax[name][1].reward, transition.reward[:, 2])


def test_next_episode():
    """At the end of an episode the transition has its last observation, and the next starts from its own key."""
    env = bsuite.Catch()
    state, _ = env.reset(random.key(1))
    state = state._replace(ball_y=torch.tensor(8, dtype=torch.int32))
    state, observation, transition = step_or_reset(env, state, torch.tensor(1), random.key(2))
    assert transition.terminated
    assert transition.state.ball_y == 9
    assert state.ball_y == 0
    assert torch.equal(observation, env.observe(state))
    assert not torch.equal(observation, transition.observation)
    assert state.ball_x == env.reset(random.split(random.key(2), 2)[1])[0].ball_x


def played(env, steps, actions=None):
    """The transitions of an environment, and the first observation."""
    state, first = env.reset(random.key(0))
    found = []
    for i in range(steps):
        action = torch.tensor(i % 3 if actions is None else actions[i])
        state, _, transition = step_or_reset(env, state, action, random.fold_in(random.key(1), i))
        found.append(transition)
    return first, found


def test_wrappers_of_rewards():
    """Clipped, and divided by the deviation of their discounted sums, over the ends of episodes; raw ones stay."""
    env, steps = scale_rewards(bsuite.Catch(), 30.0), 40
    _, plain = played(env, steps)
    rewards = np.array([one.reward for one in plain])
    assert set(rewards) == {-30.0, 0.0, 30.0}
    _, clipped = played(wrappers.clip_rewards(env), steps)
    np.testing.assert_array_equal([one.reward for one in clipped], rewards.clip(-1, 1))

    _, standardized = played(wrappers.standardize_rewards(env, 0.9), steps)
    total, sums, expected = 0.0, [], []
    for reward, transition in zip(rewards, plain, strict=True):
        total = 0.9 * total * (not transition.terminated) + reward
        sums.append(total)
        expected.append(reward / (np.var(sums, ddof=1) if len(sums) > 1 else 1.0) ** 0.5 if reward else 0.0)
    np.testing.assert_allclose([one.reward for one in standardized], expected, rtol=1e-4)
    for found in (clipped, standardized):
        np.testing.assert_array_equal([one.raw_reward for one in found], rewards / 30)


def test_standardized_observations():
    first, plain = played(bsuite.Catch(), 20)
    begin, found = played(wrappers.standardize_observations(bsuite.Catch()), 20)
    torch.testing.assert_close(begin, torch.zeros(50))
    seen = [first]
    for i, (one, other) in enumerate(zip(plain, found, strict=True)):
        seen.append(one.observation)
        stacked = torch.stack(seen)
        expected = (one.observation - stacked.mean(0)) / (stacked.var(0) + 1e-8).sqrt()
        torch.testing.assert_close(other.observation, expected, atol=1e-3, rtol=1e-3)
        if one.terminated:  # what the next episode begins with is seen, too
            key = random.split(random.fold_in(random.key(1), i), 2)[1]
            seen.append(bsuite.Catch().reset(key)[1])


def test_wrappers_of_actions_and_cells():
    env = bsuite.Catch()
    actions = [0, 0, 2, 1, 2, 2, 0, 1]
    paddles = lambda env, actions: [one.state.paddle_x.item() for one in played(env, 8, actions)[1]]  # noqa: E731
    assert paddles(wrappers.mirror_actions(env), actions) == paddles(env, [2 - action for action in actions])
    assert paddles(wrappers.slip(env, 0.0), actions) == paddles(env, actions)
    assert paddles(wrappers.slip(env, 1.0), actions) == paddles(wrappers.slip(env, 1.0), actions[::-1])
    first, transitions = played(wrappers.flip_cells(env, 1.0), 12)
    assert first.sum() == 48
    assert all(one.observation.sum() >= 48 for one in transitions)
    few = torch.stack([one.observation for one in played(wrappers.flip_cells(env, 0.1), 60)[1]])
    assert 0.1 < few.mean() < 0.17
