"""Functional Pop-Art for PyTorch: pure functions over parameter pytrees, thousands of seeds at once.

Every algorithm is a pair of pure functions ``(init, update)``, written for one example of one seed. Importing this
package imports torch and optree only; what needs more (`popart_func.experiments`) is imported by name, and `verify`
when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from popart_func import checkpoints, engines, heads, learners, models, nn, optim, pop_art, random, scales, tree
from popart_func._version import __version__ as __version__
from popart_func.engines import cond, fori_loop, scan, scan_lanes, while_loop
from popart_func.heads import Head
from popart_func.learners import (
    Info,
    Learner,
    LearnerState,
    art_learner,
    losses,
    normalized_sgd_learner,
    popart_learner,
    sgd_learner,
)
from popart_func.models import (
    LowerLayers,
    SplitParams,
    UnifiedModel,
    UpperLayer,
    init_lanes,
    init_params,
    split,
    stateless,
    unify,
)
from popart_func.optim import (
    GradientTransformation,
    adam,
    apply_updates,
    chain,
    gradient_factors,
    rescale_moments,
    sgd,
)
from popart_func.pop_art import PopArt, PopArtState, art, fold, init_state, normalize, pop, popart, unnormalize

if TYPE_CHECKING:
    from popart_func import verify

__all__ = [
    "GradientTransformation",
    "Head",
    "Info",
    "Learner",
    "LearnerState",
    "LowerLayers",
    "PopArt",
    "PopArtState",
    "SplitParams",
    "UnifiedModel",
    "UpperLayer",
    "adam",
    "apply_updates",
    "art",
    "art_learner",
    "chain",
    "checkpoints",
    "cond",
    "engines",
    "fold",
    "fori_loop",
    "gradient_factors",
    "heads",
    "init_lanes",
    "init_params",
    "init_state",
    "learners",
    "losses",
    "models",
    "nn",
    "normalize",
    "normalized_sgd_learner",
    "optim",
    "pop",
    "pop_art",
    "popart",
    "popart_learner",
    "random",
    "rescale_moments",
    "scales",
    "scan",
    "scan_lanes",
    "sgd",
    "sgd_learner",
    "split",
    "stateless",
    "tree",
    "unify",
    "unnormalize",
    "verify",
    "while_loop",
]


# What a state is made of, so that `torch.load` opens one.
torch.serialization.add_safe_globals(
    [
        LearnerState,
        PopArtState,
        SplitParams,
        optim.AdamState,
        optim.DecayState,
        optim.LearningRateState,
        optim.MomentumState,
        optim.RMSpropState,
        optim.TorchState,
    ]
)


def __getattr__(name: str) -> Any:
    if name == "verify":
        return importlib.import_module("popart_func.verify")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
