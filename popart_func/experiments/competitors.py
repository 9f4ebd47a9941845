"""Competitors of the engines in `bench`: the same Pop-Art run as one PyTorch module per seed, and in JAX.

Each maker takes the parameters ``{name: [lanes, ...]}`` (numpy, torch's layout) and the numbers ``[steps, lanes]``
(int32). It returns a function without arguments that runs the whole stream and, once that is done, returns the errors
``[steps, lanes]`` on the device that computed them. All follow rlax's update rule and bounds; `bench` checks that they
compute what the engines do. The JAX competitors run on JAX's default device and need the extra ``jax``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from popart_func.experiments import regression
from popart_func.models import LowerLayers, UpperLayer

__all__ = ["LEARNING_RATE", "MAKERS", "STEP_SIZE", "jax_lanes_last", "jax_scan", "jax_traced", "reference"]

LEARNING_RATE, STEP_SIZE = 10**-2.5, 10**-0.5
"""The paper's hyper-parameters for Pop-Art."""

SCALE_LB, SCALE_UB = 1e-4, 1e6

RunStream = Callable[[], Any]
HIDDEN = ("input_linear", "hidden1", "hidden2", "hidden3")


def reference(params: Mapping[str, np.ndarray], numbers: np.ndarray) -> RunStream:
    """Reference style: one module per seed, `torch.optim`, a Python loop, one seed after the other."""

    def run_seed(lane: int) -> list[float]:
        lower, upper = LowerLayers(16, 10), UpperLayer(10, 1)
        for module in (lower, upper):
            module.load_state_dict({name: torch.from_numpy(params[name][lane]) for name in module.state_dict()})
        optimizers = [torch.optim.SGD(module.parameters(), lr=LEARNING_RATE) for module in (lower, upper)]
        head: nn.Linear = upper.output_linear
        mean, second, scale = 0.0, 1.0, 1.0
        errors = []
        for number in numbers[:, lane].tolist():
            x = torch.tensor([(number >> bit) & 1 for bit in range(15, -1, -1)], dtype=torch.float32)
            new_mean = (1 - STEP_SIZE) * mean + STEP_SIZE * number
            second = (1 - STEP_SIZE) * second + STEP_SIZE * number**2
            new_scale = min(max(second - new_mean**2, SCALE_LB**2), SCALE_UB**2) ** 0.5
            with torch.no_grad():
                head.weight.mul_(scale / new_scale)
                head.bias.mul_(scale).add_(mean - new_mean).div_(new_scale)
            mean, scale = new_mean, new_scale
            for optimizer in optimizers:
                optimizer.zero_grad()
            prediction = upper(lower(x))
            loss = 0.5 * (prediction - (number - mean) / scale).square().sum()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            errors.append(abs(prediction.item() * scale + mean - number))
        return errors

    return lambda: np.array([run_seed(lane) for lane in range(numbers.shape[1])], dtype=np.float32).T


def _statistics(mean: Any, second: Any, y: Any) -> tuple[Any, Any, Any]:
    import jax.numpy as jnp

    mean = (1 - STEP_SIZE) * mean + STEP_SIZE * y
    second = (1 - STEP_SIZE) * second + STEP_SIZE * y * y
    return mean, second, jnp.sqrt(jnp.clip(second - mean * mean, SCALE_LB**2, SCALE_UB**2))


def _popped(params: Any, mean: Any, scale: Any, new_mean: Any, new_scale: Any) -> Any:
    return {
        **params,
        "output_linear.weight": params["output_linear.weight"] * (scale / new_scale),
        "output_linear.bias": (scale * params["output_linear.bias"] + mean - new_mean) / new_scale,
    }


def _learn(network: Callable[[Any, Any], Any], carry: Any, x: Any, y: Any) -> Any:
    """A step on one sample; of one lane, or of several in the last axis of all arrays."""
    import jax
    import jax.numpy as jnp

    params, (mean, second, scale) = carry
    new_mean, second, new_scale = _statistics(mean, second, y)
    params = _popped(params, mean, scale, new_mean, new_scale)

    def loss(params: Any) -> Any:
        prediction = network(params, x)[0]
        return (0.5 * (prediction - (y - new_mean) / new_scale) ** 2).sum(), prediction

    grads, prediction = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    return (params, (new_mean, second, new_scale)), jnp.abs(prediction * new_scale + new_mean - y)


