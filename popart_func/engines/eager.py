"""The eager engine, which defines what is right: `torch.vmap` over lanes, a Python loop over time."""

from __future__ import annotations

from contextlib import nullcontext

import optree
import torch
from torch import Tensor
from torch.func import vmap

from popart_func._torch import mutation_count
from popart_func.engines.lane_errors import named_errors
from popart_func.engines.lane_scan import PURE, LaneScan, check_carry
from popart_func.engines.loops.torch_loops import torch_loops
from popart_func.engines.tracing.batchable import Batchable
from popart_func.tree import PyTree

__all__ = ["compiles_once", "pays_off_after", "run", "why_not"]

pays_off_after = 0
"""Steps from which on the engine is worth its compile time: it has none."""

compiles_once = True
"""It compiles nothing."""


def why_not(device: torch.device) -> str | None:
    """Why the engine can't run on a device: it always can."""
    return None


def run(scan: LaneScan) -> tuple[PyTree, PyTree]:
    """Runs a scan: ``(carry, ys)``, with ``ys`` leaves ``[steps, lanes, ...]``. Differentiable by autograd."""
    structures: list[optree.PyTreeSpec] = []

    def flat_step(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        carry, y = check_carry(scan, scan.step(*optree.tree_unflatten(scan.structure, leaves)))
        carry_leaves, carry_structure = optree.tree_flatten(carry)
        y_leaves, y_structure = optree.tree_flatten(y)
        structures[:] = carry_structure, y_structure
        return tuple(carry_leaves), tuple(y_leaves)

    step = vmap(flat_step, in_dims=scan.lane_axes())
    batchable = Batchable()
    carry, ys = scan.carry, []
    given = [leaf for leaf in (*scan.carry, *scan.xs, *scan.hparams) if not leaf.is_inference()]
    before = list(map(mutation_count, given))
    for time in range(scan.steps):
        # The mode makes each operation a quarter slower: it stays on only where the first step needed it.
        with named_errors(scan.caller), torch_loops(), batchable if time == 0 or batchable.used else nullcontext():
            carry, y = step(*carry, *(leaf[time] for leaf in scan.xs), *scan.hparams)
        if time == 0 and list(map(mutation_count, given)) != before:
            raise TypeError(f"{scan.caller}: `step` changes an argument in place: {PURE}")
        ys.append(y)
    carry_structure, y_structure = structures
    stacked = [torch.stack(leaves) for leaves in zip(*ys, strict=True)]
    carry = tuple(leaf.clone() for leaf in carry)  # a step may return what it took, twice: no two results share memory
    return optree.tree_unflatten(carry_structure, carry), optree.tree_unflatten(y_structure, stacked)
