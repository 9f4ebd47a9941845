"""bsuite's own DQN in JAX on ``catch_scale``, and ours with its settings: scores by scale, and seconds for a run.

``python tests/benchmarks/bsuite_dqn.py`` needs ``pip install dm-haiku``. bsuite's baseline plays one environment of one
seed at a time, in Python. Ours plays all scales and seeds as lanes, with plain values as in bsuite and with Pop-Art.
Settings are bsuite's: two hidden layers of 64, Adam at 0.001, batches of 32 after each action from the last 10,000
transitions. Ours differ in three things: double Q, a target network that follows by a fifth a step rather than in full
after four, and values that start at 0.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
import torch
from bsuite.baselines import experiment
from bsuite.baselines.jax import dqn as theirs
from bsuite.experiments.catch_scale import catch_scale

import popart_func as pf
from popart_func import random
from popart_func.experiments.agents import dqn, make_critic
from popart_func.experiments.agents.networks import apply_mlp
from popart_func.experiments.environments.bsuite import Catch
from popart_func.experiments.environments.wrappers import scale_rewards
from popart_func.experiments.names import REWARD_SCALES
from popart_func.experiments.reward_scales.tasks import TASKS

TASK, NONE = TASKS["catch_scale"], np.zeros(())


def score_of_bsuite(scale: float, seed: int, episodes: int) -> float:
    environment = catch_scale.load(reward_scale=scale, seed=seed)
    np.random.seed(seed)
    agent = theirs.default_agent(environment.observation_spec(), environment.action_spec(), seed=seed)
    experiment.run(agent, environment, num_episodes=episodes)
    regret = environment.bsuite_info()["total_regret"]
    return float(TASK.score(np.array(episodes), np.array(episodes * TASK.best_return - regret), NONE))


def scores_of_ours(critic: str, seeds: int, episodes: int) -> np.ndarray:
    """``[scales, seeds]``."""
    scales = torch.tensor(REWARD_SCALES).repeat_interleave(seeds)
    keys = torch.stack([random.key(seed) for seed in range(seeds)]).repeat(len(REWARD_SCALES), 1)
    statistics = pf.popart(1, 0.001, scale_lb=1e-9, scale_ub=1e9, bias_correction=True)

    def made(scale: Any) -> Any:
        learner = make_critic(critic, apply_mlp, pf.adam(1e-3), statistics)
        return dqn(scale_rewards(Catch(), scale), learner, (64, 64), steps_per_update=1, target_rate=0.2)

    def step(state: Any, _: Any, hparams: Any) -> Any:
        return made(hparams["scale"]).step(state)

    start = torch.vmap(lambda key, scale: made(scale).init(key))(keys, scales)
    _, experience = pf.scan_lanes(step, start, length=9 * episodes, hparams={"scale": scales}, engine="native")
    total = experience.reward.sum((0, 2)).double().numpy()
    return TASK.score(np.full_like(total, episodes), total, NONE).reshape(len(REWARD_SCALES), seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=4, help="of bsuite's baseline and of ours")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    rows: dict[str, tuple[np.ndarray, float, float]] = {}

    def measured(name: str, run: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        found = run()
        rows[name] = found, time.perf_counter() - wall, time.process_time() - cpu

    measured("dqn-popart", lambda: scores_of_ours("popart", given.seeds, given.episodes))
    measured("dqn-plain", lambda: scores_of_ours("plain", given.seeds, given.episodes))
    bsuite_runs = [[(scale, seed) for seed in range(given.seeds)] for scale in REWARD_SCALES]
    measured(
        "bsuite",
        lambda: np.array([[score_of_bsuite(*one, given.episodes) for one in row] for row in bsuite_runs]),
    )
    print(f"catch_scale, {given.episodes} episodes, {given.seeds} seeds of each of {len(REWARD_SCALES)} scales")
    for name, (found, wall, cpu) in rows.items():
        by_scale = "  ".join(
            f"{scale:g}: {score:.2f}" for scale, score in zip(REWARD_SCALES, found.mean(1), strict=True)
        )
        print(f"{name:10}  {by_scale}   a run: {wall / found.size:.2f} s, cpu {cpu / found.size:.2f} s")


if __name__ == "__main__":
    main()
