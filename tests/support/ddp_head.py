"""The program of each rank in the test of `PopArtHead` within DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from popart_func.nn import PopArtHead

RANKS, STEPS = 2, 6


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS, 8, 3, generator=generator)
    return x, 1e4 * x.sum(-1, keepdim=True) + 5e4


def make(group: dist.ProcessGroup | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), PopArtHead(8, 1, 0.3, process_group=group))


def train(network: nn.Module, head: PopArtHead, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for inputs, targets in zip(x, y, strict=True):
        head.update(targets, optimizer=optimizer)
        optimizer.zero_grad()
        (network(inputs) - head.normalize(targets)).square().mean().backward()
        optimizer.step()


def run(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    network = make(dist.group.WORLD)
    x, y = (part.chunk(RANKS, 1)[rank] for part in data())
    train(DistributedDataParallel(network), network[-1], x, y)
    torch.save(network.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
