"""The agents' networks: multilayer perceptrons as pure functions, whose parameters are drawn from a key.

Names and layouts are those of `torch.nn.Linear`, ``hidden0.weight``, ``hidden0.bias``, ..., ``head.weight``. Weights
are drawn as haiku draws those of ``hk.nets.MLP``: a normal truncated at two deviations, with deviation 1/√inputs.
Biases are 0, and so is the head: else the first values would be of the order of 1, whatever the rewards are, and
bootstrapped targets would be made of them. With a head of zeros the first targets are the rewards, and all that an
agent with Pop-Art does is the same at every scale of the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from popart_func import random
from popart_func.models import Params
from popart_func.random import initializers

__all__ = ["apply_mlp", "init_mlp"]


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
