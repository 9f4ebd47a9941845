"""The agents' networks: multilayer perceptrons as pure functions, whose parameters are drawn from a key.

Names and layouts are those of `torch.nn.Linear`, ``hidden0.weight``, ``hidden0.bias``, ..., ``head.weight``. Weights
are drawn as haiku draws those of ``hk.nets.MLP``: a normal truncated at two deviations, with deviation 1/√inputs.
Biases are 0, and so is the head: else the first values would be of the order of 1, whatever the rewards are, and
bootstrapped targets would be made of them. With a head of zeros the first targets are the rewards, and all that an
agent with Pop-Art does is the same at every scale of the rewards.

`apply_normalized_mlp` and `init_sparse_mlp` are the network of streaming agents: Elsayed, Vasan and Mahmood, *Streaming
deep reinforcement learning finally works* (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, leaky_relu, linear

from popart_func import random
from popart_func.experiments.environments import Environment
from popart_func.models import Params
from popart_func.random import initializers

__all__ = ["apply_mlp", "apply_normalized_mlp", "init_mlp", "init_sparse_mlp", "layer_sizes"]


def layer_sizes(environment: Environment, hidden: Sequence[int]) -> list[int]:
    """The layers of a network from an environment's observations to its actions."""
    return [math.prod(environment.observation_shape), *hidden, environment.num_actions]


def init_mlp(key: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Parameters of a perceptron with the layers ``sizes``: inputs, hidden layers, outputs.

    >>> sorted(init_mlp(random.key(0), [3, 8, 2]))
    ['head.bias', 'head.weight', 'hidden0.bias', 'hidden0.weight']
    """
    *hidden, outputs = sizes[1:]
    params = {}
    for i, layer_key in enumerate(random.split(key, len(hidden))):
        draw = initializers.truncated_normal(stddev=sizes[i] ** -0.5)
        params[f"hidden{i}.weight"] = draw(layer_key, (hidden[i], sizes[i]))
        params[f"hidden{i}.bias"] = torch.zeros(hidden[i])
    return {**params, "head.weight": torch.zeros(outputs, sizes[-2]), "head.bias": torch.zeros(outputs)}


def apply_mlp(params: Params, x: Tensor) -> Tensor:
    """The outputs for ``x`` ``[..., inputs]``, with relu behind every hidden layer."""
    for i in range(len(params) // 2 - 1):
        x = linear(x, params[f"hidden{i}.weight"], params[f"hidden{i}.bias"]).relu()
    return linear(x, params["head.weight"], params["head.bias"])


def init_sparse_mlp(key: Tensor, sizes: Sequence[int], sparsity: float = 0.9) -> dict[str, Tensor]:
    """Parameters as those of `init_mlp`, with hidden weights that are mostly 0.

    A unit's weights are uniform in ±1/√inputs, and a random ``sparsity`` of them, rounded up, are 0; but one is left.

    Args:
        key: what is drawn from.
        sizes: inputs, hidden layers, outputs.
        sparsity: the share of a unit's weights that are 0.
    """
    params = init_mlp(key, sizes)
    for i, layer_key in enumerate(random.split(key, len(sizes) - 2)):
        weight = params[f"hidden{i}.weight"]
        for_values, for_order = random.split(layer_key)
        bound = sizes[i] ** -0.5
        values = random.uniform(for_values, weight.shape, minval=-bound, maxval=bound)
        # A unit keeps the weights with its largest random numbers.
        kept = max(1, sizes[i] - math.ceil(sparsity * sizes[i]))
        order = random.uniform(for_order, weight.shape)
        least = order.sort(-1, descending=True).values[:, kept - 1, None]
        params[f"hidden{i}.weight"] = torch.where(order >= least, values, 0.0)
    return params


def apply_normalized_mlp(params: Params, x: Tensor) -> Tensor:
    """The outputs for ``x`` ``[..., inputs]``, with layer normalization and leaky relu behind every hidden layer."""
    for i in range(len(params) // 2 - 1):
        x = linear(x, params[f"hidden{i}.weight"], params[f"hidden{i}.bias"])
        x = leaky_relu(layer_norm(x, x.shape[-1:]))
    return linear(x, params["head.weight"], params["head.bias"])
