"""Agents on bsuite's scale experiments: bsuite's scores, known values, and the same curves at every scale."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from bsuite.experiments.bandit import analysis as bandit
from bsuite.experiments.cartpole import analysis as cartpole
from bsuite.experiments.catch import analysis as catch
from bsuite.experiments.mountain_car import analysis as mountain_car
from bsuite.utils import plotting

import popart_func as pf
from popart_func import random
from popart_func.cli import main
from popart_func.experiments import names
from popart_func.experiments.agents import dqn, make_critic, q_learning, stream_q
from popart_func.experiments.agents.networks import apply_mlp, apply_normalized_mlp
from popart_func.experiments.environments.bsuite import Bandit, Catch, CatchState
from popart_func.experiments.environments.wrappers import mirror_actions, scale_rewards
from popart_func.experiments.reward_scales import tuning
from popart_func.experiments.reward_scales.play import play
from popart_func.experiments.reward_scales.roster import ALGORITHMS, Setting, default_setting, make_agent
from popart_func.experiments.reward_scales.tasks import TASKS, score_of_scales

THEIRS = {"bandit_scale": bandit, "catch_scale": catch, "cartpole_scale": cartpole, "mountain_car_scale": mountain_car}


@pytest.mark.parametrize("name", THEIRS)
def test_scores_are_bsuite_s(name):
    """The score of a run, and that of an experiment, against bsuite's functions of its data frame."""
    task, analysis = TASKS[name], THEIRS[name]
    assert (task.episodes, task.base_regret) == (analysis.NUM_EPISODES, analysis.BASE_REGRET)
    generator = np.random.default_rng(0)
    scores, by_scale = [], {}
    for run in range(20):
        mean = task.best_return - task.base_regret * generator.uniform(0, 1.3)
        best = generator.uniform(0, 1000)
        frame = pd.DataFrame(
            {
                "episode": [task.episodes],
                "total_regret": [(task.best_return - mean) * task.episodes],
                "raw_return": [mean * task.episodes],
                "best_episode": [best],
                "bsuite_id": [f"{run}"],
                "scale": [run],
            }
        )
        by_scale[run] = frame
        scores.append(analysis.score(frame))
        ours = task.score(np.array([task.episodes]), np.array([mean * task.episodes]), np.array([best]))
        np.testing.assert_allclose(ours, [scores[-1]], atol=1e-6)
    together = plotting.score_by_scaling(pd.concat(by_scale.values()), analysis.score, "scale")
    np.testing.assert_allclose(score_of_scales(np.array(scores)), together)


def test_names_are_those_of_the_tasks_and_settings():
    assert tuple(TASKS) == names.SCALE_EXPERIMENTS
    assert {name.split("-")[0] for name in names.AGENT_NAMES} == set(ALGORITHMS)


def test_bad_input():
    with pytest.raises(ValueError, match="play: `steps` must be at least 9, an episode of catch_scale, got 8"):
        play("catch_scale", ["q-popart"], steps=8)
    with pytest.raises(ValueError, match=r"play: `settings` must be of the agents \['q-popart'\], got \['q-plain'\]"):
        play("catch_scale", ["q-popart"], settings={"q-plain": default_setting("q-plain")})
    with pytest.raises(ValueError, match=r"play: `agents` must be among .*, got 'dqn-popart'"):
        play("catch_tasks", ["dqn-popart"])
    with pytest.raises(ValueError, match="play: `reward_scales` must have one for each of the 7 tasks of catch_tasks"):
        play("catch_tasks", ["q-popart"], [1.0])
    with pytest.raises(ValueError, match="multi_task_q_learning: `environments` must have one shape of observations"):
        make_agent("q-popart", (Catch(), Catch(rows=5)), 0.1, 0.1)
    with pytest.raises(ValueError, match="score: `episodes` must be at least 1 in each run, got 0"):
        TASKS["mountain_car_scale"].score(np.array([2, 0]), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="make_critic: `name` must be one of plain, art, popart, normalized, got 'x'"):
        make_critic("x", apply_mlp, pf.adam(0.1), pf.popart(1, 0.1))


