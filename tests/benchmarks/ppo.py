"""Proximal policy optimization as one step, on the native engine and in JAX: ``python tests/benchmarks/ppo.py``.

An update of `tests/support/ppo.py` (rollout, advantages, epochs of minibatches, Pop-Art) in many seeds. JAX has the
same update as nested ``lax.scan`` with optax: under ``jit(vmap(...))``, and with the seeds shared out over as many
devices as there are threads. Sides run in turn in one process; the table shows medians of wall time and of CPU time,
and how long the first call takes beyond a later one.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = int(os.environ.get("THREADS", "2"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={THREADS}"
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from ppo import (  # noqa: E402
    CLIP,
    DISCOUNT,
    ENVIRONMENTS,
    EPOCHS,
    LONGEST,
    MINIBATCHES,
    STEPS,
    advantage,
    ppo,
)

import popart_func as pf  # noqa: E402

STEP_SIZE, SCALE_LB, SCALE_UB = 0.02, 1e-6, 1e8


def cart_pole(state: Any, action: Any) -> Any:
    _, dx, angle, spin = jnp.moveaxis(state, -1, 0)
    force = jnp.where(action == 1, 10.0, -10.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    push = (force + 0.05 * spin * spin * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
    pull = push - 0.05 * turn * cos / 1.1
    return state + 0.02 * jnp.stack([dx, pull, spin, turn], -1)


def network(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(jnp.tanh(x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"])
    return hidden @ params["w3"].T + params["b3"]


def log_probability(actor: Any, x: Any, action: Any) -> Any:
    both = jax.nn.log_softmax(network(actor, x))
    return jnp.where(action == 1, both[:, 1], both[:, 0]), both


def jax_update(updates: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``(init of the optimizer, update)``, as `ppo` with a reward scale of 1 and Pop-Art."""
    schedule = optax.linear_schedule(2.5e-3, 0.0, updates * EPOCHS * MINIBATCHES)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(schedule, eps=1e-5))

    def update(carry: Any, _: Any) -> Any:
        key, rollout_key, epoch_key = jax.random.split(carry["key"], 3)
        params, (mean, square) = carry["params"], carry["statistics"]
        deviation = lambda mean, square: jnp.sqrt(jnp.clip(square - mean**2, SCALE_LB**2, SCALE_UB**2))  # noqa: E731

        def value(x: Any) -> Any:
            return (mean + deviation(mean, square) * network(params["critic"], x)).squeeze(-1)

        def act(environment: Any, key: Any) -> Any:
            x, age, mean_return = environment
            action_key, reset_key = jax.random.split(key)
            _, both = log_probability(params["actor"], x, jnp.zeros(ENVIRONMENTS))
            action = (jax.random.uniform(action_key, (ENVIRONMENTS,)) < jnp.exp(both[:, 1])).astype(jnp.int32)
            after, age = cart_pole(x, action), age + 1
            fell = (jnp.abs(after[:, 0]) > 2.4) | (jnp.abs(after[:, 2]) > 0.2095)
            ended = ~fell & (age >= LONGEST)
            done = fell | ended
            reward = 1.0 + DISCOUNT * jnp.where(ended, value(after), 0.0)
            finished = (age * done).sum() / jnp.maximum(done.sum(), 1)
            mean_return = jnp.where(done.any(), 0.9 * mean_return + 0.1 * finished, mean_return)
            fresh = 0.1 * (jax.random.uniform(reset_key, (ENVIRONMENTS, 4)) - 0.5)
            environment = jnp.where(done[:, None], fresh, after), jnp.where(done, 0.0, age), mean_return
            chosen = jnp.where(action == 1, both[:, 1], both[:, 0])
            return environment, (x, action, chosen, value(x), reward, done.astype(jnp.float32))

        environment, (xs, actions, chosen, values, rewards, done) = jax.lax.scan(
            act, carry["environment"], jax.random.split(rollout_key, STEPS)
        )

        start = jnp.zeros(ENVIRONMENTS), value(environment[0])
        _, advantages = jax.lax.scan(advantage, start, (values, rewards, done), reverse=True)
        targets = (advantages + values).ravel()
        # The laws of `popart_func.popart` with an exponential moving average, and the head that keeps its outputs.
        new_mean = mean + STEP_SIZE * (targets.mean() - mean)
        new_square = square + STEP_SIZE * ((targets**2).mean() - square)
        old_scale, scale = deviation(mean, square), deviation(new_mean, new_square)
        critic = params["critic"]
        critic = {
            **critic,
            "w3": critic["w3"] * old_scale / scale,
            "b3": (old_scale * critic["b3"] + mean - new_mean) / scale,
        }
        params, mean, square = {**params, "critic": critic}, new_mean, new_square
        targets = (targets - mean) / scale
        batch = xs.reshape(-1, 4), actions.ravel(), chosen.ravel(), targets, advantages.ravel()

        def minibatch(learner: Any, places: Any) -> Any:
            params, momentum = learner
            x, action, before, target, advantage = (part[places] for part in batch)
            advantage = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)

            def loss(params: Any) -> Any:
                now, both = log_probability(params["actor"], x, action)
                ratio = jnp.exp(now - before)
                gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
                entropy = -(jnp.exp(both) * both).sum(-1).mean()
                error = network(params["critic"], x).squeeze(-1) - target
                return 0.25 * (error**2).mean() - gain - 0.01 * entropy

            cost, gradient = jax.value_and_grad(loss)(params)
            change, momentum = optimizer.update(gradient, momentum)
            return (optax.apply_updates(params, change), momentum), cost

        def epoch(learner: Any, key: Any) -> Any:
            order = jax.random.permutation(key, STEPS * ENVIRONMENTS).reshape(MINIBATCHES, -1)
            learner, costs = jax.lax.scan(minibatch, learner, order)
            return learner, costs.mean()

        learner = params, carry["optimizer"]
        (params, momentum), costs = jax.lax.scan(epoch, learner, jax.random.split(epoch_key, EPOCHS))
        after = {
            "params": params,
            "optimizer": momentum,
            "statistics": (mean, square),
            "environment": environment,
            "key": key,
        }
        return after, (environment[2], costs.mean())

    return optimizer.init, update


