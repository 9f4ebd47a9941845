"""Random steps of one lane: a few dozen operations, drawn from a seed, on matrices and vectors of odd sizes.

Values stay of order 1, so that float32 and eager's order of sums agree to rounding. Comparisons are left out where
rounding could turn them: they would make a difference of order 1.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from popart_func.engines.lane_scan import LaneScan, make_lane_scan

SIZES = (1, 2, 3, 5, 8, 13, 16, 17, 33)


def random_step(seed: int, operations: int = 25) -> tuple[Any, Any, Any]:
    """A step ``(carry, x) -> (carry, ys)``, and the shapes of its carry and of its x."""
    choose = random.Random(seed)
    rows, inner, columns = (choose.choice(SIZES) for _ in range(3))
    plan = [(choose.randrange(20), choose.random(), choose.random(), choose.randrange(5)) for _ in range(operations)]

    def step(carry: Any, x: Any) -> Any:
        weight, bias, memory, count = carry
        values: list[Tensor] = [weight, bias, memory, x, x @ weight, torch.outer(bias, bias)]

        def pick(number: float) -> Tensor:
            return values[int(number * len(values))]

        for kind, first, second, axis in plan:
            a, b = pick(first), pick(second)
            values.append(bounded(apply(kind, a, b, axis)))
        memory = memory.clone()
        old = memory[(count + 1) % memory.shape[0]]
        memory[count % memory.shape[0]] = memory_row(values[-1], memory.shape[1])
        change = sum(value.sum() / value.numel() for value in values[4:])
        weight = weight + 0.1 * bounded(x.T @ (x @ weight)) + 0.01 * change
        bias = bias + 0.01 * torch.tanh(old.sum() + change)
        return (bounded(weight), bounded(bias), memory, count + 1), (values[-1], values[-2].sum(), change)

    carry = {"weight": (inner, columns), "bias": (columns,), "memory": (7, 4)}
    return step, carry, (rows, inner)


def bounded(value: Tensor) -> Tensor:
    return value / (1 + value.abs().amax()) if value.numel() else value


def memory_row(value: Tensor, length: int) -> Tensor:
    flat = value.reshape(-1)
    return torch.cat([flat, flat.new_zeros(length)])[:length]


def apply(kind: int, a: Tensor, b: Tensor, axis: int) -> Tensor:
    """One operation; each works for operands of any shape."""
    axis = axis % max(a.ndim, 1)
    if kind == 0:
        return torch.tanh(a) + 0.5
    if kind == 1:
        return a.reshape(-1, 1) * torch.sin(b.reshape(-1)[:9])
    if kind == 2:
        return a.sum(axis) if a.ndim else a
    if kind == 3:
        return a.amax(axis) if a.ndim else a
    if kind == 4:
        return a.cumsum(axis) if a.ndim else a
    if kind == 5:
        return a.transpose(0, -1) if a.ndim else a
    if kind == 6:
        flat = a.reshape(-1)
        return flat.flip(0) * flat
    if kind == 7:
        left, right = a.reshape(a.shape[0] if a.ndim else 1, -1), b.reshape(b.shape[0] if b.ndim else 1, -1)
        inner = min(left.shape[1], right.shape[1])
        return left[:, :inner] @ right[:, :inner].T
    if kind == 8:
        flat = a.reshape(-1)
        return torch.cat([flat, b.reshape(-1)])[:40]
    if kind == 9:
        return torch.softmax(a, axis) if a.ndim else a
    if kind == 10:
        flat = b.reshape(-1)
        places = torch.arange(11) * 5 % flat.shape[0]
        return flat[places] * 0.5
    if kind == 11:
        flat = a.reshape(-1)
        places = torch.arange(flat.shape[0]) * 3 % 7
        return flat.new_zeros(7).index_put((places,), flat, accumulate=True)
    if kind == 12:
        return a.exp().log1p()
    if kind == 13:
        return a.reshape(-1)[::2].contiguous() - b.sum()
    if kind == 14:
        return a.double().mean().to(a.dtype) + b
    if kind == 15:
        flat = a.reshape(-1)
        return flat.unfold(0, min(3, flat.shape[0]), 1).sum(-1)
    if kind == 16:
        return a.square().sum().sqrt() * torch.sigmoid(b)
    if kind == 17:
        left, right = a.reshape(-1), b.reshape(-1)
        length = min(left.shape[0], right.shape[0])
        return torch.dot(left[:length], right[:length]) + a
    if kind == 18:
        flat = a.reshape(-1)
        return torch.where(torch.arange(flat.shape[0]) % 3 == 0, flat, 0.3)
    return torch.nn.functional.pad(a.reshape(-1), (2, 1), value=0.25)[1:]


def random_scan(seed: int, dtype: torch.dtype, lanes: int = 17) -> LaneScan:
    step, carry, x = random_step(seed)
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(lanes, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in carry.values()
    ]
    xs = torch.randn(4, lanes, *x, generator=generator, dtype=torch.float64).to(dtype)
    return make_lane_scan("scan", step, (*leaves, torch.arange(lanes)), xs, shared=False)
