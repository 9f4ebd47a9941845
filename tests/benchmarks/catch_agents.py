"""Q-learning with Pop-Art on Catch at five scales of the rewards, on native and in JAX with gymnax's environment.

``python tests/benchmarks/catch_agents.py`` needs ``pip install gymnax``. 100 seeds times bsuite's five scales are 500
lanes. JAX runs the same agent, written by hand over ``gymnax.make("Catch-bsuite")`` and optax, under
``jit(vmap(scan))``, and with its lanes shared out over as many devices as there are threads. Sides run in turn in one
process; the table shows medians of wall time and of CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("THREADS", "2"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={THREADS}"

import gymnax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import popart_func as pf  # noqa: E402
from popart_func import random  # noqa: E402
from popart_func.experiments.environments.bsuite import Catch  # noqa: E402
from popart_func.experiments.environments.wrappers import scale_rewards  # noqa: E402
from popart_func.experiments.names import REWARD_SCALES  # noqa: E402
from popart_func.experiments.reward_scales.roster import default_setting, make_agent  # noqa: E402
from popart_func.experiments.workloads.case import jax_linear, jax_popart, jax_rescaled  # noqa: E402

NAME, DISCOUNT, EPSILON = "q-popart", 0.99, 0.05
RATE, STEP_SIZE = default_setting(NAME)

Side = Callable[[], np.ndarray]


def native_side(scales: torch.Tensor, seeds: int, steps: int) -> Side:
    """The rewards of all lanes, ``[steps, lanes]``."""

    def made(scale: Any) -> Any:
        return make_agent(NAME, scale_rewards(Catch(), scale), RATE, STEP_SIZE)

    keys = torch.stack([random.key(seed) for seed in range(seeds)]).repeat(len(REWARD_SCALES), 1)
    start = torch.vmap(lambda key, scale: made(scale).init(key))(keys, scales)

    def step(state: Any, _: Any, hparams: Any) -> Any:
        return made(hparams["scale"]).step(state)

    def run() -> np.ndarray:
        _, experience = pf.scan_lanes(step, start, length=steps, hparams={"scale": scales}, engine="native")
        return experience.reward[..., 0].numpy()

    return run


def jax_side(scales: torch.Tensor, seeds: int, steps: int, devices: int) -> Side:
    """As `native_side`, with gymnax."""
    environment, settings = gymnax.make("Catch-bsuite")
    tx = optax.adam(RATE)

    def network(params: Any, x: Any) -> Any:
        return jax_linear(params, "head", jax.nn.relu(jax_linear(params, "hidden0", x.ravel())))

    def one_lane(params: Any, seed: Any, scale: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            (params, moments, opt_state), key, place, seen = carry
            key, explore, choice, for_step = jax.random.split(key, 4)
            at_random = jax.random.randint(choice, (), 0, 3)
            greedy = network(params, seen).argmax()
            action = jnp.where(jax.random.uniform(explore) < EPSILON, at_random, greedy)
            following, place, raw, done, _ = environment.step(for_step, place, action, settings)
            values = network(params, following) * moments[2] + moments[0]
            target = raw * scale + DISCOUNT * jnp.where(done, 0.0, values.max())
            params, moments, ratio = jax_popart(params, moments, target, STEP_SIZE, "head")
            opt_state = jax_rescaled(opt_state, ratio, "head")
            goal = (target - moments[0]) / moments[2]
            grads = jax.grad(lambda params: 0.5 * (network(params, seen)[action] - goal) ** 2)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return ((optax.apply_updates(params, updates), moments, opt_state), key, place, following), raw

        seen, place = environment.reset(jax.random.key(seed), settings)
        moments = jnp.float32(0), jnp.float32(1), jnp.float32(1)
        carry = (params, moments, tx.init(params)), jax.random.key(seed), place, seen
        return jax.lax.scan(step, carry, None, length=steps)[1]

    one = make_agent(NAME, Catch(), RATE, STEP_SIZE)
    keys = torch.stack([random.key(seed) for seed in range(seeds)]).repeat(len(REWARD_SCALES), 1)
    params = {name: leaf.numpy() for name, leaf in torch.vmap(one.init)(keys).learner.params.items()}
    inputs = params, np.tile(np.arange(seeds), len(REWARD_SCALES)), scales.numpy()
    if devices > 1:
        lanes = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("lanes",)), PartitionSpec("lanes"))
        inputs = jax.device_put(inputs, lanes)
    run = jax.jit(jax.vmap(one_lane))
    return lambda: np.asarray(run(*inputs)).T


def seconds(run: Side) -> tuple[float, float, np.ndarray]:
    wall, cpu = time.perf_counter(), time.process_time()
    rewards = run()
    return time.perf_counter() - wall, time.process_time() - cpu, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000, help="of 90,000, bsuite's 10,000 episodes")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    scales = torch.tensor(REWARD_SCALES).repeat_interleave(given.seeds)
    sides = {
        "native": native_side(scales, given.seeds, given.steps),
        "jax": jax_side(scales, given.seeds, given.steps, 1),
        "jax sharded": jax_side(scales, given.seeds, given.steps, THREADS),
    }
    for run in sides.values():
        run()
    found: dict[str, list[tuple[float, float, np.ndarray]]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            found[name].append(seconds(run))
    print(f"{len(scales)} lanes, {given.steps} steps, float32, {THREADS} threads")
    for name, runs in found.items():
        wall, cpu = (statistics.median(run[place] for run in runs) for place in (0, 1))
        last = runs[0][2][given.steps // 2 :]
        caught = (last > 0).sum() / (last != 0).sum()
        each = 1e9 * wall / given.steps / len(scales)
        print(
            f"{name:12} wall {wall:6.3f} s   cpu {cpu:6.3f} s   {each:6.0f} ns a step of a lane   "
            f"caught {caught:.2f} in the second half"
        )


if __name__ == "__main__":
    main()
