"""Fingerprint of a sweep: hashes of what the user's functions compute, since functions themselves can't be compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import optree
import torch
from torch import Tensor

from popart_func.sweeps.job import Job, threads
from popart_func.tree import PyTree

__all__ = ["fingerprint"]

_STEPS, _LANES = 3, 64
"""How many steps, in how many lanes at most, tell one learner from another."""


def fingerprint(job: Job) -> dict[str, str]:
    """Hashes a sweep's inputs, learners and records.

    Each seed's data and parameters, each learner's first three steps in up to 64 lanes from all over the grid, and what
    each record keeps of one series.
    """
    with torch.no_grad(), threads(1):
        init, data = list[str](), list[str]()
        for seed in job.lanes.seeds:
            params, stream = job.seed_inputs(seed)
            init.append(_digest(params))
            if not (job.inputs.shared and data):
                data.append(_digest(stream))
        found = {"init": _joined(init), "data": _joined(data)}
        probes = {name: _first_steps(job, name) for name in job.learners}
        found |= {f"learner {name}".strip(): _digest(probe) for name, probe in probes.items()}
        _, series = next(iter(probes.values()))
        for name, record in job.record.items():
            found[f"record {name}"] = _digest(record.keep(_wave(series[name], job.steps()))) + " gaps" * record.gaps
    return found


def _first_steps(job: Job, learner: str) -> tuple[PyTree, dict[str, Tensor]]:
    """The states and, by record, the series of a learner's first steps in lanes from all over its grid."""
    count = job.lanes.count(learner)
    some = slice(0, count, -(-count // _LANES))
    return job.scan(learner, some, "eager", steps=min(_STEPS, job.steps()))


def _wave(seen: Tensor, steps: int) -> Tensor:
    """A series ``[steps, ...]`` whose samples all differ, of the dtype and shape of series ``[time, lanes, ...]``.

    Integers may be indices or classes: they stay between the least and the greatest that were seen.
    """
    shape = steps, *seen.shape[2:]
    wave = torch.arange(math.prod(shape), device=seen.device).mul(0.7).sin().mul(10).reshape(shape)
    if seen.is_floating_point() or seen.is_complex() or seen.dtype == torch.bool or not seen.numel():
        return wave.to(seen.dtype)
    least, most = seen.long().aminmax()
    return (least + wave.long() % (most - least + 1)).to(seen.dtype)


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(tree: PyTree) -> str:
    found = hashlib.sha256()
    for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
        found.update(f"{path} {leaf.dtype} {tuple(leaf.shape)}".encode())
        # numpy lacks some dtypes, so the numbers go as bytes.
        found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