def jax_scan(params: Mapping[str, np.ndarray], numbers: np.ndarray) -> RunStream:
    """Idiomatic JAX: the step of one lane written in JAX, and ``jit(vmap(scan(step)))``."""
    import jax
    import jax.numpy as jnp

    def network(params: Any, x: Any) -> Any:
        for name in HIDDEN:
            x = jnp.tanh(params[f"{name}.weight"] @ x + params[f"{name}.bias"])
        return params["output_linear.weight"] @ x + params["output_linear.bias"]

    def step(carry: Any, number: Any) -> Any:
        x = ((number >> jnp.arange(15, -1, -1)) & 1).astype(jnp.float32)
        return _learn(network, carry, x, number.astype(jnp.float32))

    def one_lane(params: Any, numbers: Any) -> Any:
        start = (jnp.float32(0), jnp.float32(1), jnp.float32(1))
        return jax.lax.scan(step, (params, start), numbers)[1]

    run = jax.jit(jax.vmap(one_lane, in_axes=(0, 1), out_axes=1))
    arguments = {name: jnp.asarray(value) for name, value in params.items()}, jnp.asarray(numbers)
    return lambda: run(*arguments).block_until_ready()


def jax_traced(params: Mapping[str, np.ndarray], numbers: np.ndarray) -> RunStream:
    """The engines' own step, from `regression`, traced to JAX: ``jit(vmap(scan(step)))``."""
    import jax
    import jax.numpy as jnp

    from popart_func.interop.jax import to_jax, to_jax_function

    init, torch_step = regression.init_and_step("popart")
    start = to_jax(init({name: torch.from_numpy(value) for name, value in params.items()}))
    stream = jnp.asarray(numbers)
    start = jax.device_put(start, stream.device)
    step = to_jax_function(torch_step)

    def one_lane(state: Any, numbers: Any) -> Any:
        return jax.lax.scan(step, state, numbers)[1]

    run = jax.jit(jax.vmap(one_lane, in_axes=(0, 1), out_axes=1))
    return lambda: run(start, stream).block_until_ready()


def jax_lanes_last(params: Mapping[str, np.ndarray], numbers: np.ndarray) -> RunStream:
    """JAX with lanes as the last axis of every array and one scan: sums over lanes instead of small matrix products."""
    import jax
    import jax.numpy as jnp

    def linear(params: Any, name: str, x: Any) -> Any:
        return (params[f"{name}.weight"] * x[None]).sum(1) + params[f"{name}.bias"]

    def network(params: Any, x: Any) -> Any:
        for name in HIDDEN:
            x = jnp.tanh(linear(params, name, x))
        return linear(params, "output_linear", x)

    def step(carry: Any, number: Any) -> Any:
        x = ((number[None] >> jnp.arange(15, -1, -1)[:, None]) & 1).astype(jnp.float32)
        return _learn(network, carry, x, number.astype(jnp.float32))

    @jax.jit
    def run(params: Any, numbers: Any) -> Any:
        lanes = jnp.zeros(numbers.shape[1])
        return jax.lax.scan(step, (params, (lanes, lanes + 1, lanes + 1)), numbers)[1]

    last = {name: jnp.asarray(np.moveaxis(value, 0, -1)) for name, value in params.items()}
    stream = jnp.asarray(numbers)
    return lambda: run(last, stream).block_until_ready()


MAKERS: dict[str, Callable[[Mapping[str, np.ndarray], np.ndarray], RunStream]] = {
    "jax": jax_scan,
    "jax_traced": jax_traced,
    "jax_lanes_last": jax_lanes_last,
    "reference": reference,
}
"""The competitors' makers by the names that `names.COMPETITORS` lists."""