def jax_side(start: Any, seeds: int, updates: int, steps: int, devices: int) -> Callable[[], Any]:
    init, update = jax_update(updates)

    def of_one_seed(carry: Any) -> Any:
        return jax.lax.scan(update, carry, None, length=steps)

    numpy = jax.tree.map(lambda leaf: leaf.numpy(), {name: start[name] for name in ("params", "environment")})
    carry = {
        **numpy,
        "optimizer": jax.vmap(init)(numpy["params"]),
        "statistics": (np.zeros((seeds, 1), np.float32), np.ones((seeds, 1), np.float32)),
        "key": jax.vmap(jax.random.PRNGKey)(np.arange(seeds)),
    }
    if devices > 1:
        lanes = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("lanes",)), PartitionSpec("lanes"))
        carry = jax.device_put(carry, lanes)
    run = jax.jit(jax.vmap(of_one_seed))
    return lambda: np.asarray(run(carry)[1][0]).T


def native_side(start: Any, updates: int, steps: int, engine: str) -> Callable[[], Any]:
    _, update = ppo(1.0, with_popart=True, updates=updates)
    return lambda: pf.scan_lanes(update, start, torch.arange(float(steps)), engine=engine)[1][0].numpy()


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall time and CPU time, compilers included, and the result."""

    def cpu() -> float:
        return sum(
            used.ru_utime + used.ru_stime
            for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    wall, before = time.perf_counter(), cpu()
    result = run()
    return time.perf_counter() - wall, cpu() - before, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="how many of the updates are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", default=["native", "jax", "jax sharded"])
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    init, _ = ppo(1.0, with_popart=True, updates=given.updates)
    start = pf.tree.stack([init(seed) for seed in range(given.seeds)])
    sides = {
        name: jax_side(start, given.seeds, given.updates, given.steps, THREADS if "sharded" in name else 1)
        if name.startswith("jax")
        else native_side(start, given.updates, given.steps, name)
        for name in given.sides
    }
    first = {name: seconds(run) for name, run in sides.items()}
    found: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            found[name].append(seconds(run))
    print(f"{given.steps} updates of {given.seeds} seeds, float32, {THREADS} threads")
    for name, runs in found.items():
        wall, cpu = (statistics.median(run[place] for run in runs) for place in (0, 1))
        least = min(run[1] for run in runs)
        compiled = first[name][0] - wall, first[name][1] - cpu
        print(
            f"{name:18} wall {wall:6.3f} s   cpu {cpu:6.3f} s (least {least:6.3f})   first call + {compiled[0]:5.1f} s "
            f"(cpu {compiled[1]:5.1f})   median return {np.median(runs[0][2][-1]):6.1f}"
        )


if __name__ == "__main__":
    main()
