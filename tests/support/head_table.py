"""Networks with their heads and the statistic of each output, as one table for the tests of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from random_heads import FLOAT64
from torch import Tensor, nn

import popart_func as pf
from popart_func.heads import Head

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


class Row(NamedTuple):
    apply: Callable[[dict[str, Tensor], Tensor], Tensor]
    shapes: dict[str, tuple[int, ...]]
    head: Any
    tasks: int = 2
    groups: Tensor | None = None


def linear(params, name, h):
    return h @ params[f"{name}.weight"].mT + params[f"{name}.bias"]


def mixture(params, h):
    share = torch.softmax(h @ params["gate"], -1)
    return share[..., :1] * linear(params, "a", h) + share[..., 1:] * linear(params, "b", h)


HEADS = {
    "linear": Row(lambda p, h: linear(p, "head", h), {"head.weight": (2, 4), "head.bias": (2,)}, "head"),
    "tasks x actions": Row(
        lambda p, h: linear(p, "head", h), {"head.weight": (6, 4), "head.bias": (6,)}, "head", groups=GROUPS
    ),
    "actions x tasks": Row(
        lambda p, h: linear(p, "head", h),
        {"head.weight": (6, 4), "head.bias": (6,)},
        "head",
        groups=GROUPS[::2].repeat(2),
    ),
    "one statistic": Row(lambda p, h: linear(p, "head", h), {"head.weight": (6, 4), "head.bias": (6,)}, "head", 1),
    "two heads": Row(
        lambda p, h: torch.cat([linear(p, "extrinsic", h), linear(p, "intrinsic", h)], -1),
        {"extrinsic.weight": (1, 4), "extrinsic.bias": (1,), "intrinsic.weight": (1, 4), "intrinsic.bias": (1,)},
        ["extrinsic", "intrinsic"],
    ),
    "two heads, three outputs, two groups": Row(
        lambda p, h: torch.cat([linear(p, "a", h), linear(p, "b", h)], -1),
        {"a.weight": (1, 4), "a.bias": (1,), "b.weight": (2, 4), "b.bias": (2,)},
        ["a", "b"],
        groups=torch.tensor([1, 0, 1]),
    ),
    "ensemble": Row(
        lambda p, h: torch.einsum("moi,...i->...mo", p["head.weight"], h) + p["head.bias"],
        {"head.weight": (3, 2, 4), "head.bias": (3, 2)},
        "head",
    ),
    "ensemble, inputs first": Row(
        lambda p, h: torch.einsum("mio,...i->...mo", p["head.weight"], h) + p["head.bias"],
        {"head.weight": (3, 4, 2), "head.bias": (3, 2)},
        Head("head", axis=-1),
    ),
    "inputs first, square, other names": Row(
        lambda p, h: h @ p["kernel"] + p["b"],
        {"kernel": (4, 4), "b": (4,)},
        Head("", axis=-1, weight="kernel", bias="b"),
        groups=torch.tensor([0, 1, 1, 0]),
    ),
    "convolution": Row(
        lambda p, h: nn.functional.conv2d(h[..., :, None, None], p["head.weight"], p["head.bias"]).squeeze((-1, -2)),
        {"head.weight": (2, 4, 1, 1), "head.bias": (2,)},
        "head",
    ),
    "mixture": Row(
        mixture, {"gate": (4, 2), "a.weight": (2, 4), "a.bias": (2,), "b.weight": (2, 4), "b.bias": (2,)}, ["a", "b"]
    ),
    "an indexed head": Row(
        lambda p, h: linear(p, "head", h),
        {"head.weight": (3, 4), "head.bias": (3,)},
        Head("head", indices=torch.tensor([1, 0, 1])),
        groups=torch.tensor([1, 0, 1]),
    ),
}


def params_of(row: Row) -> dict[str, Tensor]:
    shapes = {"body.weight": (4, 3), **row.shapes}
    return {name: torch.randn(shape, dtype=FLOAT64) for name, shape in shapes.items()}


def apply_of(row: Row) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, x: row.apply(params, torch.tanh(x @ params["body.weight"].mT))


def unnormalized(row: Row, params, x, state):
    indices = None if row.tasks == 1 else row.groups
    return pf.unnormalize(state, apply_of(row)(params, x), indices)
