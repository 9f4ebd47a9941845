"""Optimizers as gradient transformations, with optax's contract, and what POP does to their state.

| module | what is in it |
|---|---|
| `transformations` | `sgd`, `adam`, `chain`, `apply_updates` |
| `composing` | `clip_by_global_norm`, `add_decayed_weights`, `adamw`, `partition`, `set_to_zero`; target networks |
| `schedules` | `linear_schedule`, `cosine_decay_schedule`, `warmup_cosine_decay_schedule` |
| `torch_optimizers` | `from_torch`: any optimizer of `torch.optim` |
| `rescaling` | `rescale_moments` after POP; `register_state` for states of your own |
"""

from popart_func.optim.composing import (
    DecayState,
    adamw,
    add_decayed_weights,
    clip_by_global_norm,
    incremental_update,
    partition,
    periodic_update,
    set_to_zero,
)
from popart_func.optim.rescaling import PARAMETERS, gradient_factors, map_parameters, register_state, rescale_moments
from popart_func.optim.schedules import (
    cosine_decay_schedule,
    linear_schedule,
    warmup_cosine_decay_schedule,
)
from popart_func.optim.torch_optimizers import RMSpropState, TorchState, from_torch
from popart_func.optim.transformations import (
    AdamState,
    GradientTransformation,
    LearningRateState,
    MomentumState,
    Rate,
    adam,
    apply_updates,
    chain,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)

__all__ = [
    "PARAMETERS",
    "AdamState",
    "DecayState",
    "GradientTransformation",
    "LearningRateState",
    "MomentumState",
    "RMSpropState",
    "Rate",
    "TorchState",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "cosine_decay_schedule",
    "from_torch",
    "gradient_factors",
    "incremental_update",
    "linear_schedule",
    "map_parameters",
    "partition",
    "periodic_update",
    "register_state",
    "rescale_moments",
    "scale_by_adam",
    "scale_by_learning_rate",
    "set_to_zero",
    "sgd",
    "trace",
    "warmup_cosine_decay_schedule",
]
