"""The small network of SimpleChains.jl's documentation, on the native engine, eager PyTorch and JAX.

    python tests/benchmarks/simple_chains.py

A network 4-32-16-4 with tanh learns the matrix exponential of 10,000 random 2 x 2 matrices, by Adam on all of them at
once: an epoch is one step. One lane. Sides run in turn in one process; the table shows medians of the CPU time and the
wall time of an epoch, without compiling. (https://pumasai.github.io/SimpleChains.jl, "Small MLP")
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad_and_value

import popart_func as pf

SIZES, SAMPLES, RATE = (4, 32, 16, 4), 10_000, 1e-3

Run = Callable[[], float]
"""Trains for some epochs from the first parameters; the last loss."""


def make() -> nn.Module:
    layers = [part for a, b in itertools.pairwise(SIZES) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def native(params: dict[str, Tensor], x: Tensor, y: Tensor, epochs: int) -> Run:
    network, optimizer = pf.stateless(make()), pf.adam(RATE)

    def loss(params: Any) -> Tensor:
        return 0.5 * (network(params, x) - y).square().sum(-1).mean()

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        gradient, value = grad_and_value(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (pf.apply_updates(params, updates), state), value

    start = pf.tree.stack([(params, optimizer.init(params))])
    return lambda: float(pf.scan_lanes(step, start, length=epochs, engine="native")[1][-1, 0])


def eager(params: dict[str, Tensor], x: Tensor, y: Tensor, epochs: int) -> Run:
    def run() -> float:
        network = make()
        network.load_state_dict(params)
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        for _ in range(epochs):
            optimizer.zero_grad()
            value = 0.5 * (network(x) - y).square().sum(-1).mean()
            value.backward()
            optimizer.step()
        return float(value.detach())

    return run


def in_jax(params: dict[str, Tensor], x: Tensor, y: Tensor, epochs: int) -> Run:
    import jax
    import jax.numpy as jnp
    import optax

    optimizer, (inputs, targets) = optax.adam(RATE), (jnp.asarray(x.numpy()), jnp.asarray(y.numpy()))
    start = {name: jnp.asarray(leaf.numpy()) for name, leaf in params.items()}

    def loss(params: Any, x: Any, y: Any) -> Any:
        for layer in (0, 2):
            x = jnp.tanh(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
        return 0.5 * ((x @ params["4.weight"].T + params["4.bias"] - y) ** 2).sum(-1).mean()

    @jax.jit
    def train(params: Any, x: Any, y: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, x, y)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=epochs)[1]

    return lambda: float(np.asarray(train(start, inputs, targets))[-1])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's; JAX takes all")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    y = torch.matrix_exp(0.5 * x.view(-1, 2, 2)).flatten(1)
    params = pf.init_params(make, seed=0)
    sides = {side.__name__: side(params, x, y, given.epochs) for side in (native, eager, in_jax)}
    first = {name: run() for name, run in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            run()
            times[name].append((cpu_seconds() - cpu, time.perf_counter() - wall))
    print(f"an epoch of {SAMPLES} samples, network {SIZES}, Adam, one lane, {given.threads} threads")
    for name, found in times.items():
        cpu, wall = (1e3 * statistics.median(column) / given.epochs for column in zip(*found, strict=True))
        print(f"{name:8} cpu {cpu:6.3f} ms   wall {wall:6.3f} ms   loss after {given.epochs} epochs {first[name]:.6f}")


if __name__ == "__main__":
    main()