def agent_of(algorithm, environment, scale, learning_rate):
    """The agent, which acts at random, and ``values(state, observations)`` in the rewards' units."""
    statistics = pf.popart(1, 0.01, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)
    environment = scale_rewards(environment, scale)
    if algorithm == "stream":
        agent = stream_q(environment, statistics, kappa=1 / learning_rate, epsilon=1.0)
        return agent, lambda state, x: pf.unnormalize(state.statistics, apply_normalized_mlp(state.params, x))
    made = make_critic("popart", apply_mlp, pf.adam(learning_rate), statistics)
    if algorithm == "q":
        agent = q_learning(environment, made, epsilon=1.0)
    else:
        agent = dqn(environment, made, (50,), batch_size=16, epsilon=1.0, capacity=1000, steps_per_update=2)
    return agent, lambda state, x: made.values(state.learner, state.learner.params, x)


def catch_values(discount=0.99):
    """Every state's observation and the best actions' values by dynamic programming, from the last row up."""
    env = Catch()

    def state_of(*places):
        return CatchState(*(torch.tensor(place, dtype=torch.int32) for place in places))

    following = torch.zeros(5, 5)
    boards, values = [], []
    for row in range(8, -1, -1):
        best = torch.zeros(5, 5)
        for ball in range(5):
            for paddle in range(5):
                state, of_actions = state_of(ball, row, paddle), []
                for action in range(3):
                    step = env.step(state, torch.tensor(action), random.key(0))
                    after = following[ball, step.state.paddle_x.item()]
                    of_actions.append(step.reward + torch.where(step.terminated, 0.0, discount * after))
                best[ball, paddle] = max(of_actions)
                if abs(paddle - 2) <= row:  # else no game gets there
                    boards.append(env.observe(state))
                    values.append(torch.stack(of_actions))
        following = best
    return torch.stack(boards), torch.stack(values)


def learned_values(algorithm, environment, steps, observations, learning_rate):
    """The values that are learned from random actions, in the rewards' units: ``[scales, observations, actions]``."""
    scales = torch.tensor([1e-3, 1e3]).repeat_interleave(4)

    def made(scale):
        return agent_of(algorithm, environment, scale, learning_rate)

    def step(state, _, hparams):
        return made(hparams["scale"])[0].step(state)

    def values(state, scale):
        return made(scale)[1](state, observations) / scale

    start = torch.vmap(lambda key, scale: made(scale)[0].init(key))(random.split(random.key(0), 8), scales)
    last, _ = pf.scan_lanes(step, start, torch.zeros(steps), hparams={"scale": scales}, engine="native")
    return torch.vmap(values)(last, scales).unflatten(0, (2, 4)).mean(1)  # over seeds


@pytest.mark.parametrize("algorithm", ["q", pytest.param("dqn", marks=pytest.mark.slow)])
def test_the_bandit_s_values_are_its_rewards(algorithm):
    rewards = torch.arange(11) / 10
    arms = learned_values(algorithm, Bandit(rewards), 3000, torch.ones(1), 0.002)
    torch.testing.assert_close(arms, rewards.expand(2, 11), atol=0.1, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "learning_rate", "steps", "middle", "most"),
    [("q", 0.003, 40_000, 0.2, 0.45), ("dqn", 0.003, 8000, 0.08, 0.2), ("stream", 1.0, 80_000, 0.25, 0.6)],
    ids=["q", "dqn", "stream"],
)
def test_catch_s_values_are_those_of_dynamic_programming(algorithm, learning_rate, steps, middle, most):
    """The errors' median and 90th percentile; learning from one transition at a time is noisy."""
    boards, best = catch_values()
    errors = (learned_values(algorithm, Catch(), steps, boards, learning_rate) - best).abs()
    assert errors.median() < middle
    assert errors.quantile(0.9) < most


