"""Check and Settings: one claim as a function of a random key, and the settings that all seeds of a call share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, vmap

from popart_func.verify.discrepancy import Discrepancy
from popart_func.verify.draw import ARCHITECTURES, Architecture

__all__ = ["Check", "Settings", "check"]


class Settings(NamedTuple):
    """Settings that all seeds of one call share.

    Attributes:
        dtype: the dtype that the library computes in.
        architecture: the shapes of network and data.
        engine: the engine that the check ``"engine"`` compares with eager.
    """

    dtype: torch.dtype = torch.float32
    architecture: Architecture = ARCHITECTURES[0]
    engine: str = "auto"


class Check(NamedTuple):
    """One claim and the function that tests it.

    Attributes:
        name: the name on the command line.
        claim: the claim in one line.
        source: the paper or page that makes the claim.
        function: ``(key, settings) -> Discrepancy`` of one seed, a pure function; or, with ``over_lanes``,
            ``(keys, settings) -> Discrepancy`` of all seeds at once.
        over_lanes: true if the claim is about many lanes, or if the function needs operations that `torch.vmap` does
            not support.
        architectures: the indices into `ARCHITECTURES` that the check runs on.
        most_seeds: the largest number of seeds that the check takes, for a check that runs them one by one.
        why_not: ``(settings, device) -> reason`` why the check can't run there, or None if it can.
    """

    name: str
    claim: str
    source: str
    function: Callable[[Tensor, Settings], Discrepancy]
    over_lanes: bool = False
    architectures: tuple[int, ...] = tuple(range(len(ARCHITECTURES)))
    most_seeds: int | None = None
    why_not: Callable[[Settings, torch.device], str | None] = lambda settings, device: None

    def __call__(self, keys: Tensor, settings: Settings) -> Discrepancy:
        """Runs the check on keys ``[seeds, 2]``; fields of the discrepancy are ``[seeds]``."""
        if self.over_lanes:
            return self.function(keys, settings)
        return vmap(lambda key: self.function(key, settings))(keys)


def check(claim: str, source: str, **options: Any) -> Callable[[Callable[[Tensor, Settings], Discrepancy]], Check]:
    """Decorator: makes a function a `Check` with the function's name; ``options`` are further fields of `Check`."""
    return lambda function: Check(function.__name__, claim, source, function, **options)
