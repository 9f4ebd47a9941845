"""What a check is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, vmap

from popart_func.verify.discrepancy import Discrepancy
from popart_func.verify.draw import ARCHITECTURES, Architecture

__all__ = ["Check", "Settings"]

EVERY = tuple(range(len(ARCHITECTURES)))


class Settings(NamedTuple):
    """What is the same for all seeds of one call.

    Attributes:
        dtype: what the library computes in.
        architecture: the shapes.
        engine: the one that `lanes.engine` holds against eager.
    """

    dtype: torch.dtype = torch.float32
    architecture: Architecture = ARCHITECTURES[0]
    engine: str = "auto"


class Check(NamedTuple):
    """One claim.

    Attributes:
        name: as on the command line.
        claim: one line.
        source: who claims it.
        function: ``(key, settings) -> Discrepancy``, pure, for one seed; or ``(keys, settings)`` for all lanes at once,
            if ``over_lanes``.
        over_lanes: whether the claim is about many lanes, or needs what `torch.vmap` does not let through.
        architectures: which of `ARCHITECTURES` it is run on.
        most_seeds: a check that runs seeds one by one takes no more of them.
        why_not: says why the check can't run with these settings on a device, or None.
    """

    name: str
    claim: str
    source: str
    function: Callable[[Tensor, Settings], Discrepancy]
    over_lanes: bool = False
    architectures: tuple[int, ...] = EVERY
    most_seeds: int | None = None
    why_not: Callable[[Settings, torch.device], str | None] = lambda settings, device: None

    def __call__(self, keys: Tensor, settings: Settings) -> Discrepancy:
        """The experiment: keys ``[seeds, 2]`` to a discrepancy of each seed."""
        if self.over_lanes:
            return self.function(keys, settings)
        return vmap(lambda key: self.function(key, settings))(keys)