@pytest.mark.parametrize("tuned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "tuned"])
def test_play_and_report(tuned, tmp_path, capsys):
    """The command's files. With Pop-Art the runs of powers of two are the same to the bit; plain ones are not."""
    powers = (2.0**-10, 1.0, 2.0**10)
    words = ["rl", "--seeds=2", "--steps=1024", "--agents", "q-popart", "q-plain", "--engine=native"]
    words += ["--tune"] * tuned
    assert main([*words, "--reward-scales", *map(str, powers), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "catch_scale" in printed
    assert ("tuned at x 1 on 10 other" in printed) == tuned
    agents = json.loads((tmp_path / "summary.json").read_text())["experiments"]["catch_scale"]["agents"]
    assert agents.keys() == {"q-popart", "q-plain"}
    for name, agent in agents.items():
        assert agent["low"] <= agent["score"] <= agent["high"]
        assert agent["by_scale"].keys() == {"0.000976562", "1", "1024"}
        assert agent["seconds"] > 0
        grid = agent["tuning"]["scores"] if tuned else [{"score": 0.0, **default_setting(name)._asdict()}]
        best = max(grid, key=lambda one: one["score"])
        assert agent["learning_rate"] == best["learning_rate"]
        assert agent["step_size"] == best.get("step_size", default_setting(name).step_size)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("scores.png", "curves_catch_scale.png"))

    settings = {name: Setting(agent["learning_rate"], agent["step_size"]) for name, agent in agents.items()}
    store = tmp_path / "catch_scale"
    found = play("catch_scale", agents, powers, range(2), settings=settings, steps=1024, store=store, engine="native")
    assert found.attrs["lane_steps"] == 0, "the command's store has it all"
    popart, plain = (found["total_return"].sel(agent=f"q-{critic}") for critic in ("popart", "plain"))
    for scale in (powers[0], powers[2]):
        np.testing.assert_array_equal(popart.sel(reward_scale=scale), popart.sel(reward_scale=1.0))
        assert not np.array_equal(plain.sel(reward_scale=scale), plain.sel(reward_scale=1.0))
    assert (found["episodes"].isel(step=-1) == 113).all()


def test_tuning_takes_the_best_setting_of_one_grid(monkeypatch):
    """Every treatment has the grid of its algorithm, at rewards times 1, and seeds that are not reported."""
    asked = {}

    def run_agent(task, name, axes, seeds, steps, **options):
        asked[name] = axes, seeds
        coordinates = {"reward_scale": [1.0], "learning_rate": list(axes["learning_rate"]), "seed": seeds, "step": [9]}
        if name == "q-popart":
            coordinates["step_size"] = list(axes["step_size"])
        total = xarray.DataArray(-90.0, coordinates, list(coordinates))
        chosen = {"learning_rate": 0.01} | ({"step_size": 0.1} if name == "q-popart" else {})
        total.loc[chosen] = 50.0
        return xarray.Dataset({"total_return": total, "episodes": total * 0 + 100, "best_episode": total * 0})

    monkeypatch.setattr(tuning, "run_agent", run_agent)
    tuned = tuning.tune("catch_scale", ["q-popart", "q-plain"])
    assert tuned["q-popart"].setting == Setting(0.01, 0.1)
    assert tuned["q-plain"].setting == Setting(0.01, default_setting("q-plain").step_size)
    assert tuned["q-popart"].scores.dims == ("learning_rate", "step_size")
    assert tuned["q-popart"].seeds == 10
    assert asked["q-popart"] == asked["q-plain"]
    assert asked["q-popart"][0]["reward_scale"] == [1.0]
    assert min(asked["q-popart"][1]) > 2**31


@pytest.mark.parametrize("treatment", ["popart", "shared"])
def test_each_task_learns_the_same_whatever_the_others_rewards_are(treatment):
    """Two tasks of one network, with rewards times 2⁷ and 2⁻⁷ or the other way round, each with its own statistic.

    All that is learned is equal to the bit. With a shared statistic it is not.
    """

    def learned(*scales):
        environments = tuple(map(scale_rewards, (Catch(), mirror_actions(Catch(rows=5, columns=10))), scales))
        agent = make_agent(f"q-{treatment}", environments, 0.01, 0.01)
        state = agent.init(random.key(1))
        for _ in range(10):
            state, experience = agent.step(state)
        assert experience.reward.shape == (1, 2)
        return state.learner.params

    one, other = learned(2.0**7, 2.0**-7), learned(2.0**-7, 2.0**7)
    equal = all(torch.equal(one[name], other[name]) for name in one)
    assert equal == (treatment == "popart")
    assert one["head.weight"].shape == (6, 50)


@pytest.mark.slow
def test_tasks_are_reported_by_their_scales():
    """Seven variants in one network: at powers of two in either order, the same returns at the same places."""
    powers = [2.0**power for power in range(-6, 8, 2)]
    options = {"seeds": range(3), "steps": 1024, "quiet": True}
    found = play("catch_tasks", ["q-popart"], powers, **options)
    turned = play("catch_tasks", ["q-popart"], powers[::-1], **options)
    assert found["total_return"].dims == ("agent", "reward_scale", "seed", "step")
    assert (found["reward_scale"] == powers).all()
    np.testing.assert_array_equal(found["total_return"], turned["total_return"])
    assert (found["episodes"].isel(step=-1) >= 113).all(), "nine actions an episode, or four on a wide board"
